"""Checks that chunk reuse is correct on a given model or adapter, and helpers of all checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocktune.adapter import PEFT_FILE, AdapterInfo, scope_of
from blocktune.adapter.load import load_model
from blocktune.attention import DensePlan, SplitPlan, planned_forward
from blocktune.cache import ChunkStore
from blocktune.engine import Engine, Sampling
from blocktune.engine.generation import Generation
from blocktune.layout import GLOBAL, Kind, Layout, append_fresh
from blocktune.methods import Method, build, default_method
from blocktune.models.load import adapter_folder
from blocktune.models.quantize import quantization_of
from blocktune.prompt import Batch, Chunk, LayoutSpec, make_pieces, stack


@dataclass(frozen=True)
class Ask:
    """A question over chunks, as a `Request` for an engine."""

    question: str
    chunks: tuple[Chunk, ...]


ASK = Ask(
    "Who directed it?",
    (
        Chunk("Anna Belt was born in Port Alder.", "Anna Belt"),
        Chunk("She moved to Kirby."),
        Chunk("The film was directed by Noel Fisher.", "Frozen Shore"),
    ),
)
OTHER = Ask("And where was the music written?", ASK.chunks)
SHORT = Ask("Who?", (Chunk("It was shot in 1966."), Chunk("The company is in Lorne.")))
ALONE = Ask("Who directed it?", ASK.chunks[2:])
LAST = Ask(
    ASK.question, (*ASK.chunks[:2], Chunk("The song was written by Walter Green.", "Frozen Lorne"))
)
"""`ASK` with another last chunk of the same length in bytes (the tokens of `small_engine`)."""
HISTORY = (
    Ask("Who was she?", (ASK.chunks[1], ASK.chunks[2], ASK.chunks[0])),
    Ask("Where?", (*SHORT.chunks[::-1], *LAST.chunks[2:])),
)
"""Earlier prompts for methods that need them: each chunk of the requests above, once, elsewhere."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference of logits, relative to the largest logit. Rounding in float32 stays
well below 1e-5 here, a wrong mask changes logits by more than 1e-2; bfloat16 has 8 bits."""
INT8_TOLERANCE = 2e-2
"""For LLM.int8(), which rounds activations of a chunk differently among others (by 0.005)."""


@dataclass(frozen=True)
class Check:
    """The outcome of a check."""

    name: str  # what is claimed
    passed: bool
    max_abs_diff: float  # of logits
    tolerance: float  # largest accepted difference; the smallest if one is required


def tolerance_of(engine: Engine, logits: Tensor) -> float:
    """Largest accepted difference from ``logits`` for the precision of an engine."""
    is_int8 = quantization_of(engine.model) == "int8"
    share = INT8_TOLERANCE if is_int8 else RELATIVE_TOLERANCE[engine.model.dtype]
    return share * max(1.0, float(logits.float().abs().max()))


def difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference of two tensors."""
    return float((left.float() - right.float()).abs().max())


RowChange = Callable[[Tensor, Layout], tuple[Tensor, Layout]]


@dataclass(frozen=True)
class Subject:
    """A method under test, and an engine with suitable weights."""

    method: Method
    engine: Engine
    bare: Engine  # another engine, whose prompts have nothing before the first chunk
    # Results from empty caches so far; subjects on the same engine may share them.
    results: dict[Any, Any] = field(default_factory=dict)

    def begin(self, history: Sequence[Ask] = HISTORY) -> Engine:
        """The engine with empty caches, after it served ``history`` if the method needs one."""
        self.engine.forget()
        if self.method.history is not None:
            for ask in history:
                next(self.engine.prefilled([ask], self.method).tokens(Sampling(), 1))
        return self.engine

    def run(self, method: Method, ask: Ask = ASK, answer: tuple[int, ...] = ()) -> Generation:
        """Runs a request up to its first logits, which follow the ``answer`` if it is given."""
        self.begin()
        pieces = self.engine.prompts.pieces(ask, method)._replace(answer=answer)
        return self.engine.start([pieces], method)

    def serve(self, method: Method, ask: Ask = ASK) -> Generation:
        """The result of `run`, or of an earlier one; it must not be decoded."""
        key = facts_served(method), ask
        if key not in self.results:
            self.results[key] = self.run(method, ask)
        return self.results[key]

    def logits(self, method: Method, ask: Ask = ASK) -> Tensor:
        """Logits ``(V,)`` after the prompt of a request."""
        return self.serve(method, ask).prefill.logits[0]

    def dense_logits(self, method: Method, rows: RowChange | None = None) -> Tensor:
        """Logits ``(V,)`` after `ASK` from one pass with the dense mask, of changed ``rows``."""
        key = facts_served(method), rows
        if key not in self.results:
            batch = batch_of(self.begin(), method)
            ids, layout = batch.input_ids, batch.layout
            if rows is not None:
                ids, layout = rows(ids, layout)
            last = int(layout.is_fresh.logical_not().sum()) - 1
            self.results[key] = forward_dense(self.engine, ids, layout)[0, last]
        return self.results[key]


def facts_served(method: Method) -> tuple:
    """All properties of a method that an engine reads. Methods with equal ones are served alike."""
    choices = method.layout(LayoutSpec()), method.select(), method.repair(), method.reshape()
    properties = method.weights, method.cached, method.keeps_context, method.layer_budget
    own_loader = method.loader(ChunkStore(), "") is not None and method.name
    return repr((*choices, method.history)), properties, own_loader


def computed_columns(run: Generation) -> tuple[tuple[int, ...], ...]:
    """Columns of chunk tokens of the first prompt that each pass computed."""
    passes = [plan.query.map(lambda field: field[0]) for plan in run.prefill.plans]
    return tuple(tuple(rows.order[rows.kind == Kind.CHUNK].tolist()) for rows in passes)


def batch_of(engine: Engine, method: Method, ask: Ask = ASK) -> Batch:
    """The prompt of a request, laid out as the engine serves it."""
    prompt = engine.lay_out(engine.prompts.pieces(ask, method), method)
    return stack([prompt], pad_id=0).to(engine.model.device)


def forward_dense(engine: Engine, ids: Tensor, layout: Layout, plan=DensePlan) -> Tensor:
    """Logits ``(1, S, V)`` of one forward pass with the dense mask, or another kind of plan."""
    return planned_forward(engine.model, ids, layout.position, plan(layout)).logits


def all_visible(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The same rows in full attention: each row sees all rows before it."""
    kept = layout.kind[0] != Kind.BLANK
    layout = layout.map(lambda field: field[:, kept])
    return ids[:, kept], replace(layout, group=torch.full_like(layout.group, GLOBAL))


def all_fresh(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """Adds a fresh row, which sees all rows before it, for each token of a chunk's text."""
    rows = layout.is_context[0].nonzero().squeeze(1)
    return torch.cat([ids, ids[:, rows]], dim=1), append_fresh(layout, rows)


@torch.no_grad()
def check_model(engine: Engine) -> list[Check]:
    """Runs all checks of a model, with its adapter if it has one, on the engine and its caches."""
    checks: list[Check] = []
    full = engine.next_logits([ASK], "full-prefill")
    tolerance = tolerance_of(engine, full)

    def close(name: str, left: Tensor, right: Tensor) -> None:
        diff = difference(left, right)
        checks.append(Check(name, diff <= tolerance, diff, tolerance))

    plain = default_method(engine.prompts.trained)
    block = batch_of(engine, plain)
    hidden_rows = forward_dense(engine, block.input_ids, block.layout)
    visible_rows = forward_dense(engine, *all_visible(block.input_ids, block.layout))
    dense, visible = hidden_rows[:, -1], visible_rows[:, -1]
    ids = batch_of(engine, build("full-prefill")).input_ids
    stock = engine.model(ids, use_cache=False).logits[:, -1]
    close("full prefill = stock attention", full, stock)
    if scope_of(engine.model) == "encode":
        with engine.model.disable_adapter():
            diff = difference(stock, engine.model(ids, use_cache=False).logits[:, -1])
        checks.append(Check("full attention = its adapter switched off", diff == 0, diff, 0.0))
    split = forward_dense(engine, block.input_ids, block.layout, SplitPlan)[:, -1]
    close("split = dense mask", split, dense)
    close("cached chunks = dense mask", engine.next_logits([ASK], plain), dense)
    spec = engine.prompts.spec(plain)
    # The first chunk is not recomputed if nothing is before it; a writer's states then remain.
    stays = scope_of(engine.model) != "both" and not bool((block.layout.kind == Kind.PREFIX).any())
    if not spec.num_learned and not stays:  # else a question sees more than fresh tokens
        same, where = full, "full prefill"
        if spec.placement != "sequential" or engine.format.block_tag != engine.format.full_tag:
            # Chunks share positions, or a mode tag makes another prompt.
            same, where = visible, "full attention at the same positions"
        fresh = engine.next_logits([ASK], build("epic", k=1 << 20))
        close(f"all tokens fresh = {where}", fresh, same)
        if engine.prompts.num_layers > 1:  # CacheBlend checks the second layer
            fresh = engine.next_logits([ASK], build("cacheblend", ratio=1.0))
            close(f"ratio 1 = {where}", fresh, same)
    asks = [ASK, ALONE, SHORT]
    single = torch.cat([engine.next_logits([ask], plain) for ask in asks])
    close("batch = single", engine.next_logits(asks, plain), single)
    new, after = engine.continued_logits(ASK, "full-prefill", num_tokens=2)
    longer = torch.cat([ids, ids.new_tensor([new])], dim=1)
    again = engine.model(longer, use_cache=False).logits[:, -1]
    close("decoding = one forward", after, again)
    # Compares all rows, since the question's rows may see no chunk because of a window.
    kept = block.layout.kind[0] != Kind.BLANK
    diff = difference(hidden_rows[:, kept], visible_rows)
    # In half precision and int8, rounding errors are closer to the effect of a hidden chunk.
    exact = engine.model.dtype == torch.float32 and quantization_of(engine.model) != "int8"
    least = (10 if exact else 3) * max(check.max_abs_diff for check in checks)
    last = Check("hiding chunks from each other is seen", diff >= least, diff, least)
    return [*checks, last]


@torch.no_grad()
def check_adapter(model: str | None, adapter: str | Path, **options: Any) -> list[Check]:
    """Runs `check_model`, and compares full attention with stock PEFT, unmerged.

    A writer (scope ``encode``) must equal the base without the adapter, bit for bit. ``options``:
    ``dtype``, ``device`` and ``quantize``.
    """
    folder = adapter_folder(adapter)
    if not (folder / PEFT_FILE).is_file():
        return check_model(Engine.from_pretrained(model, folder, **options))
    info = AdapterInfo.load(folder)
    is_writer = info.scope == "encode"
    if is_writer:
        base, revision = (model, None) if model else (info.base_model, info.base_revision)
        stock = Engine.from_pretrained(base, revision=revision, **options)
        stock.tokenizer = info.tokenizer(folder, stock.tokenizer)
    else:
        stock = load_model(model, folder, merge=False, **options)
    wanted = _full_logits(stock, info)
    del stock
    engine = Engine.from_pretrained(model, folder, **options)
    checks = check_model(engine)
    if is_writer:
        diff, tolerance = difference(_full_logits(engine, info), wanted), 0.0
    else:
        engine.forget()
        served = engine.next_logits([ASK], "full-prefill").cpu()
        diff, tolerance = difference(served, wanted), tolerance_of(engine, wanted)
    name = "full attention = the base, bit for bit" if is_writer else "full prefill = stock PEFT"
    return [Check(name, diff <= tolerance, diff, tolerance), *checks]


def _full_logits(loaded: Any, info: AdapterInfo) -> Tensor:
    """Logits ``(1, V)`` after the prompt of `ASK` by one forward pass of ``loaded.model``."""
    pieces = make_pieces(loaded.tokenizer, info.format, ASK.chunks, ASK.question, block=False)
    rows = torch.tensor([pieces.context + pieces.query], device=loaded.model.device)
    return loaded.model(rows, use_cache=False).logits[:, -1].float().cpu()
