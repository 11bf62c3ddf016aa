"""Checks on a given model or adapter that chunk reuse is sound, and what all checks share.

What the tests prove for small random models need not hold for a new architecture, a custom kernel
or a converted checkpoint. So the same equivalences are checked on the user's model, with its own
tokenizer and template, before it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.adapter import PEFT_FILE, AdapterInfo, scope_of
from blocktune.adapter.load import load_model
from blocktune.attention import DensePlan, SplitPlan, planned_forward
from blocktune.cache import ChunkStore
from blocktune.engine import Engine, Sampling
from blocktune.engine.generation import Generation
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.methods import Method, build
from blocktune.models.load import adapter_folder
from blocktune.models.quantize import quantization_of
from blocktune.prompt import Batch, Chunk, LayoutSpec, make_pieces, stack


@dataclass(frozen=True)
class Ask:
    """A question over chunks; the `Request` of an engine."""

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
"""`ASK` with another last chunk of the same length in bytes, which are tokens of `small_engine`."""
HISTORY = (
    Ask("Who was she?", (ASK.chunks[1], ASK.chunks[2], ASK.chunks[0])),
    Ask("Where?", (*SHORT.chunks[::-1], *LAST.chunks[2:])),
)
"""Earlier prompts, for methods that need them: all chunks of the others, in other contexts, none
of them twice."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference of logits, as a share of the largest logit. Float32 rounding stays
well below 1e-5 here, and a wrong mask moves logits by more than 1e-2; bfloat16 keeps 8 bits."""
INT8_TOLERANCE = 2e-2
"""The same on an 8-bit base of any dtype: LLM.int8() rounds activations to 8 bits, except columns
chosen over all rows of a pass, so a chunk alone is rounded differently than among others (by 0.005
of the largest logit on small models). 4-bit bases round only weights, once."""


@dataclass(frozen=True)
class Check:
    """The outcome of one claim.

    ``tolerance`` is the largest accepted difference; where it is claimed that checks can fail, the
    smallest.
    """

    name: str  # the claim
    passed: bool
    max_abs_diff: float  # of logits
    tolerance: float


def tolerance_of(engine: Engine, logits: Tensor) -> float:
    """Largest accepted difference from ``logits``, at the engine's precision."""
    is_int8 = quantization_of(engine.model) == "int8"
    share = INT8_TOLERANCE if is_int8 else RELATIVE_TOLERANCE[engine.model.dtype]
    return share * max(1.0, float(logits.float().abs().max()))


def difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference."""
    return float((left.float() - right.float()).abs().max())


POSITIONS = 256
"""The tolerance holds up to here; the error of float32 angles grows with the position."""
RowChange = Callable[[Tensor, Layout], tuple[Tensor, Layout]]


class ServedRequest(NamedTuple):
    """A request after its prefill."""

    logits: Tensor  # after the prompt, (V,)
    states: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, (1, K, N, D) each
    computed: tuple[tuple[int, ...], ...]  # columns of the chunk tokens that each pass computed
    question_start: int  # column
    last_chunk_start: int  # column; that of the question without a chunk


@dataclass(frozen=True)
class Subject:
    """A method on an engine with the weights that it needs."""

    method: Method
    engine: Engine
    bare: Engine  # another one, whose prompts have nothing before the first chunk
    # What was served from empty caches so far: claims, and methods that differ in one axis only,
    # ask for the same. Subjects on one engine may share it.
    known: dict[Any, Any] = field(default_factory=dict)

    def begin(self, history: Sequence[Ask] = HISTORY) -> Engine:
        """The engine with empty caches, or with the history that the method needs."""
        return begun(self.engine, self.method, history)

    def run(self, method: Method, ask: Ask = ASK, answer: tuple[int, ...] = ()) -> Generation:
        """A request up to its first logits, or those after an ``answer`` given beforehand."""
        self.begin()
        pieces = self.engine.prompts.pieces(ask, method)._replace(answer=answer)
        return self.engine.start([pieces], method)

    def serve(self, method: Method, ask: Ask = ASK) -> ServedRequest:
        """A request, or what is known of it."""
        key = facts_served(method), ask
        if key not in self.known:
            self.known[key] = _served(self.run(method, ask))
        return self.known[key]

    def logits(self, method: Method) -> Tensor:
        """``(V,)`` after the prompt of `ASK`."""
        return self.serve(method).logits

    def dense_logits(self, method: Method, rows: RowChange | None = None) -> Tensor:
        """``(V,)`` after the prompt of `ASK`, in one forward under the dense mask of its layout.

        ``rows`` changes ids and layout first, such as `all_visible`; the prompt's own rows must
        come first.
        """
        key = facts_served(method), rows
        if key not in self.known:
            engine = self.begin()
            batch = batch_of(engine, method)
            ids, layout = batch.input_ids, batch.layout
            if rows is not None:
                ids, layout = rows(ids, layout)
            last = int(layout.is_fresh.logical_not().sum()) - 1
            self.known[key] = forward_dense(engine, ids, layout)[0, last]
        return self.known[key]


def facts_served(method: Method) -> tuple:
    """What an engine reads of a method: two that agree in it are served alike."""
    choices = method.layout(LayoutSpec()), method.select(), method.repair(), method.reshape()
    choices += (method.history,)
    kept = method.weights, method.cached, method.keeps_context, method.layer_budget
    own_loader = method.loader(ChunkStore(), "") is not None and method.name
    return repr(choices), kept, own_loader


def _served(run: Generation) -> ServedRequest:
    layout = run.batch.layout
    question = int(layout.order[layout.kind == Kind.QUERY].min())
    last = layout.is_context & (layout.chunk == layout.chunk.max())
    return ServedRequest(
        run.prefill.logits[0],
        tuple((layer.keys, layer.values) for layer in run.cache.layers),
        computed_columns(run),
        question,
        int(layout.order[last].min()) if bool(last.any()) else question,
    )


def begun(engine: Engine, method: Method, history: Sequence[Ask] = HISTORY) -> Engine:
    """The engine with empty caches; if the method has a history, as ``history`` leaves them."""
    engine.forget()
    if method.history is not None:
        for ask in history:
            next(engine.prefilled([ask], method).tokens(Sampling(), 1))
    return engine


def computed_columns(run: Generation) -> tuple[tuple[int, ...], ...]:
    """Columns of the first prompt's chunk tokens that each pass computed."""
    rows = [plan.query.map(lambda field: field[0]) for plan in run.prefill.plans]
    return tuple(tuple(one.order[one.kind == Kind.CHUNK].tolist()) for one in rows)


def batch_of(engine: Engine, method: Method, ask: Ask = ASK) -> Batch:
    """The prompt of a request, laid out as the engine serves it."""
    prompt = engine.lay_out(engine.prompts.pieces(ask, method), method)
    return stack([prompt], pad_id=0).to(engine.model.device)


def forward_dense(engine: Engine, ids: Tensor, layout: Layout, plan=DensePlan) -> Tensor:
    """Logits ``(1, S, V)`` of one forward under the dense mask, or by another kind of plan."""
    return planned_forward(engine.model, ids, layout.position, plan(layout)).logits


def all_visible(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The same rows in full attention: nothing is hidden, each row sees all before it."""
    kept = layout.kind[0] != Kind.BLANK
    layout = layout.map(lambda field: field[:, kept])
    return ids[:, kept], replace(layout, group=torch.full_like(layout.group, GLOBAL))


def all_fresh(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """Every chunk token a second time: it sees all before it and is seen instead of the first.

    The learned tokens around a chunk keep the one row that they are stored with.
    """
    rows = layout.is_context[0].nonzero().squeeze(1)
    again = layout.map(lambda field: field[:, rows])
    again = replace(
        again, group=torch.full_like(again.group, GLOBAL), supersedes=rows.expand_as(again.kind)
    )
    both = torch.cat([layout.pack(), again.pack()], dim=1)
    return torch.cat([ids, ids[:, rows]], dim=1), Layout.unpack(both)


def reach(engine: Engine, method: Method, ask: Ask) -> float:
    """Factor of the tolerance for the largest position of a prompt."""
    prompt = engine.prompts.prompt(engine.prompts.pieces(ask, method), engine.prompts.spec(method))
    return max(1.0, int(prompt.layout.position.max()) / POSITIONS)


def check_model(engine: Engine) -> list[Check]:
    """Runs all checks of a model, with its adapter if it has one; the engine's caches are used."""
    with torch.no_grad():
        return list(_checks(engine))


def _checks(engine: Engine) -> Iterator[Check]:
    seen: list[float] = []
    full = engine.next_logits([ASK], "full-prefill")
    tolerance = tolerance_of(engine, full)

    def close(name: str, left: Tensor, right: Tensor) -> Check:
        moved = difference(left, right)
        seen.append(moved)
        return Check(name, moved <= tolerance, moved, tolerance)

    plain = _plain(engine)
    block = batch_of(engine, plain)
    hidden_rows = forward_dense(engine, block.input_ids, block.layout)
    visible_rows = forward_dense(engine, *all_visible(block.input_ids, block.layout))
    dense, visible = hidden_rows[:, -1], visible_rows[:, -1]
    whole = batch_of(engine, build("full-prefill"))
    assert bool((whole.layout.group == GLOBAL).all())
    stock = engine.model(whole.input_ids, use_cache=False).logits[:, -1]
    yield close("full prefill = stock attention", full, stock)
    if scope_of(engine.model) == "encode":
        with engine.model.disable_adapter():
            moved = difference(stock, engine.model(whole.input_ids, use_cache=False).logits[:, -1])
        yield Check("full attention = the base, bit for bit", moved == 0, moved, 0.0)
    split = forward_dense(engine, block.input_ids, block.layout, SplitPlan)
    yield close("split = dense mask", split[:, -1], dense)
    yield close("cached chunks = dense mask", engine.next_logits([ASK], plain), dense)
    spec = engine.prompts.spec(plain)
    # A chunk with nothing before it is not recomputed: what a writer made of it stays.
    stays = scope_of(engine.model) != "both" and not bool((block.layout.kind == Kind.PREFIX).any())
    if not spec.num_learned and not stays:  # fresh tokens are not all that a question sees
        # Elsewhere chunks share positions; and a tag of the mode is another prompt.
        fmt = engine.format
        in_place = spec.placement == "sequential" and fmt.block_tag == fmt.full_tag
        same = full if in_place else visible
        told = "full prefill" if in_place else "full attention at the same positions"
        methods = [build("epic", k=1 << 20), build("cacheblend", ratio=1.0)]
        for method in methods[: engine.prompts.num_layers]:  # CacheBlend checks the second layer
            fresh = engine.next_logits([ASK], method)
            name = "all tokens fresh" if method.name == "epic" else "ratio 1"
            yield close(f"{name} = {told}", fresh, same)
    asks = [ASK, ALONE, SHORT]
    single = torch.cat([engine.next_logits([ask], plain) for ask in asks])
    yield close("batch = single", engine.next_logits(asks, plain), single)
    ids, after = engine.continued_logits(ASK, "full-prefill", num_tokens=2)
    longer = torch.cat([whole.input_ids, whole.input_ids.new_tensor([ids])], dim=1)
    again = engine.model(longer, use_cache=False).logits[:, -1]
    yield close("decoding = one forward", after, again)
    # In all rows: a window may keep the question's from reaching any chunk.
    kept = block.layout.kind[0] != Kind.BLANK
    moved = difference(hidden_rows[:, kept], visible_rows)
    # In half precision and int8, rounding is closer to the effect of a hidden chunk.
    exact = engine.model.dtype == torch.float32 and quantization_of(engine.model) != "int8"
    wanted = (10 if exact else 3) * max(seen)
    yield Check("hiding chunks from each other is seen", moved >= wanted, moved, wanted)


def _plain(engine: Engine) -> Method:
    """Reuse without recomputation, in the form that the engine's weights were trained for."""
    trained = engine.prompts.trained
    if trained is None or not trained.num_learned:
        return build("naive")
    return build("kvlink" if trained.num_links else "kv-packet")


@torch.no_grad()
def check_adapter(model: str | None, adapter: str | Path, **how: Any) -> list[Check]:
    """Runs `check_model`, and compares full prefill with stock PEFT, unmerged.

    Base (None: the adapter's own) and adapter are loaded twice, one after the other. ``how`` are
    ``dtype``, ``device`` and ``quantize``.
    """
    folder = adapter_folder(adapter)
    stock = _stock_logits(model, folder, how) if (folder / PEFT_FILE).is_file() else None
    engine = Engine.from_pretrained(model, folder, **how)
    checks = check_model(engine)
    if stock is None:
        return checks
    engine.forget()
    served = engine.next_logits([ASK], "full-prefill").cpu()
    moved, tolerance = difference(served, stock), tolerance_of(engine, stock)
    return [Check("full prefill = stock PEFT", moved <= tolerance, moved, tolerance), *checks]


def _stock_logits(model: str | None, folder: Path, how: dict[str, Any]) -> Tensor:
    """``(1, V)`` after the prompt of `ASK` in full attention."""
    fmt = AdapterInfo.load(folder).format
    peft, tokenizer, _, _ = load_model(model, folder, merge=False, **how)
    pieces = make_pieces(tokenizer, fmt, ASK.chunks, ASK.question, block=False)
    ids = [*pieces.prefix, *(token for chunk in pieces.chunks for token in chunk), *pieces.query]
    rows = torch.tensor([ids], device=peft.device)
    return peft(rows, use_cache=False).logits[:, -1].float().cpu()
