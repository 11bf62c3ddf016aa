"""Training mixtures: several sources, each with a weight, an attention mode and augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.answers import chunk_mentions, evidence
from blocktune.data.chunking import CHUNKERS, Chunker, parse_chunker
from blocktune.data.example import RagExample
from blocktune.data.sources.load import load_examples, training_split
from blocktune.parsing import entries, load_spec, mapping, read
from blocktune.prompt.format import Chunk, PromptFormat
from blocktune.registry import require_count, require_one_of

BLOCK, FULL, BOTH = "block", "full", "both"
MODES = {BLOCK: (BLOCK,), FULL: (FULL,), BOTH: (BLOCK, FULL)}
DRAWS = ("duplication", "sampling")


@dataclass(frozen=True)
class Augment:
    """How contexts are varied. Chunks with `evidence` are never dropped."""

    shuffle: bool = False  # put the chunks into a random order
    num_chunks: tuple[int, int] | None = None  # number of chunks, N or [low, high]; None: unchanged
    num_distractors: tuple[int, int] | None = None  # chunks without evidence; excludes num_chunks
    seed: int = 0  # example ``i`` of a source is always varied in the same way

    def __post_init__(self):
        for name, least in (("num_chunks", 1), ("num_distractors", 0)):
            if (value := getattr(self, name)) is not None:
                pair = [value] * 2 if type(value) is int else value
                valid = isinstance(pair, list | tuple) and [type(v) for v in pair] == [int, int]
                if not valid or not least <= pair[0] <= pair[1]:
                    raise ValueError(
                        f"augment '{name}' must be at least {least} or [low, high], got {value!r}"
                    )
                object.__setattr__(self, name, tuple(pair))
        if self.num_chunks and self.num_distractors:
            raise ValueError("augment: give num_chunks or num_distractors, not both")


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    source: str  # as in `load_examples`
    mode: str = BLOCK  # attention: ``block``, ``full``, or ``both`` (each example twice)
    # draw ``sampling``: its share, relative to other parts' weights; ``duplication``: how often an
    # example is taken, 0.5 for half of them
    weight: float = 1.0
    limit: int | None = None  # load only the first examples
    split: str | None = None  # split of a Hub data set; default: the source's, else ``train``
    chunker: Chunker | None = None  # splits conversations and documents; None: the source's own
    augment: Augment | None = None  # varies the context each time an example is taken
    format: Mapping[str, Any] | None = None  # fields of `PromptFormat` that differ for this part
    # in full attention, conversations become turns of the chat template (as KVLink trains) instead
    # of chunks in one turn, if their roles alternate
    turns: bool = False

    def __post_init__(self):
        require_one_of("'mode'", self.mode, MODES)
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"'weight' must be above 0, got {self.weight!r}; or drop the part")
        if self.limit is not None:
            require_count("'limit'", self.limit, 1)
        if self.turns and self.mode == BLOCK:
            raise ValueError("'turns' belong to full attention; set mode: full")
        if self.format is not None:
            _ = PromptFormat.from_dict(self.format)  # validates it


@dataclass(frozen=True)
class Mixture:
    """Training data of a model: its parts, and how examples are drawn from them."""

    parts: tuple[Part, ...]  # the sources
    # ``duplication``: all examples, in each mode of their part (Block-Attention); ``sampling``:
    # ``size`` examples, divided by weight (KVLink)
    draw: str = "duplication"
    size: int | None = None  # total number of examples, only for sampling
    seed: int = 0  # seeds order and draws

    def __post_init__(self):
        require_one_of("'draw'", self.draw, DRAWS)
        if self.draw == "duplication":
            if self.size is not None:
                raise ValueError("'size' belongs to draw: sampling; use weight and limit")
            return
        if self.size is None or self.size < 1:
            raise ValueError(f"draw: sampling needs 'size', how many examples; got {self.size!r}")
        if any(part.mode == BOTH for part in self.parts):
            raise ValueError("mode: both belongs to draw: duplication; name the part once per mode")

    def to_dict(self) -> dict[str, Any]:
        """Converts to plain JSON types, for an adapter's provenance. Unset fields are omitted."""
        parts = []
        for part in self.parts:
            record = {**vars(part), "augment": part.augment and asdict(part.augment)}
            if (chunker := part.chunker) is not None:
                record["chunker"] = {"name": CHUNKERS.name_of(chunker), **asdict(chunker)}
            parts.append({key: value for key, value in record.items() if value is not None})
        record = {"draw": self.draw, "size": self.size, "seed": self.seed, "parts": parts}
        return {key: value for key, value in record.items() if value is not None}


def load_mixture(path: str | Path) -> Mixture:
    """Reads a mixture from YAML. Its relative paths are relative to the current directory."""
    return load_spec(path, "mixture", "give a YAML file", parse_mixture)


def parse_mixture(record: Any, where: str = "mixture") -> Mixture:
    """Builds a mixture from decoded YAML; error messages start with ``where``."""
    parts = []
    listed = entries(mapping(record, where).get("parts"), f"{where}: 'parts'")
    for index, entry in enumerate(listed):
        place = f"{where}: parts[{index}]"
        values = {"source": entry} if isinstance(entry, str) else dict(mapping(entry, place))
        if values.get("chunker") is not None:
            values["chunker"] = parse_chunker(values["chunker"], f"{place}: chunker")
        if values.get("augment") is not None:
            values["augment"] = read(Augment, values["augment"], f"{place}: augment")
        parts.append(read(Part, values, place))
    return read(Mixture, {**record, "parts": tuple(parts)}, where)


class MixedExample(NamedTuple):
    """An example, its attention mode (``block`` or ``full``), and the index of its part."""

    example: RagExample
    mode: str
    part: int


class PartCount(NamedTuple):
    """Counts of a part: examples loaded, taken in each mode, and epochs over the loaded ones."""

    source: str
    loaded: int
    block: int
    full: int
    epochs: float


class Mixed(NamedTuple):
    """A drawn mixture: examples in training order, and the counts of each part."""

    examples: list[MixedExample]
    parts: list[PartCount]


def mix(mixture: Mixture, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Mixed:
    """Loads all parts, draws examples and shuffles them.

    A part's examples are taken in random order, each once per epoch, and augmented each time.
    ``tokenizer`` is for chunkers that count tokens. ValueError: a weight selects no example.
    """
    loaded = [
        load_examples(
            part.source,
            limit=part.limit,
            split=part.split or training_split(part.source),
            tokenizer=tokenizer,
            chunker=part.chunker,
        )
        for part in mixture.parts
    ]
    sizes = _counts(mixture, list(map(len, loaded)))
    drawn: list[MixedExample] = []
    counts: list[PartCount] = []
    for number, (part, examples, size) in enumerate(zip(mixture.parts, loaded, sizes, strict=True)):
        modes, rows = MODES[part.mode], len(examples)
        taken = _take(examples, size, part, Random(f"mix/{mixture.seed}/{number}"))
        drawn += [MixedExample(example, mode, number) for example in taken for mode in modes]
        block, full = (size if mode in modes else 0 for mode in (BLOCK, FULL))
        counts.append(PartCount(part.source, rows, block, full, size / rows))
    Random(f"mix/{mixture.seed}").shuffle(drawn)
    return Mixed(drawn, counts)


def _counts(mixture: Mixture, available: Sequence[int]) -> list[int]:
    """Number of examples to take from each part; with sampling, the sum is ``size``."""
    weights = [part.weight for part in mixture.parts]
    if mixture.size is None:
        counts = [round(weight * rows) for weight, rows in zip(weights, available, strict=True)]
    else:  # rounded by largest remainder
        exact = [mixture.size * weight / sum(weights) for weight in weights]
        counts = list(map(int, exact))
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for index in by_remainder[: mixture.size - sum(counts)]:
            counts[index] += 1
    for part, number, rows in zip(mixture.parts, counts, available, strict=True):
        if not number or not rows:
            raise ValueError(
                f"mixture: no example of '{part.source}' is taken (it has {rows}, weight "
                f"{part.weight:g}); raise the weight or size, or drop the part"
            )
    return counts


def _take(examples: Sequence[RagExample], size: int, part: Part, rng: Random) -> list[RagExample]:
    pool = list(dict.fromkeys(chunk for e in examples for chunk in e.chunks))
    rows, order, taken = len(examples), [], []
    for number in range(size):
        order = order or rng.sample(range(rows), rows)[::-1]  # a new order each epoch
        index = order.pop()
        example = examples[index]
        if part.augment:
            example = augment(example, number // rows * rows + index, part.augment, pool)
        taken.append(example)
    return taken


def augment(
    example: RagExample, index: int, config: Augment, pool: Sequence[Chunk] = ()
) -> RagExample:
    """Returns the example with a varied context; ``index`` and ``config.seed`` seed all draws.

    Missing distractors are drawn from ``pool``, if they mention no answer; ValueError: too few.
    """
    rng = Random(f"augment/{config.seed}/{index}")
    needed = evidence(example)
    chosen = [(chunk, i in example.supporting) for i, chunk in enumerate(example.chunks)]
    if bounds := config.num_distractors or config.num_chunks:
        count = max(0, rng.randint(*bounds) - (0 if config.num_distractors else len(needed)))
        own = [i for i in range(len(chosen)) if i not in needed]
        kept = needed.union(rng.sample(own, min(count, len(own))))
        chosen = [pair for i, pair in enumerate(chosen) if i in kept]
        added = _draw(rng, example, count + len(needed) - len(chosen), pool)
        for chunk in added:  # at random places, so that added chunks are not always last
            chosen.insert(rng.randint(0, len(chosen)), (chunk, False))
    if config.shuffle:
        rng.shuffle(chosen)
    supporting = tuple(i for i, (_, supports) in enumerate(chosen) if supports)
    return replace(example, chunks=tuple(chunk for chunk, _ in chosen), supporting=supporting)


def _draw(rng: Random, example: RagExample, count: int, pool: Sequence[Chunk]) -> list[Chunk]:
    present = set(example.chunks)
    drawn: list[Chunk] = []
    for index in _shuffled(rng, len(pool)):
        if len(drawn) >= count:
            break
        chunk = pool[index]
        if chunk not in present and not chunk_mentions(chunk, example.answers):
            present.add(chunk)
            drawn.append(chunk)
    if len(drawn) < count:
        raise ValueError(
            f"augment: '{example.id or example.question:.40}' needs {count} chunks of others, "
            f"{len(drawn)} fit; load more examples, or ask for fewer chunks"
        )
    return drawn


def _shuffled(rng: Random, size: int) -> Iterator[int]:
    """Yields ``range(size)`` in random order, by a lazy Fisher-Yates shuffle: pools are large."""
    swapped: dict[int, int] = {}
    for position in range(size):
        target = rng.randrange(position, size)
        yield swapped.get(target, target)
        swapped[target] = swapped.get(position, position)
