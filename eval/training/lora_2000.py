"""Repeats the experiment that failed in the study: LoRA on 2,000 samples, tested on new worlds.

    python eval/training/lora_2000.py --jobs 2

Trains every recipe with every seed into out/study/RECIPE-SEED, chooses the best recipe on dev
worlds, evaluates all recipes on the same questions of test worlds, and writes lora-2000.json and
lora-2000.md. An interrupted run resumes with the same command. It fails if a recipe has changed
since its adapter was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from queries import BATCH, BLEND, FULL, NAIVE, ask, method_of, suite_of
from report import page_of
from runs import Run, cost_of, load_recipe, train_all
from scoring import Judge, choose

from blocktune.adapter import AdapterInfo
from blocktune.files import replace_json, replace_text
from blocktune.provenance import provenance

RECIPES = (
    "block_attention", "kvlink", "turborag", "kv_packet", "block_distill", "dual_mode",
    "recompute_aware", "full_control",
)  # fmt: skip
PLAIN = "block_attention"
"""The basic recipe, which the other recipes extend."""
PROGRAM = "python eval/training/lora_2000.py"


def main() -> int:
    args = parse()
    runs = [
        Run(path, seed, args.output, args.worlds) for path in args.recipes for seed in args.seeds
    ]
    try:
        train_all(runs, args.jobs)
        if not args.train_only:
            write(report(args, runs), args.results)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipes", nargs="+", default=RECIPES, help="names in recipes/, or YAML files")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two or more")
    add("--jobs", type=int, default=1, help="number of processes that train or answer at a time")
    add("--questions", type=int, default=2400, help="cross-chunk and 2-hop test questions")
    add("--alone", type=int, default=800, help="self-contained test questions")
    add("--dev-questions", type=int, default=600, help="questions that choose the best recipe")
    add("--worlds", default="", help="more options of all worlds, e.g. crowded=1; needs --output")
    add("--train-only", action="store_true", help="train without evaluating")
    add("--output", type=Path, default=Path("out/study"), help="folder for adapters and rows")
    add("--results", type=Path, default=Path("eval/results/training"), help="folder for the report")
    args = parser.parse_args()
    args.recipes = [_recipe(name) for name in args.recipes]
    if args.worlds and args.output == parser.get_default("output"):
        parser.error("--worlds trains other adapters; give them an --output of their own")
    if len(args.seeds) < 2:
        parser.error("--seeds needs two or more: one training run says little about a recipe")
    if missing := [str(path) for path in args.recipes if not path.is_file()]:
        parser.error(f"no recipe {missing[0]}")
    return args


def report(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """Chooses the best recipe on dev worlds and evaluates all recipes on test worlds."""
    served = {run.name: method_of(run) for run in runs}
    labels = {name: [f"{name}-{seed}" for seed in args.seeds] for name in served}
    reusing = {name: own for name, own in labels.items() if served[name] != FULL}
    if not reusing:
        raise ValueError("no recipe trains for reuse; name one besides the control")
    control = next((name for name in served if served[name] == FULL), None)
    model = _base(runs)
    dev = suite_of(model, runs, "dev", args.dev_questions, 0, False, args.worlds)
    best, on_dev = choose(ask(dev, args.output / "lora-2000-dev", args.jobs), reusing)
    test = suite_of(model, runs, "test", args.questions, args.alone, True, args.worlds)
    plain = PLAIN if PLAIN in reusing else None
    judge = Judge(ask(test, args.output / "lora-2000-test", args.jobs), labels, plain)
    costs = {run.folder.name: cost_of(run) for run in runs}
    recipes = {
        name: {"recipe": name, "method": served[name]}
        | judge.recipe(name, control)
        | {"cost": _mean_cost(costs, own)}
        for name, own in reusing.items()
    }
    return {
        "best": recipes[best],
        "full_prefill": judge.score(FULL),
        "cacheblend": judge.score(BLEND) | {"ratio": 0.15},
        "naive": judge.score(NAIVE),
        "control": control and _control(judge, control, costs, labels[control]),
        "recipes": recipes,
        "runs": [_run(judge, run, served, costs) for run in runs],
        "chosen_on": {"source": dev["tasks"][0]["source"], "adjusted_f1": on_dev},
        "asked_on": [task["source"] for task in test["tasks"]],
        "provenance": provenance(0, [*PROGRAM.split(), *sys.argv[1:]])
        | {"batch_size": BATCH, "adapters": _origins(runs)},
    }


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / "lora-2000.json", results)
    replace_text(folder / "lora-2000.md", page_of(results))
    print(page_of(results))


def _control(judge: Judge, name: str, costs: dict, labels: Sequence[str]) -> dict[str, Any]:
    seeds = {label: judge.score(label)["adjusted_f1"] for label in labels}
    cost = _mean_cost(costs, labels)
    return {"recipe": name, "method": FULL, **judge.score(name), "seeds": seeds, "cost": cost}


def _run(judge: Judge, run: Run, served: dict[str, str], costs: dict) -> dict[str, Any]:
    name = run.folder.name
    about = {"recipe": run.name, "seed": run.seed, "method": served[run.name]}
    return about | judge.score(name) | {"cost": costs[name]}


def _mean_cost(costs: dict[str, dict], labels: Sequence[str]) -> dict[str, float]:
    own = [costs[label] for label in labels]
    return {key: round(fmean(cost[key] for cost in own)) for key in own[0]}


def _origins(runs: Sequence[Run]) -> dict[str, Any]:
    """Commits and data of the training runs: an adapter may be older than this code."""
    infos = {run.folder.name: AdapterInfo.load(run.folder).training for run in runs}
    return {
        name: {key: info.get(key) for key in ("commit", "data")} for name, info in infos.items()
    }


def _base(runs: Sequence[Run]) -> str:
    bases = {load_recipe(run.recipe)["model_name_or_path"] for run in runs}
    if len(bases) != 1:
        raise ValueError(f"the recipes train different base models: {', '.join(sorted(bases))}")
    return bases.pop()


def _recipe(name: str) -> Path:
    return Path(name) if name.endswith((".yaml", ".yml")) else Path("recipes") / f"{name}.yaml"


if __name__ == "__main__":
    sys.exit(main())
