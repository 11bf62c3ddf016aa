"""Sizes of the measured models and prompts, and functions that build both."""

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blocktune.prompt import LayoutSpec, Pieces, Prompt, lay_out


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder and a prompt; the context has `tokens`, in chunks of `chunk`."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    tokens: int
    chunk: int
    question: int
    dtype: str
    device: str

    def __post_init__(self):
        if self.tokens % self.chunk or self.tokens < self.chunk:
            raise ValueError(f"--tokens must be a multiple of {self.chunk}, got {self.tokens}")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )

    def model(self) -> LlamaForCausalLM:
        """Builds the model with random weights, directly on its device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM._from_config(self.config(), dtype=self.torch_dtype)
        return model.eval()

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def prompt(self, answer: int = 0) -> Prompt:
        """Builds a prompt of random tokens in block attention, with an answer for the loss."""
        draw = torch.Generator().manual_seed(0)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(self.vocabulary, (count,), generator=draw).tolist())

        chunks = tuple(tokens(self.chunk) for _ in range(self.tokens // self.chunk))
        pieces = Pieces(tokens(8), chunks, tokens(self.question), tokens(answer))
        return lay_out(pieces, LayoutSpec())


LLAMA_8B = Shape(
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    layers=8,
    vocabulary=128256,
    tokens=16384,
    chunk=512,
    question=64,
    dtype="bfloat16",
    device="cuda",
)
TINY = replace(
    LLAMA_8B,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    layers=2,
    vocabulary=4096,
    tokens=512,
    chunk=64,
    dtype="float32",
    device="cpu",
)
