"""Pre-training of the tiny model: tokenizer, training sequences, optimiser, and what is shipped."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocktune.data.worlds import WorldConfig, draw_context, generate_examples
from blocktune.prompt import PromptFormat, make_pieces
from examples.tiny_model import loop
from examples.tiny_model.config import PretrainConfig, Stage
from examples.tiny_model.contexts import Lessons, given_ids, loader, turns
from examples.tiny_model.loop import go_on, pretrain
from examples.tiny_model.measure import correct
from examples.tiny_model.model import new_model
from examples.tiny_model.muon import orthogonal
from examples.tiny_model.tokenizer import train_tokenizer, world_texts

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "tiny"
SMALL = PretrainConfig(
    layers=1,
    width=16,
    ffn=16,
    heads=2,
    kv_heads=1,
    stages=(Stage(5, 2, 300), Stage(5, 2, 300, falls=True)),
    rows_per_step=600,
    micro_rows=400,
    eval_every=10,
    eval_examples=2,
    workers=1,
)


@pytest.fixture(autouse=True)
def few_worlds(monkeypatch):
    """The tokenizer of a run reads 300 worlds instead of 8,000."""
    monkeypatch.setattr(loop, "world_texts", partial(world_texts, num_worlds=300))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(world_texts(PromptFormat(), seed=0, aliased=0.1, num_worlds=300), 1280)


@pytest.mark.parametrize("text", ["Anna Ellis was born in Port Ross.", "naïve — 東京 🙂\n\t x  y"])
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_writes_bos_once_and_opens_the_assistants_turn(tokenizer):
    turn = [{"role": "user", "content": " Who? "}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|> Who? <|assistant|>"


def test_a_training_conversation_opens_with_the_pieces_that_serving_makes(tokenizer):
    context = draw_context(Random(3), WorldConfig(), 2)
    texts = [text for text, _ in turns(context, PromptFormat())]
    chunks, first = context.chunks, context.questions[0]
    pieces = make_pieces(tokenizer, PromptFormat(), chunks, first.question, first.response)
    served = [pieces.prefix, *pieces.chunks, pieces.query, pieces.answer]
    trained = [tuple(tokenizer(text)["input_ids"]) for text in texts[: len(served)]]
    assert trained == served


def test_answers_weigh_more_and_padding_nothing(tokenizer):
    for batch in Lessons(SMALL, tokenizer)[0]:
        assert set(batch.weights.unique().tolist()) <= {0.0, 1.0, SMALL.answer_weight}
        assert torch.equal(batch.weights == 0, batch.ids == tokenizer.pad_token_id)


def test_lessons_are_the_same_whoever_draws_them_and_on_a_gpu_of_one_shape(tokenizer):
    config = replace(SMALL, stages=(Stage(2, 2, 200, plain=True), Stage(5, 2, 300)))
    alone = list(loader(Lessons(config, tokenizer), range(4)))
    ahead = list(loader(Lessons(replace(config, readers=2), tokenizer), range(4)))
    on_gpu = Lessons(replace(config, device="cuda", workers=1), tokenizer)
    assert len(alone) == 4
    for step, (mine, other) in enumerate(zip(alone, ahead, strict=True)):
        for one, two in zip(mine, other, strict=True):
            assert torch.equal(one.ids, two.ids)
        (fixed,) = on_gpu[step]
        length = config.stage(step).length
        assert fixed.ids.shape == (600 // length, length)
        assert torch.equal(fixed.weights == 0, fixed.ids == tokenizer.pad_token_id)


def test_a_batch_of_orthogonal_updates_is_each_alone():
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    each = torch.stack([orthogonal(matrix) for matrix in matrices])
    assert torch.allclose(orthogonal(matrices), each, atol=1e-5)


def test_an_orthogonal_update_has_singular_values_near_one():
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_word_starts_out_alike_with_and_without_its_space(tokenizer):
    rows = new_model(SMALL, tokenizer).get_input_embeddings().weight
    vocabulary = tokenizer.get_vocab()
    assert torch.equal(rows[vocabulary["Port"]], rows[vocabulary["ĠPort"]])


def test_the_same_seed_makes_the_same_model(tmp_path, monkeypatch):
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)  # which imports torch every time
    config = replace(SMALL, workers=2, stages=SMALL.stages[1:])
    for name in ("one", "two"):
        pretrain(config, tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "two"))
    for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    steps = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").open()]
    assert steps[0]["config"]["seed"] == 0
    assert steps[-1]["step"] == 2


def test_one_can_go_on_from_a_segments_end_and_from_nowhere_else(tmp_path):
    pretrain(replace(SMALL, stages=SMALL.stages[:1]), tmp_path)
    start = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ends = []
    for _ in range(2):
        go_on(SMALL, tmp_path)
        ends.append((tmp_path / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="has step 4; a run can continue only from steps 3, 6"):
            go_on(replace(SMALL, stages=(Stage(5, 3, 300), Stage(5, 3, 300, falls=True))), tmp_path)
        for name, content in start.items():
            (tmp_path / name).write_bytes(content)
    assert ends[0] == ends[1] != start["model.safetensors"]


def test_one_cannot_go_on_with_other_settings(tmp_path):
    pretrain(replace(SMALL, stages=SMALL.stages[:1]), tmp_path)
    with pytest.raises(ValueError, match="started with seed = 0, not 1; continue with the same"):
        go_on(replace(SMALL, seed=1), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"device": "cuda", "workers": 2}, "set workers to 1, not 2"),
        ({"rows_per_step": 100, "workers": 2}, "does not fit into 100 rows per step of 2"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **values)


def test_steps_that_a_stage_left_out_are_not_counted():
    config = replace(SMALL, stages=(Stage(2, 800, 200), Stage(5, 500, 300)))
    assert config.taken([50, 300, 850, 900]) == [50, 300, 350, 400]


def test_a_stage_is_over_when_its_accuracy_is_reached(tmp_path):
    stages = Stage(5, 40, 300, until=0.0), Stage(5, 2, 300), Stage(5, 1, 300, falls=True)
    pretrain(replace(SMALL, stages=stages, eval_every=1), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [entry["step"] for entry in log[1:]] == [1, 41, 42, 43]


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(tmp_path):
    with pytest.raises(Exception, match=r"loss is nan at step \d of .*; start again with another"):
        pretrain(replace(SMALL, adam_lr=float("inf")), tmp_path)


def test_embeddings_have_a_fixed_size_whatever_the_tokenizer_holds(tokenizer):
    model = new_model(SMALL, tokenizer)
    assert len(tokenizer) < model.get_input_embeddings().num_embeddings == SMALL.vocab_size


def test_rates_rise_stay_fall_and_rise_again():
    steady, falling = Stage(5, 50, 300), Stage(5, 100, 300, falls=True)
    config = replace(SMALL, stages=(steady, steady, falling, steady), warmup=10, final_lr=0.1)
    assert config.segments == [range(100), range(100, 200), range(200, 250)]
    rates = [config.rate(step) for step in range(config.total_steps)]
    assert rates[:10] == sorted(rates[:10])
    assert set(rates[10:100]) == {1.0}
    assert rates[110:200] == sorted(rates[110:200], reverse=True)
    assert 0.1 <= rates[199] < 0.12
    assert rates[200:210] == rates[:10]


def test_accuracy_counts_only_what_must_be_found(tokenizer):
    given = {tokenizer.decode([i]).strip() for i in given_ids(tokenizer)}
    assert given == {"Answer", ":", ",", ".", "</s>"}


def test_the_shipped_model_is_small_and_its_numbers_can_be_made_again():
    """A sample of the shipped table: within four standard errors of what the file says."""
    files = [file for file in SHIPPED.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    numbers = json.loads((SHIPPED / "numbers.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    kind = "cross-chunk"
    config = WorldConfig(split="test", seed=11, num_examples=60, kinds={kind: 1.0})
    right = correct(model, tokenizer, list(generate_examples(config)), "full")
    stated = numbers["em"]["full"][kind]["em"]
    # The constant: a share of nearly all or nothing is not known to be exactly that.
    spread = 4 * ((stated * (1 - stated) + 0.01) / len(right)) ** 0.5
    assert abs(sum(right) / len(right) - stated) < spread
