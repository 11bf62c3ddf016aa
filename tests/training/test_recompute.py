"""Training on fresh rows: the rows that are served, chosen as they are chosen in serving."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from engine.served import ASK, FORMAT
from families import FAMILIES
from families import build as build_model
from models.test_gate import FORMS
from peft import LoraConfig, get_peft_model
from training.runs import losses, make_trainer

from blocktune.adapter import AdapterInfo, scope_adapter
from blocktune.attention import make_plan
from blocktune.data.example import RagExample
from blocktune.engine import Engine
from blocktune.layout import FOREVER, Layout
from blocktune.links import install_links, new_links
from blocktune.methods import Method
from blocktune.methods.base import Weights
from blocktune.methods.select import SELECTORS, Nothing, Selection
from blocktune.prompt import IGNORED, LayoutSpec, Pieces, lay_out, stack
from blocktune.training.collator import BlockDataCollator
from blocktune.training.dataset import Sample, prepare
from blocktune.training.recompute import RecomputeSampler, narrowed, with_fresh_rows

SHARE = 0.3
CONFIGS = {**FAMILIES, "deepseek": FORMS["deepseek"][0]}  # caches latents, not keys
SAMPLERS = ("first-k", "random", "deviation")


@dataclass(frozen=True)
class Served(Method):
    """Any selector over the trained layout."""

    source: ClassVar[str] = "this test"
    weights: ClassVar[Weights] = Weights.LINKS
    chosen: Selection = field(default_factory=Nothing)

    def select(self) -> Selection:
        return self.chosen


def engine_with_links(family: str, tokenizer, scope: str | None = None) -> Engine:
    config = CONFIGS[family]()
    config.vocab_size = len(tokenizer)
    model = build_model(config)
    if scope:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        model = get_peft_model(model, lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        scope_adapter(model, scope)
    install_links(model, new_links(model, 2))
    spec = LayoutSpec(num_links=2)
    info = AdapterInfo("base", "", "", layout=spec, format=FORMAT, scope=scope or "both")
    return Engine(model, tokenizer, format=FORMAT, adapter=info)


def trained_rows(engine: Engine, sampler: RecomputeSampler):
    """What the trainer would run of `ASK`: ids, labels and the layout after the choice."""
    example = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",))
    spec, layers = engine.prompts.trained, engine.model.config.num_hidden_layers
    samples = [Sample(example, True)]
    record = prepare(
        samples, BlockDataCollator(engine.tokenizer, spec, FORMAT).reader, limit=500
    ).dataset[0]
    check = sampler.check_layer(layers)
    base = engine.prompts.link_base
    batch = BlockDataCollator(
        engine.tokenizer, spec, FORMAT, base, sampler=sampler, check_layer=check
    )([record])
    layout = Layout.unpack(batch["layout"])
    if check is not None:
        layout = narrowed(engine.model, batch, sampler, engine.state.rope, "split")
    return batch["input_ids"], batch["labels"], layout


def first_answer_logits(model, ids, labels, layout) -> torch.Tensor:
    before = int((labels[0] != -100).nonzero()[0]) - 1
    plan = make_plan("split", layout)
    with torch.no_grad():
        return model(ids, position_ids=layout.position, plan=plan, use_cache=False).logits[
            0, before
        ]


def served_selection(engine: Engine, name: str, layout: Layout) -> Selection:
    """The selector that serves what was trained: random ones share their seed."""
    selection = SELECTORS.build(name).with_budget(SHARE)
    if name != "random":
        return selection
    kept = layout.supersedes[0][layout.is_fresh[0]].tolist()

    @dataclass(frozen=True)
    class Drawn(Selection):
        def start(self, rows: Layout) -> torch.Tensor:
            mask = torch.zeros_like(rows.is_context)
            mask[0, kept] = True
            return mask

    return Drawn()


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        *((family, None) for family in ("llama", "qwen3", "gemma2", "deepseek")),
        *(("llama", scope) for scope in ("encode", "read")),
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_training_logits_match_the_served_ones(family, scope, name, tokenizer):
    """Under a scope, fresh rows and links are rows of the reader: they are made when answering."""
    engine = engine_with_links(family, tokenizer, scope)
    sampler = RecomputeSampler.named(name, SHARE, SHARE)
    ids, labels, layout = trained_rows(engine, sampler)
    chosen = served_selection(engine, name, layout)
    assert int((layout.is_fresh & (layout.until == FOREVER)).sum()) > 0
    trained = first_answer_logits(engine.model, ids, labels, layout)
    served = engine.next_logits([ASK], Served(chosen))[0]
    torch.testing.assert_close(trained, served, rtol=1e-5, atol=1e-5)
    # The same test must see that fresh rows are not there.
    until = layout.until.masked_fill(layout.is_fresh, 0)
    wrong = first_answer_logits(engine.model, ids, labels, replace(layout, until=until))
    assert (wrong - served).abs().max() > 1e-4


def test_the_share_is_drawn_between_its_bounds_for_each_example_and_epoch(tokenizer):
    engine = engine_with_links("llama", tokenizer)
    spec, sampler = engine.prompts.trained, RecomputeSampler.named("random", 0.1, 0.6)
    example = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",))
    samples = [Sample(example, True)] * 12
    dataset = prepare(samples, BlockDataCollator(tokenizer, spec, FORMAT).reader, limit=500).dataset

    def shares(epoch: int) -> list[float]:
        collator = BlockDataCollator(tokenizer, spec, link_base=500, sampler=sampler, epoch=epoch)
        layouts = [Layout.unpack(collator([record])["layout"]) for record in dataset]
        return [float(x.is_fresh.sum() / x.is_context.sum()) for x in layouts]

    first = shares(0)
    assert first == shares(0)
    assert first != shares(1)
    assert len(set(first)) > 6
    # Shares are rounded up, and the first chunk after a prefix counts as any other.
    assert 0.1 <= min(first) < 0.3 < 0.4 < max(first) <= 0.6 + 1 / 50


def test_full_examples_have_no_fresh_rows(tokenizer):
    engine = engine_with_links("llama", tokenizer)
    example = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",))
    spec = engine.prompts.trained
    read = BlockDataCollator(tokenizer, spec, FORMAT).reader
    record = prepare([Sample(example, False)], read, limit=500).dataset[0]
    sampler = RecomputeSampler.named("deviation", SHARE, SHARE)
    batch = BlockDataCollator(tokenizer, spec, link_base=500, sampler=sampler, check_layer=1)(
        [record]
    )
    assert not Layout.unpack(batch["layout"]).is_fresh.any()
    assert batch["shares"].tolist() == [[-1.0]]


def test_fresh_rows_come_last_supersede_and_are_never_learnt():
    prompt = lay_out(Pieces((1,), ((2, 3), (4,)), (5,), (6, 7)), LayoutSpec())
    fresh = with_fresh_rows(prompt, prompt.layout.is_context)
    assert fresh.ids == (*prompt.ids, 2, 3, 4)
    assert fresh.layout.supersedes[0, -3:].tolist() == [1, 2, 3]
    assert tuple(stack([fresh], 0).labels[0].tolist()) == (
        *tuple(stack([prompt], 0).labels[0].tolist()),
        IGNORED,
        IGNORED,
        IGNORED,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_trains_however_its_batches_are_cut(tmp_path, name):
    options = {"recompute": name, "recompute_min": 0.1, "recompute_max": 0.5, "num_links": 1}
    size, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    whole = make_trainer(tmp_path, **options, **{size: 8, steps: 1}, max_steps=2)
    whole.train()
    cut = make_trainer(tmp_path, **options, **{size: 2, steps: 4}, max_steps=2)
    cut.train()
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    plain = make_trainer(tmp_path, num_links=1, **{size: 8}, max_steps=2)
    plain.train()
    assert abs(losses(plain)[0] - losses(whole)[0]) > 1e-4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"recompute": "best"}, "must be one of first-k, random, deviation, got 'best'"),
        ({"recompute": "deviation check_layer"}, "KEY=VALUE pairs, got 'deviation check_layer'"),
        ({"recompute": "deviation layer=2"}, "takes ratio, check_layer, .* got unknown layer"),
        (
            {"recompute": "random", "recompute_min": 0.4, "recompute_max": 0.2},
            "recompute_min <= recompute_max must be",
        ),
        ({"recompute": "random", "block_share": 0.0}, "raise block_share"),
        ({"recompute": "gradual-deviation"}, "must be one of first-k, random, deviation"),
        ({"recompute": "deviation keeps_keys=true"}, "for serving only"),
        ({"recompute": "deviation ratio=0.3"}, "'ratio=0.3' has no effect; set recompute_min"),
        ({"recompute": "first-k k=5"}, "'k=5' has no effect; set recompute_min"),
        ({"recompute": "deviation check_layer=9"}, "at least 10 layers, this one has 2; lower"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        make_trainer(tmp_path, **options)


def test_a_selector_takes_its_parameters():
    text = "deviation check_layer=2 by=values"
    assert RecomputeSampler.named(text, 0.1, 0.2) == RecomputeSampler(
        SELECTORS.build("deviation", check_layer=2, by="values"), 0.1, 0.2
    )
