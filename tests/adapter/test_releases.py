"""Released checkpoints of others: their prompts id by id, their masks cell by cell.

Weights are random and cut in depth and width; vocabulary and special ids are the real ones.
"""

import json

import pytest
import torch
from engine.served import Ask, dense_logits
from tiny_tokenizer import build_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blocktune.adapter import RELEASES, find_release
from blocktune.attention import dense_mask
from blocktune.engine import Engine
from blocktune.layout import FIRST_LAYER
from blocktune.methods import build
from blocktune.prompt import Chunk

LINK, OPENS, CLOSES, EOT = 128_011, 128_254, 128_255, 128_009
NAMES = [
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{i}|>" for i in (0, 1)),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]
ASK = Ask(
    "Who directed the film?",
    (Chunk("It was shot in 1966.", "Frozen Shore"), Chunk("Noel Fisher directed.", "Noel Fisher")),
)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny test tokenizer's merges in a vocabulary of Llama 3's size, with its special ids."""
    rules = json.loads(build_tokenizer(None).backend_tokenizer.to_str())
    vocab = rules["model"]["vocab"]
    vocab |= {f"<filler {i}>": i for i in range(len(vocab), 128_000)}
    backend = Tokenizer.from_str(json.dumps(rules | {"added_tokens": []}))
    backend.add_special_tokens([AddedToken(name, special=True) for name in NAMES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as the Hub has them."""
    path = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=128_256, tie_word_embeddings=True, **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(path)
    llama3_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def kvlink(folder):
    return Engine.from_pretrained(str(folder), adapter="release:kvlink-1b", device="cpu")


def prompt_of(engine, method):
    method = build(method)
    pieces = engine.prompts.pieces(ASK, method)
    return engine.prompts.prompt(pieces, engine.prompts.spec(method))


def encode(engine, text: str) -> list[int]:
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_kvlink_prompt_is_the_authors_token_by_token(kvlink):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    system = header.format("system") + kvlink.format.system + "<|eot_id|>"
    wanted = [*encode(kvlink, "<|begin_of_text|>" + system), OPENS]
    for number, chunk in enumerate(ASK.chunks):
        wanted += encode(kvlink, f"Document [1](Title: {chunk.title}) {chunk.text}\n")
        wanted += [LINK + 5 * number + slot for slot in range(5)]
    wanted += [CLOSES, EOT, *encode(kvlink, header.format("user") + ASK.question)]
    wanted += [EOT, *encode(kvlink, header.format("assistant"))]
    assert list(prompt_of(kvlink, "kvlink").ids) == wanted


def test_a_kvlink_mask_is_the_authors_segment_mask(kvlink):
    prompt = prompt_of(kvlink, "kvlink")
    pieces = kvlink.prompts.pieces(ASK, build("kvlink"))
    segments = [0] * len(pieces.prefix)
    for number, chunk in enumerate(pieces.chunks, start=1):
        segments += [number] * len(chunk) + [0] * 5
    segment = torch.tensor(segments + [0] * len(pieces.query))
    # They let a row see its own segment; rows of segment 0 see all before them.
    sees = (segment[:, None] == segment[None]) | (segment == 0)[:, None]
    causal = torch.ones_like(sees).tril()
    assert torch.equal(dense_mask(prompt.layout, FIRST_LAYER)[0, 0], causal & sees)


def test_kvlink_is_served_as_one_dense_forward(kvlink):
    served = kvlink.next_logits([ASK], "kvlink")[0]
    wanted = dense_logits(kvlink, ASK, build("kvlink"))
    torch.testing.assert_close(served, wanted, rtol=0, atol=1e-4)
    usage = kvlink.answer([ASK], "kvlink", max_new_tokens=1)[0].usage
    assert (usage.chunk_hits, sum(usage.layer_tokens)) == (2, 0)


def test_kvlinks_evaluation_has_the_documents_in_the_users_turn(folder):
    engine = Engine.from_pretrained(str(folder), adapter="release:kvlink-1b-eval", device="cpu")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    system = header.format("system") + (
        "You are a intelligent AI assistant. Please answer questions based on the user's "
        "instruction. Below are some reference documents that may help you in answering the "
        "user's question.<|eot_id|>"
    )
    wanted = [*encode(engine, "<|begin_of_text|>" + system + header.format("user")), OPENS]
    for number, chunk in enumerate(ASK.chunks):
        wanted += encode(engine, f"Document [1](Title: {chunk.title}) {chunk.text}\n")
        wanted += [LINK + 5 * number + slot for slot in range(5)]
    wanted += [CLOSES, *encode(engine, ASK.question), EOT]
    assert list(prompt_of(engine, "kvlink").ids) == wanted + encode(
        engine, header.format("assistant")
    )


def test_a_forty_first_chunk_has_no_links(kvlink):
    many = Ask("Who?", tuple(Chunk(f"Number {i}.") for i in range(41)))
    with pytest.raises(ValueError, match="rows for 40 chunks"):
        kvlink.next_logits([many], "kvlink")


LOOSE = Ask(
    ASK.question + " \n", tuple(Chunk(f"\n {chunk.text}\n\n", chunk.title) for chunk in ASK.chunks)
)
"""As it comes from a file: white space around everything, which the authors strip."""


@pytest.mark.parametrize(
    ("release", "method", "tag"),
    [
        ("tulu3-block-ft", "block-attention", "[Block-Attention]"),
        ("tulu3-block-ft", "full-prefill", ""),
        ("tulu3-rag", "full-prefill", ""),
        ("block-ft-qwen3-8b", "block-attention", ""),
    ],
)
@pytest.mark.parametrize("ask", [ASK, LOOSE], ids=["stripped", "loose"])
def test_a_block_attention_prompt_is_the_authors_block_by_block(folder, release, method, tag, ask):
    engine = Engine.from_pretrained(str(folder), adapter=f"release:{release}", device="cpu")
    pieces = engine.prompts.pieces(ask, build(method))
    texts = [
        "<|user|>\nYou are an intelligent AI assistant. Please answer questions based on the "
        "user's instructions. Below are some reference documents that may help you in answering "
        "the user's question.\n\n",
        "- Title: Frozen Shore\nIt was shot in 1966.\n",
        "- Title: Noel Fisher\nNoel Fisher directed.\n",
        "\n\nPlease write a high-quality answer for the given question using only the provided "
        "search documents (some of which might be irrelevant).\nQuestion: Who directed the film?\n"
        "<|assistant|>\n",
    ]
    blocks = [pieces.prefix, *pieces.chunks, pieces.query]
    first, *rest = [encode(engine, text) for text in texts]
    # The tag is tokenised apart: its bracket and the turn's would merge.
    assert [list(block) for block in blocks] == [encode(engine, tag) + first, *rest]
    served = engine.next_logits([ask], method)[0]
    wanted = dense_logits(engine, ask, build(method))
    torch.testing.assert_close(served, wanted, rtol=0, atol=1e-4)


def test_another_tokenizer_or_name_is_refused(folder):
    other = build_tokenizer()
    model = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"trained with <.*> as id 128011, this tokenizer has"):
        RELEASES["kvlink-3b"].fit(model, other)
    with pytest.raises(ValueError, match="unknown release 'kvlink-8b'; available: tulu3-block-ft"):
        find_release("release:kvlink-8b")
    assert find_release("out/kvlink") is None


def test_weights_without_rows_for_the_links_are_refused(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(128_100)
    with pytest.raises(ValueError, match="link tokens up to id 128210, this model embeds"):
        RELEASES["kvlink-1b"].fit(model, llama3_tokenizer())
