"""Seconds and bytes of attention and of a training step."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from shape import Shape

from blocktune.attention import attach, dense_mask, make_plan
from blocktune.attention.kernels import Knobs
from blocktune.layout import LayerRule


def seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The fastest of some runs after two for warming up (compilation, caches)."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        timed()
    return min(timed() for _ in range(repeats))


def measure_attention(shape: Shape) -> dict:
    """Forward and backward of one attention layer: split and flex against SDPA, causal and masked.

    Flex is measured on CUDA only, the one place where it trains.
    """
    layout = shape.prompt().layout.to(shape.device)
    dim, draw = shape.hidden // shape.heads, torch.Generator(shape.device).manual_seed(0)

    def leaf(heads: int) -> torch.Tensor:
        size = (1, heads, layout.num_rows, dim)
        leaf = torch.randn(size, generator=draw, device=shape.device, dtype=shape.torch_dtype)
        return leaf.requires_grad_()

    leaves = [leaf(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    mask, knobs = dense_mask(layout), Knobs(scaling=dim**-0.5)

    def sdpa(**how) -> torch.Tensor:
        return F.scaled_dot_product_attention(*leaves, enable_gqa=True, **how)

    def planned(execution: str) -> Callable[[], torch.Tensor]:
        plan = make_plan(execution, layout)
        return lambda: plan.attend(*leaves, LayerRule(), knobs)

    def trained(forward: Callable[[], torch.Tensor]) -> float:
        return seconds(lambda: forward().float().sum().backward(), shape.device)

    result = {
        "rows": layout.num_rows,
        "full_s": trained(lambda: sdpa(is_causal=True)),
        "dense_s": trained(lambda: sdpa(attn_mask=mask)),
    }
    for name in ("split", "flex") if shape.device == "cuda" else ("split",):
        forward = planned(name)
        wrong_by = forward().transpose(1, 2) - sdpa(attn_mask=mask)
        result[f"{name}_max_abs_diff"] = wrong_by.abs().max().item()
        result[f"{name}_s"] = trained(forward)
        result[f"{name}_over_full"] = result[f"{name}_s"] / result["full_s"]
        result[f"{name}_over_dense"] = result[f"{name}_s"] / result["dense_s"]
    return result


def measure_training(shape: Shape) -> dict:
    """One LoRA step under split attention: forward, loss on the answer, backward, AdamW."""
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

    step_s = seconds(step, shape.device, repeats=3)
    result = {"rows": len(prompt.ids), "step_s": step_s, "tokens_per_s": len(prompt.ids) / step_s}
    result["losses"] = [loss.item() for loss in losses]
    if shape.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result
