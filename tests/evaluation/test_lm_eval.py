"""The harness's requests, in both modes, against stock forwards and against serving."""

from types import SimpleNamespace

import pytest
import torch
from engine.served import engine_of
from families import FAMILIES
from lm_eval.api.registry import get_model

from blocktune.evaluation.fidelity import forced_logits
from blocktune.evaluation.lm_eval_backend import BlocktuneLM

SHOTS = "Question: Who?\nAnswer: Anna\n\nQuestion: Where?\nAnswer: Kirby\n\n"
CONTEXT = SHOTS + "Question: When?\nAnswer:"


@pytest.fixture(scope="module")
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def ask(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def stock_score(engine, pieces) -> tuple[float, bool]:
    before = [*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query]
    ids = torch.tensor([[*before, *pieces.answer]])
    with torch.no_grad():
        log = engine.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    rows = range(len(before) - 1, ids.shape[1] - 1)
    picked = [log[row, token].item() for row, token in zip(rows, pieces.answer, strict=True)]
    greedy = all(
        int(log[row].argmax()) == token for row, token in zip(rows, pieces.answer, strict=True)
    )
    return sum(picked), greedy


def test_full_mode_scores_as_a_stock_forward_does(engine):
    model = BlocktuneLM(engine=engine, mode="full", batch_size=2)
    pairs = [(CONTEXT, " in 1966"), ("When?", " now"), ("", "Anna Belt")]
    scored = model.loglikelihood(ask(*pairs))
    for (value, greedy), pair in zip(scored, pairs, strict=True):
        expected, is_greedy = stock_score(engine, model.pieces(*pair))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


def test_block_mode_scores_as_serving_from_chunk_caches_does(engine):
    block = BlocktuneLM(engine=engine, mode="block")
    pieces = block.pieces(CONTEXT, " in 1966")
    assert len(pieces.chunks) == 2
    [(value, _)] = block.loglikelihood(ask((CONTEXT, " in 1966")))
    run = engine.start([pieces._replace(answer=())], "naive")
    _, logits = forced_logits(run, 0, list(pieces.answer))
    wanted = torch.tensor(pieces.answer)[:, None]
    served = logits.log_softmax(-1).gather(1, wanted).sum().item()
    assert value == pytest.approx(served, abs=1e-3)
    [(full, _)] = BlocktuneLM(engine=engine, mode="full").loglikelihood(ask((CONTEXT, " in 1966")))
    assert abs(full - value) > 1e-2


def test_without_parts_both_modes_agree(engine):
    request = ask(("Question: When?", " in 1966"))
    block, full = (BlocktuneLM(engine=engine, mode=mode) for mode in ("block", "full"))
    assert block.loglikelihood(request)[0][0] == pytest.approx(
        full.loglikelihood(request)[0][0], abs=1e-4
    )


def test_both_modes_read_the_same_tokens_with_one_bos(engine):
    block, full = (BlocktuneLM(engine=engine, mode=mode) for mode in ("block", "full"))
    pieces = block.pieces(CONTEXT, " x")
    assert pieces == full.pieces(CONTEXT, " x")
    assert pieces.prefix == (engine.tokenizer.bos_token_id,)
    spaced = block.pieces("When? ", "now")
    assert spaced.answer == block.pieces("When?", " now").answer


@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_separator_at_the_end_belongs_to_the_query(engine, mode):
    """The turn that Llama's chat template opens ends with two line breaks."""
    pieces = BlocktuneLM(engine=engine, mode=mode).pieces(CONTEXT + "\n\n")
    assert engine.tokenizer.decode(pieces.query) == "Question: When?\nAnswer:\n\n"
    assert len(pieces.chunks) == 2
    assert pieces.prefix == (engine.tokenizer.bos_token_id,)


def test_whole_texts_are_scored_in_windows(engine):
    model = BlocktuneLM(engine=engine, mode="block")
    text = "Anna Belt was born in Port Alder."
    ids = tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])
    [value] = model.loglikelihood_rolling(ask((text,)))
    pieces = model.pieces("", text)
    assert pieces.answer == ids
    assert value == pytest.approx(stock_score(engine, pieces)[0], abs=1e-4)


def test_generation_ends_at_the_tasks_stop_string(engine):
    model = BlocktuneLM(engine=engine, mode="block", max_gen_toks=6)
    [whole] = model.generate_until(ask((CONTEXT, {"until": []})))
    assert whole
    stop = whole[len(whole) // 2]
    [cut] = model.generate_until(ask((CONTEXT, {"until": [stop]})))
    assert cut == whole.partition(stop)[0]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_the_length_of_a_generation_has_the_harnesss_names(engine, name):
    model = BlocktuneLM(engine=engine, max_gen_toks=6)
    whole, cut = model.generate_until(ask((CONTEXT, {}), (CONTEXT, {name: 2})))
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_an_automatic_batch_size_is_a_fixed_one(engine):
    assert BlocktuneLM(engine=engine, batch_size="auto:4").batch_size == 8
    assert BlocktuneLM(engine=engine, batch_size="3").batch_size == 3


def test_wrong_modes_and_sampling_are_refused(engine):
    with pytest.raises(ValueError, match="mode must be one of block, full, got 'dense'"):
        BlocktuneLM(engine=engine, mode="dense")
    model = BlocktuneLM(engine=engine)
    for sampled in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="generates greedily"):
            model.generate_until(ask(("x", sampled)))


def test_a_misspelt_argument_is_refused(engine):
    """Without ``adapter`` the base model would be scored in its place."""
    with pytest.raises(ValueError, match="unknown model argument 'adaptor'; known: pretrained, ad"):
        BlocktuneLM(engine=engine, adaptor="out/kvlink")
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1, got 0"):
        BlocktuneLM(engine=engine, batch_size=0)
    BlocktuneLM(engine=engine, max_batch_size=64, trust_remote_code=True)


def test_the_harness_knows_the_backend():
    assert get_model("blocktune") is BlocktuneLM
