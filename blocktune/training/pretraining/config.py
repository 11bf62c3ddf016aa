"""What pre-training can be told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

KINDS = {
    "self-contained": 0.35, "cross-chunk": 0.3, "2-hop": 0.3, "3-hop": 0.06, "comparison": 0.06,
}  # fmt: skip

ANNEAL_WARMUP = 10
"""Steps in which new optimisers gather their first averages."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum.

    Attributes:
        passages: Most chunks of a context.
        steps: Most optimiser steps; what a stage leaves over goes to the last one.
        until: Accuracy of the answers' values, averaged over about 20 steps, that ends the
            stage early.
        plain: First lessons: see `WorldConfig`; only questions of one passage.
    """

    passages: int
    steps: int
    plain: bool = False
    until: float = 1.0


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
        vocab_size: Most tokens of the tokenizer.
        stages: Curriculum; short contexts first, or retrieval is not learnt.
        questions: Most questions asked about one context, in successive turns.
        kinds: Weight of each kind of question.
        answer_weight: Weight of an answer token in the loss; all others weigh 1.
        tokens_per_step: Tokens of one optimiser step, all processes together, about.
        micro_tokens: Most tokens of one forward pass, padding included; small ones stay in cache.
        muon_lr: Peak learning rate of the matrices.
        embedding_std: Initial spread of the embeddings. AdamW moves every number by about its
            rate a step, and words of one class together: from the usual 0.02 their differences
            soon drown, and names can no longer be told apart.
        adam_lr: Peak learning rate of embeddings and norms.
        warmup: Steps of linear warm-up.
        anneal_steps: Steps after the stages, from the saved weights and with new optimisers, in
            which the rates fall linearly.
        final_lr: Last learning rate, relative to the peak.
        clip: Largest gradient norm.
        workers: Processes, one thread each: on few cores faster than threads.
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
        Stage(4, 500, plain=True, until=0.96), Stage(5, 500, until=0.95),
        Stage(8, 300, until=0.95), Stage(12, 100),
    )  # fmt: skip
    questions: int = 8
    kinds: dict[str, float] = field(default_factory=lambda: dict(KINDS))
    answer_weight: float = 5.0
    tokens_per_step: int = 8000
    micro_tokens: int = 1200
    muon_lr: float = 0.02
    embedding_std: float = 0.25
    adam_lr: float = 2e-3
    warmup: int = 50
    anneal_steps: int = 450
    final_lr: float = 0.05
    clip: float = 1.0
    workers: int = 2
    eval_every: int = 200
    eval_examples: int = 200

    def scaled(self, factor: float) -> PretrainConfig:
        """The same run with every stage ``factor`` times as long, for trials."""
        stages = tuple(replace(s, steps=max(1, round(s.steps * factor))) for s in self.stages)
        return replace(self, stages=stages, anneal_steps=max(1, round(self.anneal_steps * factor)))

    @property
    def steady_steps(self) -> int:
        """Steps of all stages, at the peak rates after a warm-up."""
        return sum(stage.steps for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steady_steps + self.anneal_steps

    def rate(self, step: int) -> float:
        """Learning rate at a 0-based step, relative to the peak."""
        if step < self.steady_steps:
            return min(1.0, (step + 1) / self.warmup)
        since = step - self.steady_steps
        return min(1.0, (since + 1) / ANNEAL_WARMUP) * (
            1 - (1 - self.final_lr) * since / self.anneal_steps
        )

    def model_config(self, vocab_size: int, bos: int, eos: int, pad: int) -> LlamaConfig:
        """The model's shape: a stock Llama with grouped-query attention and tied embeddings."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )


class Curriculum:
    """Where a run stands in its stages; a stage ends when it is learnt or its steps are used up."""

    def __init__(self, stages: tuple[Stage, ...]):
        """Starts with the first of ``stages``."""
        self.stages = list(stages)
        self.step, self.accuracy = 0, 0.0

    @property
    def stage(self) -> Stage:
        """The stage of the next step."""
        return self.stages[0]

    def advance(self, accuracy: float) -> None:
        """Counts a step, given the accuracy of its answer tokens."""
        self.step += 1
        self.accuracy += 0.1 * (accuracy - self.accuracy)
        learnt = self.accuracy >= self.stage.until or self.step >= self.stage.steps
        if learnt and len(self.stages) > 1:
            del self.stages[0]
            self.step, self.accuracy = 0, 0.0
