"""The settings of pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from transformers import LlamaConfig

KINDS = {
    "self-contained": 0.3, "cross-chunk": 0.4, "2-hop": 0.3, "3-hop": 0.06, "comparison": 0.06,
    "referred": 0.1,
}  # fmt: skip

FALLING_WARMUP = 10
"""Warm-up steps of new optimisers in a stage with a falling learning rate."""


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Attributes:
        passages: Maximum number of chunks of a context.
        steps: Number of optimiser steps.
        length: Maximum tokens of a sequence, S; longer ones are not drawn. Longer sequences mean
            fewer per step.
        plain: Easy examples, see `WorldConfig`, with only questions about one passage.
        until: The stage ends early when this share of answer tokens between two log lines is
            correct, since it varies by chance when a model learns to retrieve. The last stage of a
            segment takes all its steps.
        falls: Whether learning rates fall linearly. Such a stage, and the one after it, start from
            the saved weights with new optimisers.
    """

    passages: int
    steps: int
    length: int
    plain: bool = False
    until: float = 1.0
    falls: bool = False


@dataclass(frozen=True)
class PretrainConfig:
    """Model, data and optimisation of the tiny model.

    Attributes:
        seed: Random seed of weights, tokenizer corpus and worlds.
        layers: Number of decoder layers, L.
        width: Hidden size.
        ffn: Intermediate size of the MLP.
        heads: Number of query heads, H.
        kv_heads: Number of key and value heads, K. With only two, or with smaller heads, retrieval
            is learned later, since the values of a head must distinguish some hundred words.
        head_dim: Dimensions of a head, D.
        rope_theta: Base of RoPE; large, so that enough dimensions hardly rotate over a context.
        vocab_size: Rows of the embeddings, and maximum tokens of the tokenizer. Fixed, so that the
            random weights do not depend on the words of the worlds; some seeds learn to retrieve
            late or never.
        stages: Curriculum; it must begin with short contexts, or retrieval is not learned.
        questions: Maximum number of questions about one context, in successive turns.
        kinds: Weight of each kind of question.
        aliased: As in `WorldConfig`, also for the tokenizer's worlds and the dev questions.
        answer_weight: Weight of an answer token in the loss; all others have weight 1.
        rows_per_step: Rows of one optimiser step if all sequences had the stage's length; half of
            them are padding.
        micro_rows: Maximum rows of a forward pass on a CPU, padding included; few fit the cache.
        muon_lr: Peak learning rate of the matrices.
        embedding_std: Initial standard deviation of the embeddings. AdamW changes each number by
            about its rate per step, alike for words of one class. With the usual 0.02 their
            differences soon become too small to distinguish names.
        adam_lr: Peak learning rate of embeddings and norms.
        warmup: Number of linear warm-up steps.
        final_lr: Last learning rate, relative to the peak.
        clip: Maximum gradient norm.
        device: ``cpu``, or ``cuda`` for one GPU. A GPU computes in bfloat16, so that the data are
            the same but the weights are not.
        workers: Processes on a CPU, one thread each; on few cores faster than threads.
        readers: Processes that prepare batches; with 0, each worker prepares its own.
        eval_every: Steps between evaluations on dev worlds.
        eval_examples: Number of questions of such an evaluation.
    """

    seed: int = 0
    layers: int = 4
    width: int = 128
    ffn: int = 384
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e6
    vocab_size: int = 1152
    stages: tuple[Stage, ...] = (
        Stage(4, 800, 256, plain=True, until=0.955), Stage(5, 500, 320, until=0.97),
        Stage(8, 400, 480, until=0.98), Stage(12, 500, 704), Stage(12, 1200, 704, falls=True),
    )  # fmt: skip
    questions: int = 8
    kinds: dict[str, float] = field(default_factory=lambda: dict(KINDS))
    aliased: float = 0.1
    answer_weight: float = 5.0
    rows_per_step: int = 20000
    micro_rows: int = 1200
    muon_lr: float = 0.02
    embedding_std: float = 0.25
    adam_lr: float = 2e-3
    warmup: int = 50
    final_lr: float = 0.05
    clip: float = 1.0
    device: str = "cpu"
    workers: int = 2
    readers: int = 0
    eval_every: int = 500
    eval_examples: int = 300

    def __post_init__(self):
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got '{self.device}'")
        if self.device == "cuda" and self.workers != 1:
            raise ValueError(f"one process trains on a GPU: set workers to 1, not {self.workers}")
        longest = max(stage.length for stage in self.stages)
        if longest > self.rows_per_step // self.workers:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit into {self.rows_per_step} rows per "
                f"step of {self.workers} processes; raise rows_per_step"
            )

    def scaled(self, factor: float) -> PretrainConfig:
        """A copy with the steps of every stage multiplied by ``factor``, for trials."""
        stages = tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in self.stages)
        return replace(self, stages=stages)

    @property
    def total_steps(self) -> int:
        """Total number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def spans(self) -> list[range]:
        """The steps of each stage."""
        ends = [0, *accumulate(stage.steps for stage in self.stages)]
        return [range(*span) for span in pairwise(ends)]

    @property
    def segments(self) -> list[range]:
        """Ranges of steps with the same optimisers."""
        starts, step = [0], 0
        for before, stage in pairwise(self.stages):
            step += before.steps
            if before.falls or stage.falls:
                starts.append(step)
        return [range(*ends) for ends in pairwise([*starts, self.total_steps])]

    def taken(self, steps: Sequence[int]) -> list[int]:
        """Number of steps actually taken at each of ``steps``, which are those of a log.

        A stage that ends early skips its other steps. The next stage still has the same step
        numbers, and thus the same data.
        """
        taken, before, counts = 0, 0, []
        for step in steps:
            start = next(span.start for span in self.spans if step - 1 in span)
            taken += step - max(before, start)
            before = step
            counts.append(taken)
        return counts

    def stage(self, step: int) -> Stage:
        """The stage of a 0-based step."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step {step} past the last stage")

    def rate(self, step: int) -> float:
        """Learning rate at a 0-based step, relative to the peak."""
        stage = self.stage(step)
        since = step - next(part.start for part in self.segments if step in part)
        if not stage.falls:
            return min(1.0, (since + 1) / self.warmup)
        return min(1.0, (since + 1) / FALLING_WARMUP) * (
            1 - (1 - self.final_lr) * since / stage.steps
        )

    def model_config(self, bos: int, eos: int, pad: int) -> LlamaConfig:
        """A stock Llama configuration with grouped-query attention and tied embeddings."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )
