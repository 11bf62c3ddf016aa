"""Training mixtures: several sources, each with a weight and an attention mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.augment import Augment, augment
from blocktune.data.chunking import CHUNKERS, Chunker, parse_chunker
from blocktune.data.example import RagExample
from blocktune.data.sources.load import load_examples, training_split
from blocktune.parsing import entries, load_spec, mapping, read
from blocktune.prompt.format import PromptFormat
from blocktune.registry import require_count, require_one_of

BLOCK, FULL, BOTH = "block", "full", "both"
MODES = {BLOCK: (BLOCK,), FULL: (FULL,), BOTH: (BLOCK, FULL)}
DRAWS = ("duplication", "sampling")


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

    A part's examples are taken in random order, each once per epoch, and augmented each time, in
    mode ``both`` once for both modes. ``tokenizer`` is for chunkers that count tokens. Raises
    ValueError if a part's weight selects no example.
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
