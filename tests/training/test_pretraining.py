"""Pre-training of the tiny model: tokenizer, training sequences, optimiser, and what is shipped."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocktune.data.worlds import WorldConfig, draw_context, generate_examples
from blocktune.prompt import PromptFormat, make_pieces
from blocktune.training.pretraining.config import Curriculum, PretrainConfig, Stage
from blocktune.training.pretraining.contexts import ContextSource, given_ids, micro_batches, turns
from blocktune.training.pretraining.loop import anneal, pretrain
from blocktune.training.pretraining.measure import correct
from blocktune.training.pretraining.model import new_model
from blocktune.training.pretraining.muon import orthogonal
from blocktune.training.pretraining.tokenizer import train_tokenizer, world_texts

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "tiny"
SMALL = PretrainConfig(
    layers=1,
    width=16,
    ffn=16,
    heads=2,
    kv_heads=1,
    stages=(Stage(5, 2),),
    anneal_steps=2,
    tokens_per_step=200,
    eval_every=10,
    eval_examples=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(world_texts(PromptFormat(), seed=0, num_worlds=300), 1280)


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
    pieces = make_pieces(tokenizer, PromptFormat(), chunks, first.text, first.response)
    served = [pieces.prefix, *pieces.chunks, pieces.query, pieces.answer]
    trained = [tuple(tokenizer(text)["input_ids"]) for text in texts[: len(served)]]
    assert trained == served


def test_answers_weigh_more_and_padding_nothing(tokenizer):
    sequences = ContextSource(SMALL, tokenizer).draw(Stage(5, 1), 600)
    for batch in micro_batches(sequences, 400, tokenizer.pad_token_id):
        assert set(batch.weights.unique().tolist()) <= {0.0, 1.0, SMALL.answer_weight}
        assert torch.equal(batch.weights == 0, batch.ids == tokenizer.pad_token_id)


def test_a_stage_ends_when_it_is_learnt_or_used_up():
    curriculum = Curriculum((Stage(2, 100, until=0.5), Stage(4, 3, until=0.5), Stage(6, 1)))
    seen = []
    for accuracy in [1.0] * 7 + [0.0] * 4:
        seen.append(curriculum.stage.passages)
        curriculum.advance(accuracy)
    assert seen == [2] * 7 + [4] * 3 + [6]


def test_an_orthogonal_update_has_singular_values_near_one():
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_word_starts_out_alike_with_and_without_its_space(tokenizer):
    rows = new_model(SMALL, tokenizer).get_input_embeddings().weight
    vocabulary = tokenizer.get_vocab()
    assert torch.equal(rows[vocabulary["Port"]], rows[vocabulary["ĠPort"]])


def test_the_same_seed_makes_the_same_model(tmp_path):
    for name in ("one", "two"):
        pretrain(SMALL, tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "two"))
    for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    steps = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").open()]
    assert steps[0]["config"]["seed"] == 0
    assert steps[-1]["step"] == 4


def test_annealing_can_be_done_again_from_the_stages_weights_and_from_nothing_else(tmp_path):
    steady = replace(SMALL, anneal_steps=0)
    pretrain(steady, tmp_path)
    for _ in range(2):
        start = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        anneal(SMALL, tmp_path)
        ends = [(tmp_path / "model.safetensors").read_bytes()]
        assert ends[0] != start["model.safetensors"]
        with pytest.raises(ValueError, match="no model of step 2, where annealing starts"):
            anneal(SMALL, tmp_path)
        for name, content in start.items():
            (tmp_path / name).write_bytes(content)


def test_rates_rise_stay_and_fall():
    config = replace(SMALL, stages=(Stage(5, 100),), anneal_steps=100, warmup=10, final_lr=0.1)
    rates = [config.rate(step) for step in range(config.total_steps)]
    assert rates[:10] == sorted(rates[:10])
    assert set(rates[10:100]) == {1.0}
    assert rates[110:] == sorted(rates[110:], reverse=True)
    assert 0.1 <= rates[-1] < 0.12


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
    spread = 4 * (stated * (1 - stated) / len(right)) ** 0.5
    assert abs(sum(right) / len(right) - stated) < spread
