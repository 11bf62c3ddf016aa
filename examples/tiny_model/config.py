"""What pre-training can be told."""

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
"""Steps in which new optimisers gather their first averages, before rates that fall."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum.

    Attributes:
        passages: Most chunks of a context.
        steps: Optimiser steps.
        length: Most tokens of a sequence, S; longer ones are not drawn. The longer, the fewer
            sequences make a step.
        plain: First lessons: see `WorldConfig`; only questions of one passage.
        until: Share of right answer tokens, over the steps between two lines of the log, with which
            the stage is over before its steps are: when matching is found is a matter of chance.
            The last stage of a segment takes all its steps.
        falls: Whether the rates fall linearly. Such a stage starts from the saved weights with new
            optimisers, and so does the one after it.
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
        seed: Seeds weights, tokenizer corpus and worlds.
        layers: Decoder layers, L.
        width: Hidden size.
        ffn: Inner size of the MLP.
        heads: Query heads, H.
        kv_heads: Key and value heads, K; with two, or with smaller heads, retrieval is learnt
            later: what a head moves must tell some hundred words apart.
        head_dim: Dimensions of a head, D.
        rope_theta: Base of RoPE; large, so that enough dimensions hardly turn over a context.
        vocab_size: Rows of the embeddings, and most tokens of the tokenizer. Fixed, so that random
            weights do not hang on the worlds' words: some find matching late or never.
        stages: Curriculum; short contexts first, or retrieval is not learnt.
        questions: Most questions asked about one context, in successive turns.
        kinds: Weight of each kind of question.
        aliased: As in `WorldConfig`, also for the tokenizer's worlds and the dev questions.
        answer_weight: Weight of an answer token in the loss; all others weigh 1.
        rows_per_step: Rows of one optimiser step if all sequences were of the stage's length; half
            of them are pads.
        micro_rows: Most rows of one forward pass on a CPU, padding included; few stay in cache.
        muon_lr: Peak learning rate of the matrices.
        embedding_std: Initial spread of the embeddings. AdamW moves every number by about its
            rate a step, and words of one class together: from the usual 0.02 their differences
            soon drown, and names can no longer be told apart.
        adam_lr: Peak learning rate of embeddings and norms.
        warmup: Steps of linear warm-up.
        final_lr: Last learning rate, relative to the peak.
        clip: Largest gradient norm.
        device: ``cpu``, or ``cuda`` for one GPU, which computes in bfloat16: the lessons are the
            same, the weights are not.
        workers: Processes on a CPU, one thread each: on few cores faster than threads.
        readers: Processes that draw the lessons; without, each worker draws its own in between.
        eval_every: Steps between measurements on dev worlds.
        eval_examples: Questions in such a measurement.
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
                f"a sequence of {longest} tokens does not fit into {self.rows_per_step} rows a "
                f"step of {self.workers} processes; raise rows_per_step"
            )

    def scaled(self, factor: float) -> PretrainConfig:
        """The same run with every stage ``factor`` times as long, for trials."""
        stages = tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in self.stages)
        return replace(self, stages=stages)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def spans(self) -> list[range]:
        """The steps of each stage."""
        ends = [0, *accumulate(stage.steps for stage in self.stages)]
        return [range(*span) for span in pairwise(ends)]

    @property
    def segments(self) -> list[range]:
        """The steps between one start with new optimisers and the next."""
        starts, step = [0], 0
        for before, stage in pairwise(self.stages):
            step += before.steps
            if before.falls or stage.falls:
                starts.append(step)
        return [range(*ends) for ends in pairwise([*starts, self.total_steps])]

    def taken(self, steps: Sequence[int]) -> list[int]:
        """How many steps had really been taken at each of ``steps``, the lines of a log.

        A stage that ends early leaves its other steps out: those of the next are numbered, and
        drawn, as if it had not.
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
        """The model's shape: a stock Llama with grouped-query attention and tied embeddings."""
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
