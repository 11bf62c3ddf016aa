"""Pieces hold what the chat template would have rendered, cut where the chunks begin and end."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from chat_families import FAMILIES, family, rendered
from tiny_tokenizer import build_tokenizer, trl_template
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from blocktune.prompt import (
    Chunk,
    LayoutSpec,
    PromptFormat,
    answer_ids,
    chunk_ids,
    end_of_turn,
    lay_out,
    make_pieces,
    prefix_ids,
)

CHUNKS = (
    Chunk("Anna Belt was born in Port Alder.\n\nShe studied there.", "Anna Belt"),
    Chunk("  indented, and with a line's end\n"),
    Chunk("The film was shot in {Port} Alder; 100% of it. Größe, 東京.", "Frozen Shore"),
)
QUESTION = "Where was the film shot?"


def joined(pieces) -> list[int]:
    return [*pieces.prefix, *sum(pieces.chunks, ()), *pieces.query]


def direct_render(name: str, text: str) -> str:
    """What the template itself makes of a user turn with ``text``; BOS where it leaves it out."""
    return rendered(name, [("user", text)])


@pytest.mark.parametrize("name", FAMILIES)
def test_joined_pieces_match_direct_render(name):
    tokenizer, fmt = family(name), PromptFormat()
    text = f"{fmt.instruction}\n\n" + "".join(map(fmt.render_chunk, CHUNKS))
    expected = direct_render(name, f"{text}Question: {QUESTION}")
    assert tokenizer.decode(joined(make_pieces(tokenizer, fmt, CHUNKS, QUESTION))) == expected


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_of_every_family(name, system):
    tokenizer, fmt = family(name), PromptFormat(system=system)
    pieces = make_pieces(tokenizer, fmt, CHUNKS, QUESTION)
    ids = joined(pieces)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    texts = [fmt.render_chunk(chunk) for chunk in CHUNKS]
    assert [tokenizer.decode(chunk) for chunk in pieces.chunks] == texts
    assert tokenizer.decode(pieces.prefix).endswith(f"{fmt.instruction}\n\n")
    assert tokenizer.decode(pieces.prefix).count("Be brief.") == (system is not None)
    opened = direct_render(name, "hello").rpartition("hello")[2]
    assert tokenizer.decode(pieces.query) == f"Question: {QUESTION}{opened}"
    assert pieces.answer == ()


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3", None])
@pytest.mark.parametrize("seed", range(8))
def test_training_caching_and_serving_agree(name, seed):
    """The same chunk is the same tokens in training, alone in a cache, and in any prompt served."""
    tokenizer = family(name) if name else build_tokenizer(None)
    rng = random.Random(seed)
    alphabet = ["Port Alder", "\n", "\n\n", " ", "a", "é", "<s>", "<|eot_id|>", "{x}", ".", "1966"]
    chunks = []
    for index in range(rng.randint(1, 6)):
        title = f"T{index}" if rng.random() < 0.5 else None
        chunks.append(Chunk("w" + "".join(rng.choices(alphabet, k=rng.randint(1, 30))), title))
    fmt = PromptFormat(system=rng.choice([None, "Be brief."]))
    trained = make_pieces(tokenizer, fmt, chunks, QUESTION, "Port Alder")
    served = make_pieces(tokenizer, fmt, chunks, QUESTION)
    assert served == trained._replace(answer=())
    assert trained.answer == answer_ids(tokenizer, "Port Alder")
    cached = list(chunk_ids(tokenizer, fmt, chunks))
    assert list(trained.chunks) == cached
    assert trained.prefix == prefix_ids(tokenizer, fmt)
    order = rng.sample(range(len(chunks)), len(chunks))
    other = make_pieces(tokenizer, fmt, [chunks[i] for i in order], "And who?")
    assert list(other.chunks) == [cached[i] for i in order]
    assert other.prefix == trained.prefix
    ids = (*trained.prefix, *sum(trained.chunks, ()), *trained.query, *trained.answer)
    assert lay_out(trained, LayoutSpec()).ids == ids


def test_trimming_template_does_not_touch_chunks():
    tokenizer, fmt = family("llama3"), PromptFormat(instruction="", question="\n{question}\n ")
    pieces = make_pieces(tokenizer, fmt, [Chunk("  a  ")], QUESTION)
    assert tokenizer.decode(pieces.chunks[0]) == "  a  \n\n"
    assert tokenizer.decode(pieces.prefix) == "<s><|start_header_id|>user<|end_header_id|>\n\n"
    assert tokenizer.decode(pieces.query).startswith(f"\n{QUESTION}<|eot_id|>")


def test_special_tokens_in_retrieved_text_stay_text():
    tokenizer = family("llama3")
    text = "he wrote <|eot_id|> and <s> and <|start_header_id|>system"
    [ids] = chunk_ids(tokenizer, PromptFormat(), [Chunk(text)])
    assert tokenizer.decode(ids) == f"{text}\n\n"
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert not set(answer_ids(tokenizer, text)[:-1]) & set(tokenizer.added_tokens_decoder)


def test_system_text_that_a_template_drops_is_folded():
    template = (
        "{{ bos_token }}{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"
    )
    prefix = prefix_ids(build_tokenizer(template), PromptFormat(system="Be brief."))
    folded = "<s>[Be brief.\n\nAnswer the question from the passages below.\n\n"
    assert build_tokenizer(template).decode(prefix) == folded


def test_plain_text_without_a_template():
    tokenizer = build_tokenizer(None)
    pieces = make_pieces(tokenizer, PromptFormat(system="Be brief."), CHUNKS[:1], QUESTION, "Here")
    assert tokenizer.decode(joined(pieces)) == (
        "<s>Be brief.\n\nAnswer the question from the passages below.\n\n"
        "Anna Belt\nAnna Belt was born in Port Alder.\n\nShe studied there.\n\n"
        f"Question: {QUESTION}\nAnswer:"
    )
    assert tokenizer.decode(pieces.answer) == " Here</s>"


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_bos_that_nobody_writes_is_not_added(bos):
    """Qwen has no BOS; Phi-4 names one that neither its template nor its tokenizer puts first."""
    tokenizer = build_tokenizer(trl_template("qwen2_5"), bos_token=bos)
    pieces = make_pieces(tokenizer, PromptFormat(), CHUNKS, QUESTION)
    assert tokenizer.decode(pieces.prefix).startswith("<|im_start|>system")


def test_bos_that_opens_every_turn():
    template = trl_template("qwen2_5")
    tokenizer = build_tokenizer(template, bos_token="<|im_start|>", eos_token="<|im_end|>")
    ids = joined(make_pieces(tokenizer, PromptFormat(system="Be brief."), CHUNKS, QUESTION))
    assert ids.count(tokenizer.bos_token_id) == 3  # system, user, assistant


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *(("llama3", "<|eot_id|>"), ("qwen3", "<|im_end|>"), ("gemma", "<end_of_turn>")),
        *(("phi3", "<|end|>"), ("llava_next", "</s>"), (None, "</s>")),
    ],
)
def test_answer_ends_the_turn(name, end):
    tokenizer = family(name) if name else build_tokenizer(None)
    assert tokenizer.decode(end_of_turn(tokenizer)) == end
    lead = "" if name else " "
    assert tokenizer.decode(answer_ids(tokenizer, "Port Alder")) == f"{lead}Port Alder{end}"


def test_no_end_of_turn_is_refused():
    with pytest.raises(ValueError, match="neither an EOS token nor a chat template"):
        end_of_turn(build_tokenizer(None, eos_token=None))


def test_no_chunk_is_refused():
    with pytest.raises(ValueError, match="at least one chunk, got an empty list"):
        make_pieces(build_tokenizer(), PromptFormat(), [], QUESTION)


def test_second_bos_is_refused():
    twice = "{{ bos_token }}" + trl_template("llama3")
    with pytest.raises(ValueError, match=r"BOS \('<s>'\) occurs 2 times"):
        make_pieces(build_tokenizer(twice), PromptFormat(), CHUNKS, QUESTION)
    with pytest.raises(ValueError, match=r"BOS \('<s>'\) occurs 2 times"):
        prefix_ids(build_tokenizer(), PromptFormat(instruction="Strike <s>this</s> out"))


@pytest.mark.parametrize("name", [*FAMILIES, None])
def test_special_tokens_in_a_question_stay_text(name):
    """A question about <|eot_id|> does not end the turn, nor does HTML's <s> begin a prompt."""
    tokenizer = family(name) if name else build_tokenizer(None)
    plain, asked = "Why?", f"Why {' '.join(tokenizer.added_tokens_encoder)}?"
    turns = name != "smolvlm"  # whose replies do not end alike, see test_followups.py

    def queries(question):
        more = [(question, "So.")] if turns else []
        pieces = make_pieces(tokenizer, PromptFormat(), CHUNKS, question, "So.", followups=more)
        return [pieces.query, *(query for query, _ in pieces.followups)]

    steering = tokenizer.added_tokens_decoder
    for query, without in zip(queries(asked), queries(plain), strict=True):
        assert [i for i in query if i in steering] == [i for i in without if i in steering]
        assert tokenizer.decode(query) == tokenizer.decode(without).replace(plain, asked)


def test_a_question_that_is_asked_twice_is_text_both_times():
    tokenizer, fmt = build_tokenizer(), PromptFormat(question="{question}\nAgain: {question}")
    query = make_pieces(tokenizer, fmt, CHUNKS, "Why <s>?").query
    assert tokenizer.decode(query).startswith("Why <s>?\nAgain: Why <s>?<|end|>")
    assert tokenizer.bos_token_id not in query


DATED = (
    "{{ bos_token }}{{ strftime_now('%B %-d, %Y') }}"
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
)


def test_a_template_that_asks_for_today_gets_the_same_day_every_day():
    prefix = prefix_ids(build_tokenizer(DATED), PromptFormat())
    assert build_tokenizer(DATED).decode(prefix).startswith("<s>July 26, 2024[")


@pytest.mark.parametrize("opened", ["<think>", "<think>\n"])
def test_thoughts_that_a_template_opens_are_closed(opened):
    template = trl_template("llama3") + "{% if add_generation_prompt %}" + opened + "{% endif %}"
    tokenizer = build_tokenizer(template)
    query = make_pieces(tokenizer, PromptFormat(), CHUNKS, QUESTION).query
    assert tokenizer.decode(query).endswith("<think>\n\n</think>\n\n")


def test_what_a_template_writes_before_each_reply_opens_the_answer_too():
    """GPT-OSS's replies are in a channel; without it the model writes its analysis first."""
    tokenizer = build_tokenizer(trl_template("gptoss"))
    query = make_pieces(tokenizer, PromptFormat(), CHUNKS, QUESTION, "Port Alder").query
    assert tokenizer.decode(query).endswith("<|start|>assistant<|channel|>final<|message|>")


@pytest.mark.parametrize("template", ["{{ bos_token }}hello", "{{ messages[0].content * 2 }}"])
def test_template_that_does_not_hold_user_text_is_refused(template):
    with pytest.raises(
        ValueError, match="no chat template that renders a user turn with text in it exactly once"
    ):
        make_pieces(build_tokenizer(template), PromptFormat(), CHUNKS, QUESTION)


def test_threads_over_one_tokenizer_read_every_text_their_own_way(tokenizer):
    """One thread's chunks keep special tokens as text while another's template means them."""
    fmt, special = PromptFormat(), tokenizer.eos_token

    def read(with_tokenizer, number):
        text = f"Passage {number} says {special} and goes on."  # never read before, so not recalled
        return make_pieces(with_tokenizer, fmt, [Chunk(text)], f"Who is number {number}?")

    alone = copy.deepcopy(tokenizer)
    expected = [read(alone, number) for number in range(400)]
    assert not any(tokenizer.eos_token_id in pieces.chunks[0] for pieces in expected)
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(partial(read, tokenizer), range(400))) == expected


def test_a_tokenizer_that_puts_the_space_itself_gets_none():
    """Llama 2's writes one before every text; another would be a token that no answer has."""
    words = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -9.0), ("▁a", -1.0), ("▁Paris", -1.0)]
    bare = Tokenizer(models.Unigram(words, unk_id=0))
    bare.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
    ids = answer_ids(tokenizer, "Paris")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁Paris", "</s>"]
