"""What reuse leaves in the cache: zero where nothing differs, by hand where it can be."""

import copy

import pytest
import torch
from engine.served import ASK, engine_of
from families import FAMILIES
from page_figures import draw_cumulative, draw_deviation, draw_overlap
from states import (
    Deviation,
    attention_entropy,
    beginnings_of,
    by_layer,
    choice_of,
    chosen_tokens,
    cumulative_of,
    deviation,
    overlap_of,
    states_of,
)
from transformers import AutoModelForCausalLM

from blocktune.data import RagExample
from blocktune.layout import Kind
from blocktune.methods import build
from blocktune.prompt import PromptFormat

EXAMPLE = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",))


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def test_deviation_is_zero_for_the_first_chunk_and_where_all_is_fresh(engine):
    away = deviation(engine, EXAMPLE, "naive", "full-prefill")
    layers, tokens = away.values.shape
    assert layers == 2
    assert away.keys.shape == (layers, tokens)
    assert away.keys[0].abs().max() < 1e-4  # the first layer's keys know no context
    later = away.chunk > 0
    assert away.keys[1][later].min() > 1e-3
    fresh = deviation(engine, EXAMPLE, build("cacheblend", ratio=1.0), "full-prefill")
    assert max(fresh.keys.max(), fresh.values.max()) < 1e-4


def test_states_are_read_in_prompt_order(engine):
    states = states_of(engine.prefilled([EXAMPLE], "naive"))
    assert states.chunk.tolist() == sorted(states.chunk.tolist())
    assert states.position.tolist() == sorted(states.position.tolist())
    assert set(states.chunk.tolist()) == {0, 1, 2}


def test_entropy_is_that_of_the_weights_of_a_dense_forward(engine):
    run = engine.prefilled([EXAMPLE], "full-prefill")
    found = attention_entropy(run)
    ids, rows = run.batch.input_ids, run.batch.layout.kind[0] == Kind.QUERY
    config = copy.deepcopy(engine.model.config)  # from_config sets its attention
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(engine.model.state_dict())
    with torch.no_grad():
        weights = stock(ids, output_attentions=True, use_cache=False).attentions
    expected = torch.stack(
        [-(w[0][:, rows] * w[0][:, rows].clamp(min=1e-30).log()).sum(-1).mean() for w in weights]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_choices_and_their_overlap_are_worked_by_hand(tmp_path):
    keys = torch.tensor([[0.0, 0, 0, 1e-6], [4, 1, 2, 0], [0, 3, 4, 1]])
    away = Deviation(keys, keys, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 9, 0, 9]))
    chosen = chosen_tokens(away, 0.5)
    assert not chosen.top[0].any()
    assert chosen.top[1:].tolist() == [[True, False, True, False], [False, True, True, False]]
    assert overlap_of(chosen).tolist() == [[0, 0, 0], [0, 1, 0.5], [0, 0.5, 1]]
    assert beginnings_of(chosen).tolist() == [0, 1, 0.5]
    assert cumulative_of(chosen.deviation)[1:].tolist() == [[4, 6, 7, 7], [4, 7, 8, 8]]
    said = choice_of(away, 0.5)
    assert (said["first_share"], said["constant"]) == (0.5, 0.5)  # the third token, of two
    assert said["accrued"][1:] == [6 / 7, 7 / 8]
    draw_deviation(chosen, tmp_path / "d.png", "d")
    draw_overlap(overlap_of(chosen), tmp_path / "o.png", "o")
    draw_cumulative({"naive": chosen.deviation}, tmp_path / "c.png", 1, "c")
    assert len(list(tmp_path.iterdir())) == 3


def test_moved_chunks_and_wrong_shares_are_refused(engine):
    away = deviation(engine, EXAMPLE, "naive", "full-prefill")
    with pytest.raises(ValueError, match="ratio must be a share"):
        chosen_tokens(away, 0)
    with pytest.raises(ValueError, match="other positions than full prefill"):
        chosen_tokens(away._replace(keys=None), 0.1)
    with pytest.raises(ValueError, match="keeps 0 context tokens"):
        deviation(engine, EXAMPLE, "no-context", "full-prefill")


def test_the_tag_of_a_mode_is_no_deviation(engine):
    """Full prefill reads the tag that the method reads, so that chunks stand where its own do."""
    one_tag = engine.reworded(PromptFormat(block_tag="[Block]"))
    both = engine.reworded(PromptFormat(block_tag="[Block]", full_tag="[Block]"))
    found = by_layer(one_tag, EXAMPLE, build("naive"))
    assert found == by_layer(both, EXAMPLE, build("naive"))
    assert len(found["values"]) == len(found["entropy"]) == 2
    assert by_layer(engine, EXAMPLE, build("full-prefill")) == {}
