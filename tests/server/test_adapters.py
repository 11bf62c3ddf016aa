"""Several adapters by model name on one base: weights shared, answers and chunks not."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from server.support import DOCUMENTS, QUESTION, TINY, chat

from blocktune.adapter import AdapterInfo
from blocktune.data import RagExample
from blocktune.engine import Engine
from blocktune.links import new_links, save_links
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import load_base
from blocktune.prompt import Chunk, LayoutSpec, PromptFormat
from blocktune.server.service import load_engines

CHUNKS = [
    Chunk("Anna Belt is in Kirby.", "Anna Belt"),
    Chunk("Walter Gray lives in Upper Lorne.", "Gray"),
    Chunk(DOCUMENTS[2]),
]
NAMES = ("base", "lora", "links", "tokens")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """LoRA alone, LoRA with a link table, and with link tokens in the vocabulary."""
    folders = {}
    for seed, (name, links) in enumerate((("lora", 0), ("links", 2), ("tokens", 2))):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        base, tokenizer = load_base(str(TINY))
        facts = {"base_model": str(TINY), "base_fingerprint": base_fingerprint(base)}
        facts |= {"tokenizer_hash": tokenizer_hash(tokenizer), "format": PromptFormat()}
        mode = "added_tokens" if name == "tokens" else "table"
        info = AdapterInfo(
            **facts, layout=LayoutSpec(num_links=links), link_mode=mode, training={}, link_seed=seed
        )
        info.save(folder)
        if name == "links":
            save_links(new_links(base, links, seed), folder)
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=4, lora_alpha=200, target_modules=targets, init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
    return folders


@pytest.fixture(scope="module")
def engines(adapters):
    names = [f"{name}={folder}" for name, folder in adapters.items()]
    return load_engines(str(TINY), names, "base", None, 1 << 30)


def test_adapters_share_the_weights_of_their_base(engines, adapters):
    assert list(engines) == ["lora", "links", "tokens", "base"]
    weights = {
        name: {p.data_ptr() for n, p in engine.model.named_parameters() if "lora" not in n}
        for name, engine in engines.items()
    }
    for name in ("lora", "links"):
        assert weights["base"] <= weights[name]
    assert len(weights["base"] - weights["tokens"]) == 1  # the embedding, which is its own
    assert len({engine.fingerprint for engine in engines.values()}) == 4
    alone = load_engines(str(TINY), [f"lora={adapters['lora']}"], "base", None, 1 << 30)
    assert alone["lora"].fingerprint == engines["lora"].fingerprint  # whoever else is served


def test_requests_in_turn_are_answered_as_by_an_engine_of_their_own(serve, engines, adapters):
    """Interleaved, several at once: each answer and its logits are those of the adapter alone."""
    client = serve(engines)
    example = RagExample(QUESTION, tuple(CHUNKS))
    wanted = {}
    for name in NAMES:
        own = Engine.from_pretrained(str(TINY), adapters.get(name))
        method = client.service.models[name].method
        wanted[name] = own.answer([example], method, max_new_tokens=12)[0].text
        shared = engines[name].next_logits([example], method)
        torch.testing.assert_close(shared, own.next_logits([example], method), rtol=1e-4, atol=1e-3)
    assert len(set(wanted.values())) == 4
    for engine in engines.values():
        engine.forget()

    def ask(name: str) -> str:
        answer = client.post("/v1/chat/completions", json=chat(model=name)).json()
        assert answer["model"] == name
        return answer["choices"][0]["message"]["content"]

    order = NAMES * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, order)) == [wanted[name] for name in order]


def test_a_chunk_of_one_is_not_used_under_another(serve, engines):
    client = serve(engines)
    for engine in engines.values():
        engine.forget()
    tiers = []
    for name in NAMES * 2:
        made = client.post("/v1/chunks", json={"model": name, "documents": DOCUMENTS}).json()
        answer = client.post("/v1/chat/completions", json=chat(model=name)).json()
        found = answer["blocktune"]["chunks"]
        assert [one["key"] for one in found] == [one["key"] for one in made["data"]]
        tiers.append({one["cached"] for one in made["data"]})
        assert {one["cached"] for one in found} == {"memory"}
    assert tiers == [{"none"}] * 4 + [{"memory"}] * 4


def test_a_folder_with_an_equals_sign_has_its_own_name(tmp_path):
    (folder := tmp_path / "lr=0.1").mkdir()
    with pytest.raises(ValueError, match=r"'lr=0\.1' is given 2 times"):
        load_engines(str(TINY), [str(folder)] * 2, None, None, 1)


def test_two_of_one_name_are_refused(adapters):
    with pytest.raises(ValueError, match="'a' is given 2 times"):
        load_engines(str(TINY), [f"a={adapters['lora']}", f"a={adapters['links']}"], None, None, 1)
