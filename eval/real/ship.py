"""Folds a RAG base's adapter and one tuned on that base into one small adapter of the stock model.

    python eval/real/ship.py out/real/base-adapter out/real/tuned/block_attention-0 --rank 18 \\
      --output data/smollm2-block --base-model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --license apache-2.0

For each module, the sum of both LoRA products is approximated by a truncated SVD in bfloat16.
Modules that would lose more get higher ranks; the average is --rank. Prints the errors of the
products and of the logits on a probe, runs the checks of `blocktune push`, and writes a model card.
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
    """A truncated product ``B A`` of one module, and its error."""

    a: Tensor  # (R, in), bfloat16
    b: Tensor  # (out, R), bfloat16
    lost: float  # Frobenius norm of the error by truncation and rounding
    norm: float  # Frobenius norm of the exact product


def fold(pairs: list[tuple[Tensor, Tensor]], rank: int) -> Folded:
    """Finds the best approximation of a given rank for a sum of products, by a truncated SVD.

    Args:
        pairs: ``A`` ``(r, in)`` and ``B`` ``(out, r)`` of each product, scaled.
        rank: Rank of the result; padded with zeros if the sum has a lower rank.
    """
    a = torch.cat([a.double() for a, _ in pairs])
    b = torch.cat([b.double() for _, b in pairs], dim=1)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, singular, v = torch.linalg.svd(upper @ lower.T)
    roots = singular[:rank].sqrt()
    new_b = a.new_zeros(len(b), rank)
    new_a = a.new_zeros(rank, a.shape[1])
    new_b[:, : len(roots)] = left @ u[:, :rank] * roots
    new_a[: len(roots)] = (right @ v[:rank].T * roots).T
    new_a, new_b = new_a.bfloat16().contiguous(), new_b.bfloat16().contiguous()
    lost = float((new_b.double() @ new_a.double() - b @ a).norm())
    return Folded(new_a, new_b, lost, float(singular.norm()))


def share_out(spectra: dict[str, Tensor], sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Chooses ranks of modules that minimise the total error within a budget of parameters.

    Args:
        spectra: Singular values of each module's product, in descending order.
        sizes: Parameters per rank of each module.
        rank: Average rank; the budget is what this rank in every module would take.
    """
    left, ranks = rank * sum(sizes.values()), dict.fromkeys(spectra, 0)
    steps = [(float(s) ** 2 / sizes[m], m) for m, spectrum in spectra.items() for s in spectrum]
    for gain, module in sorted(steps, reverse=True):
        if gain > 0 and sizes[module] <= left:
            ranks[module] += 1
            left -= sizes[module]
    return {module: chosen for module, chosen in ranks.items() if chosen}


def read_lora(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads ``A`` and the scaled ``B`` of each module of a PEFT adapter.

    Raises:
        ValueError: If the adapter is not plain LoRA of a single rank.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    unsupported = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora")
    if present := [name for name in unsupported if config.get(name)]:
        raise ValueError(f"'{folder}' has {present[0]}; only plain LoRA of one rank can be folded")
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in load_file(folder / WEIGHTS).items():
        module, mark, kind = name.partition(".lora_")
        if not mark or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"'{folder}' holds '{name}'; only plain LoRA can be folded")
        modules[module][kind[0]] = weight
    scale = config["lora_alpha"] / divisor
    return {name: (pair["A"], pair["B"] * scale) for name, pair in modules.items()}


def ship(base: Path, tuned: Path, output: Path, rank: int, name: str) -> dict[str, float]:
    """Writes the folded adapter for the model that ``base`` was trained on.

    Args:
        base: Adapter of the RAG base.
        tuned: Adapter that was tuned on the merged base.
        output: New folder.
        rank: Average rank of the modules.
        name: Name of the stock model, written into the adapter.

    Returns:
        ``error``, the relative Frobenius norm of the error over all products; ``worst``, that of
        the worst module; ``bytes`` of the weights.

    Raises:
        ValueError: If one of the adapters cannot be folded, or the result is too large.
    """
    first, second = AdapterInfo.load(base), AdapterInfo.load(tuned)
    for folder, info in ((base, first), (tuned, second)):
        if info.scope != "both" or info.num_learned or info.quantization:
            raise ValueError(
                f"'{folder}' acts on some rows only, has learned tokens or a quantised base; "
                "give adapters of scope both on an unquantised base"
            )
    parts = [read_lora(base), read_lora(tuned)]
    modules = sorted(set().union(*parts))
    sums = {m: [part[m] for part in parts if m in part] for m in modules}
    spectra = {m: torch.linalg.svdvals(sum(b @ a for a, b in pairs)) for m, pairs in sums.items()}
    sizes = {m: pairs[0][0].shape[1] + pairs[0][1].shape[0] for m, pairs in sums.items()}
    ranks = share_out(spectra, sizes, rank)
    folded = {m: fold(pairs, ranks.get(m, 0)) for m, pairs in sums.items()}
    size = sum(2 * (f.a.numel() + f.b.numel()) for f in folded.values())
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
    by_name = {m.removeprefix("base_model.model."): chosen for m, chosen in ranks.items()}
    config["target_modules"] = list(by_name)
    config["rank_pattern"] = config["alpha_pattern"] = by_name  # alpha = rank: a scale of 1
    text = json.dumps(config, indent=2) + "\n"
    (output / CONFIG).write_text(text, encoding="utf-8")
    for path in tuned.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, output / path.name)
    result = {
        "error": math.hypot(*lost) / math.hypot(*norms),
        "worst": max(a / b for a, b in zip(lost, norms, strict=True) if b),
        "bytes": size,
    }
    origin = {"folded_from": [first.training, second.training], "rank": rank, **result}
    replace(
        second,
        base_model=name,
        base_revision=None,
        base_fingerprint=first.base_fingerprint,
        tokenizer_hash=first.tokenizer_hash,
        training=public({**second.training, **origin}),
    ).save(output)
    return result


@torch.no_grad()
def logits_off(model: str, base: Path, tuned: Path, output: Path) -> dict[str, float]:
    """Compares logits of the folded adapter and the two original ones on a probe, in float32."""

    def logits(*adapters: Path) -> Tensor:
        loaded, tokenizer = load_base(model, dtype="float32", device="cpu")
        for adapter in adapters:
            loaded, _ = load_adapter(loaded, tokenizer, adapter, merge=True)
        return loaded(tokenizer("\n".join(PROBE), return_tensors="pt")["input_ids"]).logits[0]

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
    args = parser.parse_args()
    quiet_libraries()
    try:
        model = args.model or AdapterInfo.load(args.base).base_model
        result = ship(args.base, args.tuned, args.output, args.rank, args.base_model)
        result |= logits_off(model, args.base, args.tuned, args.output)
        facts = CardFacts(args.base_model, args.license, tuple(args.dataset))
        repo = args.repo or f"USER/{args.output.name}"
        files = prepare(args.output, repo, facts, model=model, dtype="float32")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    (args.output / "README.md").write_bytes(files["README.md"])
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
