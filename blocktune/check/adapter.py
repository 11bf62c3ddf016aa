"""Checks on an adapter: those of its model, and that it is served as stock PEFT runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import PEFT_FILE, load_model
from blocktune.check.serving import ASK, Check, check_model, difference, tolerance_of
from blocktune.engine import Engine
from blocktune.models.load import adapter_folder
from blocktune.prompt import make_pieces


@torch.no_grad()
def check_adapter(model: str | None, adapter: str | Path, **how: Any) -> list[Check]:
    """Runs `check_model`, and compares full prefill with stock PEFT, unmerged.

    Base (None: the adapter's own) and adapter are loaded twice, one after the other. ``how`` are
    ``dtype``, ``device`` and ``quantize``.
    """
    folder = adapter_folder(adapter)
    stock = _stock_logits(model, folder, how) if (folder / PEFT_FILE).is_file() else None
    engine = Engine.from_pretrained(model, folder, **how)
    checks = check_model(engine)
    if stock is None:
        return checks
    engine.forget()
    served = engine.next_logits([ASK], "full-prefill").cpu()
    moved, tolerance = difference(served, stock), tolerance_of(engine, stock)
    return [Check("full prefill = stock PEFT", moved <= tolerance, moved, tolerance), *checks]


def _stock_logits(model: str | None, folder: Path, how: dict[str, Any]) -> Tensor:
    """``(1, V)`` after the prompt of `ASK` in full attention."""
    fmt = AdapterInfo.load(folder).format
    peft, tokenizer, _, _ = load_model(model, folder, merge=False, **how)
    pieces = make_pieces(tokenizer, fmt, ASK.chunks, ASK.question, block=False)
    ids = [*pieces.prefix, *(token for chunk in pieces.chunks for token in chunk), *pieces.query]
    rows = torch.tensor([ids], device=peft.device)
    return peft(rows, use_cache=False).logits[:, -1].float().cpu()
