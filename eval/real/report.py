"""Tables of a study: F1 by data set, adjusted F1 and PGR, with intervals paired over questions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from prepare import PLACES

FULL, NONE, BLEND = "full-prefill", "no-context", "cacheblend 15 %"
CONTROLS = ("full_control", "full_control_wide")
"""The first that a run has is its control."""
MULTI_HOP = ("hotpotqa", "2wiki", "musique")
DRAWS = 4000


def write_report(output: Path, results: Path, settings: str, steps: list[str]) -> None:
    """Writes ``SETTINGS.json`` and ``SETTINGS.md`` from the rows under ``output``.

    Raises:
        ValueError: If no method has answered yet.
    """
    report: dict[str, Any] = {"runs": {}}
    for folder in sorted(output.glob("*-*/rows")):
        report["runs"][folder.parent.name] = _run(folder.parent)
    if not report["runs"]:
        raise ValueError(f"{output} has no rows yet; run the steps choice or test first")
    report["trainings"] = {f.parent.name: _training(f) for f in sorted(_states(output))}
    counts = output / "data/counts.json"
    report["data"] = json.loads(counts.read_text()) if counts.exists() else None
    report["settings"] = settings
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report["provenance"] = {
        "command": f"python eval/real/study.py {' '.join(steps)} --settings {settings}",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {gpu}",
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{settings}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = _page(report)
    (results / f"{settings}.md").write_text(page, encoding="utf-8")
    print(page)


def _run(folder: Path) -> dict[str, Any]:
    """Scores of every method over the questions that all methods have answered."""
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    labels = [m if isinstance(m, str) else m.get("label", m["name"]) for m in suite["methods"]]
    rows = {label: _rows(folder / "rows", label) for label in labels}
    rows = {label: answered for label, answered in rows.items() if answered}
    if FULL not in rows:
        raise ValueError(f"{folder} has no rows of {FULL}, with which all methods are compared")
    common = [key for key in rows[FULL] if all(key in answered for answered in rows.values())]
    if not common:
        raise ValueError(f"{folder}: no question has been answered by all methods yet")
    f1 = {m: np.array([own[key]["f1"] for key in common]) for m, own in rows.items()}
    same = {
        m: float(np.mean([own[key]["answer"] == rows[FULL][key]["answer"] for key in common]))
        for m, own in rows.items()
    }
    sets = np.array([key[0] for key in common])
    cost = {
        m: float(np.mean([own[k]["recompute_ratio"] for k in common])) for m, own in rows.items()
    }
    measured = folder / "results.json"
    timed = json.loads(measured.read_text())["methods"] if measured.exists() else {}
    return {
        "questions": {name: int((sets == name).sum()) for name in dict.fromkeys(sets.tolist())},
        "methods": {
            method: _scores(method, f1, sets)
            | {"recomputed": cost[method], "same_answer_as_full": same[method]}
            | {"ttft_over_full": timed.get(method, {}).get("ttft_over_full_prefill")}
            for method in f1
        },
    }


def _rows(folder: Path, label: str) -> dict[tuple[str, str], dict]:
    """(data set, id) -> row, also from the per-process part files of an unfinished run."""
    paths = [folder / f"{label}.jsonl", *folder.glob(f"{label}.part*.jsonl")]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return {(row["task"], row["id"]): row for row in rows}


def _scores(method: str, f1: dict[str, np.ndarray], sets: np.ndarray) -> dict[str, Any]:
    """Scores by data set, over the multi-hop sets and over all sets, in [0, 1]."""
    parts = {name: sets == name for name in dict.fromkeys(sets.tolist())}
    parts |= {"multi-hop": np.isin(sets, MULTI_HOP), "all": np.ones(len(sets), bool)}
    return {name: _part(method, f1, mask) for name, mask in parts.items() if mask.any()}


def _part(method: str, f1: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    own, full = f1[method][mask], f1[FULL][mask]
    kept = full > 0
    scores = {
        "f1": _interval(own),
        "minus_full": _interval(own - full),
        "adjusted_f1": _interval(own[kept]),
        "kept": int(kept.sum()),
    }
    if BLEND in f1:
        scores["minus_cacheblend"] = _interval(own - f1[BLEND][mask])
    if NONE in f1:
        none = f1[NONE][mask]
        scores["pgr"] = _ratio(own - none, full - none)
    if control := next((name for name in CONTROLS if name in f1), None):
        # The filter is the base's full prefill, so it favours no recipe.
        scores["of_control"] = _ratio(own[kept], f1[control][mask][kept])
    return scores


def _draws(n: int) -> np.ndarray:
    """Bootstrap indices ``(DRAWS, n)``, the same for every method."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def _interval(values: np.ndarray) -> list[float] | None:
    """Mean and its 95 % interval, by a percentile bootstrap over questions."""
    if not len(values):
        return None
    means = values[_draws(len(values))].mean(1)
    return [float(values.mean()), *map(float, np.percentile(means, [2.5, 97.5]))]


def _ratio(above: np.ndarray, below: np.ndarray) -> list[float] | None:
    """Ratio of two means and its interval; None if the denominator may be 0."""
    if not len(above):
        return None
    drawn = _draws(len(above))
    denominator = below[drawn].mean(1)
    if (denominator <= 0).any():
        return None
    interval = np.percentile(above[drawn].mean(1) / denominator, [2.5, 97.5])
    return [float(above.mean() / below.mean()), *map(float, interval)]


def _states(output: Path) -> list[Path]:
    return [*output.glob("*/trainer_state.json"), *output.glob("tuned/*/trainer_state.json")]


def _training(path: Path) -> dict[str, Any]:
    """Commit, steps, tokens and losses of a finished training."""
    state = json.loads(path.read_text())
    logs = [entry for entry in state["log_history"] if "num_tokens" in entry]
    training = json.loads(path.with_name("blocktune.json").read_text())["training"]
    return {
        "commit": training["commit"],
        "steps": state["global_step"],
        "tokens": int(logs[-1]["num_tokens"]),
        "losses": [round(entry["loss"], 3) for entry in logs if "loss" in entry],
    }


def _page(report: dict[str, Any]) -> str:
    lines = [f"# Real questions, settings `{report['settings']}`", ""]
    where = report["provenance"]
    commit = (where["commit"] or "unknown")[:7]
    lines += [f"`{where['command']}` at `{commit}`, {where['machine']}.", ""]
    for name, run in report["runs"].items():
        asked = ", ".join(f"{key} {n}" for key, n in run["questions"].items())
        sets = [*run["questions"], "multi-hop"]
        head = ["method", *sets, "minus full", "adjusted", "PGR", "of control", "recomputed"]
        head += ["TTFT, of full", "same answer"]
        lines += [f"## {name}", "", f"Questions: {asked}. F1 in %, 95 % intervals.", ""]
        lines += [_line(head), _line(["---"] * len(head))]
        for method, scores in run["methods"].items():
            multi_hop = scores["multi-hop"]
            cells = [_points(scores[s]["f1"]) if s in scores else "" for s in sets]
            cells += [_points(multi_hop["minus_full"]), _points(multi_hop["adjusted_f1"])]
            cells += [_points(multi_hop.get("pgr")), _points(multi_hop.get("of_control"))]
            timed = scores["ttft_over_full"]
            cells += [f"{100 * scores['recomputed']:.0f} %", f"{timed:.2f}" if timed else ""]
            lines.append(_line([method, *cells, f"{100 * scores['same_answer_as_full']:.0f} %"]))
        lines.append("")
    lines += [
        "The columns after *multi-hop* are over those sets, the last three over all. *Same "
        "answer*: word for word that of the base's full prefill.",
        "",
    ]
    wide = {n: run for n, run in report["runs"].items() if n.startswith(("long-", *PLACES))}
    if wide:
        lines += ["## Many passages, and the place of the evidence", ""]
        lines += ["F1 over the multi-hop sets, in %.", "", _line(["method", *wide])]
        lines += [_line(["---"] * (len(wide) + 1))]
        for method in dict.fromkeys(m for run in wide.values() for m in run["methods"]):
            by_run = [run["methods"].get(method) for run in wide.values()]
            cells = [(scores and _points(scores["multi-hop"]["f1"])) or "" for scores in by_run]
            lines.append(_line([method, *cells]))
        lines.append("")
    for name, run in report["trainings"].items():
        commit = (run["commit"] or "unknown")[:7]
        lines.append(f"- `{name}`: {run['steps']} steps, {run['tokens']:,} tokens, at `{commit}`")
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _points(interval: list[float] | None) -> str:
    if interval is None:
        return ""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"
