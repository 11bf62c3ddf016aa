"""Training sequences: one context, then many questions about it in successive turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blocktune.data.worlds import MARKER, Context, WorldConfig, draw_context
from blocktune.prompt import PromptFormat
from blocktune.training.pretraining.config import PretrainConfig, Stage
from blocktune.training.pretraining.tokenizer import ASSISTANT, BOS, EOS, RESTATE, USER


class Conversation(NamedTuple):
    """Token ids of a conversation, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


class MicroBatch(NamedTuple):
    """Right-padded sequences: ids ``(B, S)`` int64 and weights ``(B, S)`` float32, 0 on pads."""

    ids: Tensor
    weights: Tensor


def turns(context: Context, fmt: PromptFormat) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of a conversation as they are tokenised, and whether each is an answer.

    The pieces up to the first answer are those of `blocktune.prompt.make_pieces`.
    """
    yield f"{BOS}{USER}{fmt.instruction}\n\n", False
    for chunk in context.chunks:
        yield fmt.render_chunk(chunk), False
    for number, question in enumerate(context.questions):
        opening = USER if number else ""
        yield f"{opening}{fmt.render_question(question.text)}{ASSISTANT}", False
        yield f"{question.response}{EOS}", True
    # Densest of all lessons: a dozen tokens for each value that must be found.
    yield f"{USER}{RESTATE}{ASSISTANT}", False
    for number, (before, value, after) in enumerate(context.statements):
        yield f"{' ' if number else ''}{before.rstrip()}", False
        yield f" {value}", True
        yield after, False
    yield EOS, False


class ContextSource:
    """Endless training sequences from one random stream."""

    def __init__(
        self, config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, stream: str = "0"
    ):
        """Starts a stream; those of different names differ."""
        self.config = config
        self.backend = tokenizer.backend_tokenizer
        self.fmt = PromptFormat()
        self.rng = Random(f"pretrain/{config.seed}/{stream}")
        self.given = torch.tensor(given_ids(tokenizer))

    def draw(self, stage: Stage, num_tokens: int) -> list[Conversation]:
        """Draws sequences of a stage until they hold ``num_tokens`` tokens."""
        kinds = {"self-contained": 1.0} if stage.plain else self.config.kinds
        worlds = WorldConfig(num_passages=(1, stage.passages), kinds=kinds, plain=stage.plain)
        drawn: list[Conversation] = []
        while num_tokens > 0:
            asked = self.rng.randint((self.config.questions + 1) // 2, self.config.questions)
            drawn.append(self._encode(draw_context(self.rng, worlds, asked)))
            num_tokens -= len(drawn[-1].ids)
        return drawn

    def _encode(self, context: Context) -> Conversation:
        texts, answers = zip(*turns(context, self.fmt), strict=True)
        ids, weights = [], []
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for encoding, answer in zip(encodings, answers, strict=True):
            ids += encoding.ids
            weights += [self.config.answer_weight if answer else 1.0] * len(encoding.ids)
        return Conversation(ids, weights)


def given_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of answer tokens that need no context: the marker, punctuation, EOS."""
    words = f"{MARKER.strip()} {MARKER.strip()},.", tokenizer.eos_token
    return sorted({i for word in words for i in tokenizer.encode(word, add_special_tokens=False)})


def micro_batches(
    sequences: Sequence[Conversation], max_tokens: int, pad_id: int
) -> Iterator[MicroBatch]:
    """Groups sequences of similar length into batches of at most ``max_tokens`` rows with pads."""
    group: list[Conversation] = []
    for sequence in sorted(sequences, key=lambda s: len(s.ids)):
        if group and (len(group) + 1) * len(sequence.ids) > max_tokens:
            yield _pad(group, pad_id)
            group = []
        group.append(sequence)
    yield _pad(group, pad_id)


def _pad(group: list[Conversation], pad_id: int) -> MicroBatch:
    length = max(len(sequence.ids) for sequence in group)
    ids = torch.full((len(group), length), pad_id)
    weights = torch.zeros(len(group), length)
    for row, sequence in enumerate(group):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights[row, : len(sequence.ids)] = torch.tensor(sequence.weights)
    return MicroBatch(ids, weights)
