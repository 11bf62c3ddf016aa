"""Models that do more to their cached states than attend, or cache other states than keys."""

import pytest
from families import BASE, build, rope
from server.support import CHAT, chat
from transformers import DeepseekV3Config, DiffLlamaConfig, LlamaConfig, Ministral3Config

from blocktune.engine import Engine
from blocktune.server.job import bytes_per_token
from blocktune.testing import WORDS, byte_tokenizer

SIZES = BASE | {"vocab_size": 384, "eos_token_id": 383, "num_key_value_heads": 4}
LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "first_k_dense_replace": 2},
}
TEXTS = ["Anna Belt is in Kirby.", "Walter Gray lives in Lorne."]


@pytest.fixture(scope="module")
def engines():
    configs = {
        "llama": LlamaConfig(**SIZES),
        "latent keys": DeepseekV3Config(**SIZES, **LATENT),
        "paired values": DiffLlamaConfig(**SIZES),
    }
    tokenizer = byte_tokenizer()
    return {
        name: Engine(build(config), tokenizer, format=WORDS) for name, config in configs.items()
    }


@pytest.mark.parametrize("name", ["llama", "latent keys", "paired values"])
def test_answers_decoded_together_are_the_engines(serve, engines, name):
    question = {"question": "Who?", "chunks": TEXTS}
    [wanted] = engines[name].answer([question], "naive", max_new_tokens=8)
    asked = chat("Who?", TEXTS, n=3, max_tokens=8, blocktune={"method": "naive"})
    client = serve({name: engines[name]})
    for _ in range(2):
        made = client.post(CHAT, json=asked)
        assert made.status_code == 200, made.text
        texts = [choice["message"]["content"] for choice in made.json()["choices"]]
        assert texts == [wanted.text] * 3


def test_the_memory_of_a_token_is_what_the_model_caches(engines):
    layers, number = SIZES["num_hidden_layers"], 4
    assert bytes_per_token(engines["llama"]) == layers * number * 2 * 4 * 8
    assert bytes_per_token(engines["latent keys"]) == layers * number * (16 + 8)


def test_an_answer_of_no_given_length_ends_where_reuse_is_exact(serve):
    scaled = rope(
        "yarn", factor=4.0, original_max_position_embeddings=128, llama_4_scaling_beta=0.1
    )
    config = Ministral3Config(**SIZES, rope_parameters=scaled)
    engine = Engine(build(config), byte_tokenizer(), format=WORDS)
    client = serve({"scaled": engine})
    made = client.post(CHAT, json=chat("Who?", TEXTS, max_tokens=None)).json()
    assert made["usage"]["total_tokens"] == 128, made
    assert client.get("/v1/models/scaled").json()["max_model_len"] == 128
