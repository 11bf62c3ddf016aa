"""Folds the adapter of a RAG base and one tuned on that base into a small one over the stock model.

    python eval/real/ship.py out/real/base-adapter out/real/tuned/block_attention-0 --rank 18 \\
      --output data/smollm2-block --base-model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --license apache-2.0

Of each module the sum of both products is cut by its singular values and kept in bfloat16; modules
whose sums lose more get higher ranks, on average --rank. Prints how far the products are off, and
the logits on a probe; then runs the checks of `blocktune push` and writes its card beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blocktune.adapter import AdapterInfo, load_adapter
from blocktune.adapter.merge import PROBE
from blocktune.commands.options import quiet_libraries
from blocktune.hub import CardFacts, prepare
from blocktune.models.load import load_base
from blocktune.provenance import public

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_BYTES = 12_000_000


class Folded(NamedTuple):
    """A product ``B A`` of one module, and what cutting and rounding changed of it."""

    a: Tensor  # (R, in), bfloat16
    b: Tensor  # (out, R), bfloat16
    lost: float  # Frobenius norm of the change
    norm: float  # and of the whole product


def fold(pairs: list[tuple[Tensor, Tensor]], rank: int) -> Folded:
    """The best product of a rank for a sum of products, by its singular values.

    Args:
        pairs: ``A`` ``(r, in)`` and ``B`` ``(out, r)`` of each product, scaled.
        rank: Of the result; zeros fill up what the sum does not have.
    """
    a = torch.cat([one.double() for one, _ in pairs])
    b = torch.cat([one.double() for _, one in pairs], dim=1)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    roots = sizes[:rank].sqrt()
    new_b = a.new_zeros(len(b), rank)
    new_a = a.new_zeros(rank, a.shape[1])
    new_b[:, : len(roots)] = left @ u[:, :rank] * roots
    new_a[: len(roots)] = (right @ v[:rank].T * roots).T
    new_a, new_b = new_a.bfloat16().contiguous(), new_b.bfloat16().contiguous()
    lost = float((new_b.double() @ new_a.double() - b @ a).norm())
    return Folded(new_a, new_b, lost, float(sizes.norm()))


def share_out(spectra: dict[str, Tensor], sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Ranks of modules that keep the most of their products together.

    Args:
        spectra: Singular values of each module's product, falling.
        sizes: Numbers that one rank of it takes.
        rank: All ranks take no more than this one everywhere would.
    """
    left, found = rank * sum(sizes.values()), dict.fromkeys(spectra, 0)
    steps = [(float(s) ** 2 / sizes[m], m) for m, own in spectra.items() for s in own]
    for gain, module in sorted(steps, reverse=True):
        if gain > 0 and sizes[module] <= left:
            found[module] += 1
            left -= sizes[module]
    return {module: own for module, own in found.items() if own}


def read_lora(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` and the scaled ``B`` of each module of a PEFT adapter.

    Raises:
        ValueError: If the adapter holds more than plain LoRA of one rank.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    more = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora")
    if held := [name for name in more if config.get(name)]:
        raise ValueError(f"'{folder}' has {held[0]}; only plain LoRA of one rank can be folded")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in load_file(folder / WEIGHTS).items():
        module, mark, kind = name.partition(".lora_")
        if not mark or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"'{folder}' holds '{name}'; only plain LoRA can be folded")
        found[module][kind[0]] = weight
    scale = config["lora_alpha"] / root
    return {name: (one["A"], one["B"] * scale) for name, one in found.items()}


def ship(base: Path, tuned: Path, output: Path, rank: int, name: str) -> dict[str, float]:
    """Writes the folded adapter for the model that ``base`` was trained on.

    Args:
        base: Adapter of the RAG base.
        tuned: Adapter that was tuned on the merged base.
        output: New folder.
        rank: Of the modules, on average.
        name: Of the stock model, for those who load the adapter.

    Returns:
        ``error``: norm of what all products lost together, of their norm; ``worst`` module's;
        ``bytes`` of the weights.

    Raises:
        ValueError: If one of the adapters cannot be folded, or the result is too large.
    """
    first, second = AdapterInfo.load(base), AdapterInfo.load(tuned)
    for folder, info in ((base, first), (tuned, second)):
        if info.scope != "both" or info.num_learned or info.quantization:
            raise ValueError(
                f"'{folder}' acts on some rows only, has learned tokens or a quantised base; "
                "fold adapters of scope both on a plain base"
            )
    parts = [read_lora(base), read_lora(tuned)]
    modules = sorted(set().union(*parts))
    sums = {m: [part[m] for part in parts if m in part] for m in modules}
    spectra = {m: torch.linalg.svdvals(sum(b @ a for a, b in own)) for m, own in sums.items()}
    sizes = {m: own[0][0].shape[1] + own[0][1].shape[0] for m, own in sums.items()}
    ranks = share_out(spectra, sizes, rank)
    folded = {m: fold(own, ranks.get(m, 0)) for m, own in sums.items()}
    size = sum(2 * (one.a.numel() + one.b.numel()) for one in folded.values())
    if size > MOST_BYTES:
        fits = rank * MOST_BYTES // size
        raise ValueError(f"rank {rank} takes {size:,} bytes, above {MOST_BYTES:,}; try {fits}")
    lost, norms = ([getattr(f, n) for f in folded.values()] for n in ("lost", "norm"))
    if not any(norms):
        raise ValueError(f"'{base}' and '{tuned}' change nothing: all their products are 0")
    output.mkdir(parents=True)
    tensors = {f"{m}.lora_{k}.weight": getattr(folded[m], k.lower()) for m in ranks for k in "AB"}
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / WEIGHTS).chmod(0o644)
    config = json.loads((tuned / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "base_model_name_or_path": name}
    named = {m.removeprefix("base_model.model."): own for m, own in ranks.items()}
    config["target_modules"] = list(named)
    config["rank_pattern"] = config["alpha_pattern"] = named  # a scale of 1
    text = json.dumps(config, indent=2) + "\n"
    (output / CONFIG).write_text(text, encoding="utf-8")
    for path in tuned.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, output / path.name)
    found = {
        "error": math.hypot(*lost) / math.hypot(*norms),
        "worst": max(a / b for a, b in zip(lost, norms, strict=True) if b),
        "bytes": size,
    }
    made = {"folded_from": [first.training, second.training], "rank": rank, **found}
    replace(
        second,
        base_model=name,
        base_revision=None,
        base_fingerprint=first.base_fingerprint,
        tokenizer_hash=first.tokenizer_hash,
        training=public({**second.training, **made}),
    ).save(output)
    return found


@torch.no_grad()
def logits_off(model: str, base: Path, tuned: Path, output: Path) -> dict[str, float]:
    """Compares the folded adapter with the two it was made of, in float32, on a probe."""

    def logits(*adapters: Path) -> Tensor:
        made, tokenizer = load_base(model, dtype="float32", device="cpu")
        for adapter in adapters:
            made, _ = load_adapter(made, tokenizer, adapter, merge=True)
        return made(tokenizer("\n".join(PROBE), return_tensors="pt")["input_ids"]).logits[0]

    wanted, got = logits(base, tuned), logits(output)
    return {
        "max_abs_logit": float(wanted.abs().max()),
        "max_abs_diff": float((got - wanted).abs().max()),
        "same_top1": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", type=Path, help="adapter of the RAG base")
    add("tuned", type=Path, help="adapter that was tuned on the merged base")
    add("--rank", type=int, required=True)
    add("--output", type=Path, required=True, help="new folder")
    add("--base-model", required=True, help="name of the stock model on the Hub, for the card")
    add("--license", required=True, help="of the adapter, such as apache-2.0")
    add("--dataset", action="append", default=[], help="on the Hub; repeatable")
    add("--model", help="the stock model to check on; default: what the base names")
    add("--repo", help="USER/NAME in the card; default: USER and the folder's name")
    given = parser.parse_args()
    quiet_libraries()
    try:
        model = given.model or AdapterInfo.load(given.base).base_model
        found = ship(given.base, given.tuned, given.output, given.rank, given.base_model)
        found |= logits_off(model, given.base, given.tuned, given.output)
        facts = CardFacts(given.base_model, given.license, tuple(given.dataset))
        repo = given.repo or f"USER/{given.output.name}"
        publication = prepare(given.output, repo, facts, model=model, dtype="float32")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    (given.output / "README.md").write_text(publication.card, encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
