"""Measures attention, a training step and cached answers, and the machine's maximum rates."""

import random
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from shape import Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blocktune.attention import attach, dense_mask, make_plan
from blocktune.attention.kernels import AttentionParams
from blocktune.data import RagExample
from blocktune.engine import Engine, Usage
from blocktune.layout import LayerRule
from blocktune.prompt import Chunk
from blocktune.training.plan import matmul_rate

FORWARD, BACKWARD = 4, 10
"""FLOPs of attention per visible pair of rows and dimension: two matrix products, then five."""
METHODS = ("full-prefill", "naive", "cacheblend", "epic")


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Seconds of the fastest of ``repeats`` runs, after two warm-up runs (compilation, caches)."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        timed()
    return min(timed() for _ in range(repeats))


def measure_machine(shape: Shape) -> dict:
    """Measures the rates of a matrix product and of a copy, which bound everything else."""
    source = torch.zeros(2**28 if shape.device == "cuda" else 2**22, device=shape.device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), shape.device)
    return {
        "matmul_flops_per_s": matmul_rate(shape.device, shape.torch_dtype, seconds=0.5),
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / copy_s,
    }


def measure_attention(shape: Shape, matmul: float) -> dict:
    """Times one attention layer, forward and backward: split and flex against SDPA.

    Flex is measured only on CUDA, since it cannot train elsewhere.

    Args:
        shape: Sizes of the layer and the prompt.
        matmul: FLOPs per second, for the lower bounds.
    """
    layout = shape.prompt().layout.to(shape.device)
    dim, draw = shape.hidden // shape.heads, torch.Generator(shape.device).manual_seed(0)

    def leaf(heads: int) -> torch.Tensor:
        size = (1, heads, layout.num_rows, dim)
        leaf = torch.randn(size, generator=draw, device=shape.device, dtype=shape.torch_dtype)
        return leaf.requires_grad_()

    leaves = [leaf(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    mask, params = dense_mask(layout), AttentionParams(scaling=dim**-0.5)

    def sdpa(**how) -> torch.Tensor:
        return F.scaled_dot_product_attention(*leaves, enable_gqa=True, **how)

    def planned(execution: str) -> Callable[[], torch.Tensor]:
        plan = make_plan(execution, layout)
        return lambda: plan.attend(*leaves, LayerRule(), params)

    def trained(forward: Callable[[], torch.Tensor]) -> float:
        return seconds(lambda: forward().float().sum().backward(), shape.device)

    def bound_s(pairs: float) -> float:
        return (FORWARD + BACKWARD) * pairs * shape.hidden / matmul

    visible = mask.sum().item()
    result = {
        "rows": layout.num_rows,
        "full_bound_s": bound_s(layout.num_rows**2 / 2),
        "visible_bound_s": bound_s(visible),
        "full_s": trained(lambda: sdpa(is_causal=True)),
        "dense_s": trained(lambda: sdpa(attn_mask=mask)),
    }
    for name in ("split", "flex") if shape.device == "cuda" else ("split",):
        forward = planned(name)
        difference = forward().transpose(1, 2) - sdpa(attn_mask=mask)
        result[f"{name}_max_abs_diff"] = difference.abs().max().item()
        result[f"{name}_s"] = trained(forward)
        result[f"{name}_over_full"] = result[f"{name}_s"] / result["full_s"]
        result[f"{name}_over_dense"] = result[f"{name}_s"] / result["dense_s"]
    return result


def measure_training(shape: Shape, matmul: float) -> dict:
    """Times a LoRA step in split attention: forward, loss on the answer, backward, AdamW.

    Args:
        shape: Sizes of the model and the prompt.
        matmul: FLOPs per second, for the lower bound by products with weights.
    """
    answer = shape.question
    prompt = shape.prompt(answer)
    base = shape.model()
    attach(base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor([prompt.ids], device=shape.device)
    layout = prompt.layout.to(shape.device)
    plan = make_plan("split", layout)

    losses = []

    def step() -> None:
        logits = model(
            input_ids=ids,
            position_ids=layout.position,
            plan=plan,
            use_cache=False,
            logits_to_keep=answer + 1,
        ).logits
        loss = F.cross_entropy(logits[0, :-1].float(), ids[0, -answer:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step_s, rows = seconds(step, shape.device, repeats=3), len(prompt.ids)
    result = {"rows": rows, "step_s": step_s, "tokens_per_s": rows / step_s}
    # Forward, forward again for checkpointing, and gradients of activations but not of weights.
    weights = shape.hidden * (2 * shape.hidden + 2 * shape.hidden * shape.kv_heads // shape.heads)
    weights += 3 * shape.hidden * shape.intermediate
    result["weights_bound_s"] = 3 * 2 * shape.layers * weights * rows / matmul
    result["losses"] = [loss.item() for loss in losses]
    if shape.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def measure_cached_answer(shape: Shape, repeats: int = 3) -> dict:
    """Measures the fastest of ``repeats`` answers by each method, with all chunks cached."""
    engine = Engine(shape.model(), word_tokenizer(shape.vocabulary))
    example = random_example(shape)
    engine.encode(example.chunks)
    usages = {name: fastest(engine, example, name, repeats) for name in METHODS}
    full_s = usages["full-prefill"].ttft_s
    return {
        name: {
            "ttft_s": usage.ttft_s,
            "ttft_over_full": usage.ttft_s / full_s,
            "ttft": asdict(usage.ttft),
            "recompute_ratio": usage.recompute_ratio,
            "context_tokens": usage.context_tokens,
            "chunk_hits": usage.chunk_hits,
            "chunk_misses": usage.chunk_misses,
            "bytes_read": usage.bytes_read,
        }
        for name, usage in usages.items()
    }


def fastest(engine: Engine, example: RagExample, method: str, repeats: int) -> Usage:
    """Usage of the fastest answer, after one that warms up kernels and the allocator."""
    answers = [engine.answer([example], method, max_new_tokens=8) for _ in range(repeats + 1)]
    return min((answer.usage for [answer] in answers[1:]), key=lambda usage: usage.ttft_s)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per word, so that the lengths of chunks are known."""
    words = {f"w{index}": index + 2 for index in range(min(size, 4096) - 2)}
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def random_example(shape: Shape) -> RagExample:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1000)}" for _ in range(count))

    chunks = [Chunk(words(shape.chunk)) for _ in range(shape.tokens // shape.chunk)]
    return RagExample(question=words(shape.question), chunks=tuple(chunks), answers=("w0",))
