"""Records the numbers that a change of structure must not change, and compares with earlier ones.

    python tests/golden/record.py                # compares with tests/golden/golden.json
    python tests/golden/record.py --write        # records them anew: a deliberate act
    python tests/golden/record.py --only chunk presets   # some parts

What is recorded: losses of ten steps of every recipe; greedy tokens and recomputed tokens per
layer of every preset on 20 questions; scores and intervals of the quick suite on 50 questions;
the bytes of one encoded chunk. Three minutes on two cores, on data/tiny alone. Floats are
compared to 1e-6 relative, everything else exactly.

golden.json is of one processor. On another, losses differ by up to 2e-4, as rounding adds up over
ten steps. There, record the older commit with --write, and compare the newer one with that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
RECIPES = (
    "block_attention",
    "block_distill",
    "dual_mode",
    "full_control",
    "kv_packet",
    "kvlink",
    "recompute_aware",
    "turborag",
)
QUESTIONS = "worlds:test?seed=1&n=20&kinds=self-contained,cross-chunk,2-hop"
CHUNK = {"title": "Anna Belt", "text": "Anna Belt was born in Port Alder. She is a painter."}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
RELATIVE = 1e-6
PARAMETERS: dict[str, dict[str, Any]] = {  # what a model of four layers needs
    "cacheclip": {"auxiliary": str(ROOT / "data/tiny")},
    "droidspeak-clc": {"restart_layer": 2},
    "droidspeak": {"ratio": 0.5},
}


def blocktune(*arguments: str) -> str:
    command = [sys.executable, "-m", "blocktune.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def recipes(folder: Path) -> dict[str, list[float]]:
    """Recipe -> the loss of each of its first ten steps."""
    losses = {}
    for name in RECIPES:
        output = folder / name
        blocktune(
            "train",
            "--config",
            f"recipes/{name}.yaml",
            "--train_data",
            "worlds:train?seed=1&n=40&turns=8",
            *("--output_dir", str(output), "--max_steps", "10", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", "--save_strategy", "no"),
        )
        state = json.loads((output / "trainer_state.json").read_text())
        losses[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses


def presets(folder: Path) -> dict[str, Any]:
    """Preset -> the tokens of 20 greedy answers and what each computed per layer."""
    import torch

    from blocktune import Engine, available_methods, build_method, load_examples

    torch.set_num_threads(1)
    found = {}
    for name in available_methods():
        # Presets that need trained weights are asked of adapters of the recipes, ten steps old.
        adapter = {"kvlink": "kvlink", "kv-packet": "kv_packet", "turborag": "turborag"}.get(name)
        adapter = adapter or ("block_attention" if name == "block-attention" else None)
        engine = Engine.from_pretrained(
            str(ROOT / "data/tiny"),
            folder / adapter if adapter else None,
            dtype="float32",
            device="cpu",
        )
        method = build_method(name, **PARAMETERS.get(name, {}))
        answers = engine.answer(load_examples(QUESTIONS), method, max_new_tokens=12)
        usages = [getattr(answer, "usage", None) or answer.account for answer in answers]
        found[name] = {
            "tokens": [list(answer.token_ids) for answer in answers],
            "layer_tokens": [list(usage.layer_tokens) for usage in usages],
        }
    return found


def suite(folder: Path) -> dict[str, Any]:
    """Method -> scores and intervals of the quick suite."""
    output, settings = folder / "quick", folder / "quick.yaml"
    quick = yaml.safe_load((ROOT / "eval/suites/quick.yaml").read_text())
    quick["ttft"]["num"] = 0
    settings.write_text(yaml.safe_dump(quick))
    blocktune("eval", "--suite", str(settings), "--limit", "50", "--output", str(output))
    methods = json.loads((output / "results.json").read_text())["methods"]
    timed = ("ttft", "seconds", "time", "speed")
    return {label: _without(entry, timed) for label, entry in methods.items()}


def _without(value: Any, words: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without(inner, words)
        for key, inner in value.items()
        if not any(word in key for word in words) and not key.endswith("_s")
    }


def chunk(folder: Path) -> dict[str, Any]:
    """The tensors of one encoded chunk: names, shapes, types and SHA-256 of their bytes."""
    import torch
    from safetensors import safe_open

    from blocktune import Chunk, Engine

    torch.set_num_threads(1)
    engine = Engine.from_pretrained(
        str(ROOT / "data/tiny"), store=folder / "store", dtype="float32", device="cpu"
    )
    engine.encode([Chunk(CHUNK["text"], title=CHUNK["title"])])
    found = {}
    for path in sorted((folder / "store").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
                found[f"{tensor.shape[-2] if tensor.ndim > 1 else 0}/{name}"] = [
                    str(tensor.dtype),
                    list(tensor.shape),
                    digest,
                ]
    return found


PARTS = {"recipes": recipes, "presets": presets, "suite": suite, "chunk": chunk}


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two records differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        missing = object()
        return [
            line
            for key in keys
            for line in differences(old.get(key, missing), new.get(key, missing), f"{place}/{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]")]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (old, new))
    same = math.isclose(old, new, rel_tol=RELATIVE, abs_tol=1e-9) if numbers else old == new
    return [] if same else [f"{place}: {old!r} -> {new!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="record instead of comparing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    given = parser.parse_args()
    wanted = given.only
    if "presets" in wanted and "recipes" not in wanted:
        wanted = ["recipes", *wanted]  # its adapters
    os.environ.update(ENVIRONMENT)
    record = json.loads(given.golden.read_text()) if given.golden.exists() else {}
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for part in wanted:
            found = json.loads(json.dumps(PARTS[part](Path(name))))
            if not given.write:
                lines += differences(record.get(part), found, part)
            else:
                record[part] = found
            print(f"{part}: done", flush=True)
    if given.write:
        given.golden.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    for line in lines[:40]:
        print(line)
    if lines:
        raise SystemExit(f"{len(lines)} numbers differ from {given.golden}")
    print("recorded" if given.write else "all equal")


if __name__ == "__main__":
    main()
