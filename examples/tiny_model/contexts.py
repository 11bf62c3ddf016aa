"""Training sequences: a context, then many questions about it in successive turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from blocktune.data.worlds import MARKER, Context, WorldConfig, draw_context
from blocktune.prompt import PromptFormat
from examples.tiny_model.config import PretrainConfig, Stage
from examples.tiny_model.tokenizer import ASSISTANT, BOS, EOS, RESTATE, USER


class Conversation(NamedTuple):
    """Token ids of a conversation, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


class MicroBatch(NamedTuple):
    """Right-padded sequences: ids ``(B, S)`` int64, weights ``(B, S)`` float32 (0 for padding)."""

    ids: Tensor
    weights: Tensor


def turns(context: Context, fmt: PromptFormat) -> Iterator[tuple[str, bool]]:
    """Yields the separately tokenised pieces of a conversation, and whether each is an answer.

    Up to the first answer, the pieces are those of `blocktune.prompt.make_pieces`.
    """
    yield f"{BOS}{USER}{fmt.instruction}\n\n", False
    for chunk in context.chunks:
        yield fmt.render_chunk(chunk), False
    for number, question in enumerate(context.questions):
        opening = USER if number else ""
        yield f"{opening}{fmt.render_question(question.question)}{ASSISTANT}", False
        yield f"{question.response}{EOS}", True
    # The densest training signal: a value to retrieve every dozen tokens.
    yield f"{USER}{RESTATE}{ASSISTANT}", False
    for number, (before, value, after) in enumerate(context.statements):
        yield f"{' ' if number else ''}{before.rstrip()}", False
        yield f" {value}", True
        yield after, False
    yield EOS, False


class Lessons(Dataset):
    """The batches of every step, for one of the processes that share it.

    Each step has its own random generator, so that it does not depend on the process or the order
    in which steps are drawn.
    """

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, rank: int = 0):
        """Draws the share of process ``rank`` of ``config.workers``."""
        self.config = config
        self.backend = tokenizer.backend_tokenizer
        self.fmt = PromptFormat()
        self.rank, self.pad_id = rank, tokenizer.pad_token_id

    def __len__(self):
        return self.config.total_steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        stage, config = self.config.stage(step), self.config
        rng = Random(f"pretrain/{config.seed}/{step}/{self.rank}")
        drawn = self.draw(rng, stage, config.rows_per_step // stage.length // config.workers)
        if config.device == "cuda":  # one shape per stage, as needed for CUDA graphs
            return [_pad(drawn, self.pad_id, stage.length)]
        return list(micro_batches(drawn, config.micro_rows, self.pad_id))

    def draw(self, rng: Random, stage: Stage, count: int) -> list[Conversation]:
        """Draws ``count`` sequences of a stage (at least one) within its maximum length."""
        kinds = {"self-contained": 1.0} if stage.plain else self.config.kinds
        worlds = WorldConfig(
            num_passages=(1, stage.passages),
            kinds=kinds,
            aliased=self.config.aliased,
            plain=stage.plain,
        )
        drawn: list[Conversation] = []
        while len(drawn) < max(1, count):
            asked = rng.randint((self.config.questions + 1) // 2, self.config.questions)
            sequence = self._encode(draw_context(rng, worlds, asked))
            if len(sequence.ids) <= stage.length:
                drawn.append(sequence)
        return drawn

    def _encode(self, context: Context) -> Conversation:
        texts, answers = zip(*turns(context, self.fmt), strict=True)
        ids, weights = [], []
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for encoding, answer in zip(encodings, answers, strict=True):
            ids += encoding.ids
            weights += [self.config.answer_weight if answer else 1.0] * len(encoding.ids)
        return Conversation(ids, weights)


def loader(lessons: Lessons, steps: range) -> DataLoader:
    """Yields the batches of ``steps`` in order, prefetched by ``config.readers`` processes."""
    readers = lessons.config.readers
    ahead = {"num_workers": readers, "prefetch_factor": 8} if readers else {}
    return DataLoader(lessons, batch_size=None, sampler=steps, **ahead)


def given_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of answer tokens that need no context: the marker, punctuation, EOS."""
    words = f"{MARKER.strip()} {MARKER.strip()},.", tokenizer.eos_token
    return sorted({i for word in words for i in tokenizer.encode(word, add_special_tokens=False)})


def micro_batches(
    sequences: Sequence[Conversation], max_rows: int, pad_id: int
) -> Iterator[MicroBatch]:
    """Groups sequences of similar length into batches of at most ``max_rows`` padded rows."""
    group: list[Conversation] = []
    for sequence in sorted(sequences, key=lambda s: len(s.ids)):
        if group and (len(group) + 1) * len(sequence.ids) > max_rows:
            yield _pad(group, pad_id)
            group = []
        group.append(sequence)
    yield _pad(group, pad_id)


def _pad(group: list[Conversation], pad_id: int, length: int | None = None) -> MicroBatch:
    length = length or max(len(sequence.ids) for sequence in group)
    ids = torch.full((len(group), length), pad_id)
    weights = torch.zeros(len(group), length)
    for row, sequence in enumerate(group):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights[row, : len(sequence.ids)] = torch.tensor(sequence.weights)
    return MicroBatch(ids, weights)
