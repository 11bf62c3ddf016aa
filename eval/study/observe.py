"""The observations of arXiv:2603.20218 on any model and any questions: one run, one page.

    python eval/study/observe.py --model out/real/base --data out/real/data/test-5/hotpotqa.jsonl \\
      --limit 100 --output out/study-real --results eval/results/real/study
    ... --adapter block_attention=out/real/tuned/block_attention-0      # observation 7
    ... --limit 0 --states 6                                # cached states alone, no answers

Answers all methods (resumable, under --output), measures cached states by layer, and writes the
page: what the study says, our numbers with paired intervals, its figures, and what follows by a
rule that is written there. Questions are as `load_examples` reads them; the answer is a few words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from page_figures import cost, draw_cumulative, draw_deviation, draw_overlap, layers
from page_tables import choice, f1, origin, pairs, scores
from states import RATIO, Deviation, by_layer, chosen_tokens, deviation
from transformers import AutoConfig

from blocktune.commands.options import quiet_libraries
from blocktune.evaluation.prepare import Ready, prepare
from blocktune.evaluation.report.terminal import run_and_show
from blocktune.evaluation.results import mean_of
from blocktune.evaluation.suite import load_suite
from blocktune.files import replace_json, replace_text
from blocktune.methods import build
from blocktune.provenance import provenance, public

METHODS: Mapping[str, dict[str, Any]] = {
    "full-prefill": {},
    "no-context": {},
    "naive": {},
    "cacheblend": {"budget": RATIO},
    "cacheblend-paper": {"budget": RATIO},
    "random": {"budget": RATIO},
    "oracle": {"budget": RATIO},
    "link0": {},
    "epic": {"budget": RATIO},
    "cacheclip": {"budget": RATIO},
    "prophetkv": {"budget": RATIO},
    "ape": {},
    "s+p": {},
    "psr": {"budget": RATIO},
    "agentkvshift": {},
}
"""All at the study's 15 % of the tokens, where they recompute any."""
STATES = ("naive", "link0")
CLAIMS = {
    1: "Beginnings of chunks deviate most: a chunk alone has an attention sink of its own, and "
    "nothing before its first tokens.",
    2: "The best choice changes from layer to layer: 8 to 20 % of the tokens that one layer "
    "chooses are chosen by all.",
    3: "Removing the sink is not enough: Link0 smooths the deviation, and stays below what "
    "recomputes; recomputing beginnings alone (EPIC) is not enough either.",
    4: "Selecting at the last layer is no silver bullet: what it chooses overlaps more with other "
    "layers, but few of its tokens matter early. CacheClip (here asking the model itself, a bound) "
    "stays below full prefill.",
    5: "Choosing again at a deeper layer (DroidSpeak, adapted) needs cached cross-attention: it is "
    "worse than CacheBlend.",
    6: "Cross-chunk attention is paramount: APE beats naive reuse and stays below CacheBlend.",
    7: "Fine-tuning is hard to do: on 2,000 samples it is no better than naive reuse.",
    8: "Blanks, scaled attention and recomputation together (PSR) beat each alone.",
}
COMPARED = {
    3: [("link0", "naive"), ("link0", "cacheblend"), ("epic", "full-prefill")],
    4: [("cacheclip", "cacheblend"), ("cacheclip", "full-prefill"), ("prophetkv", "cacheblend")],
    5: [("droidspeak-clc", "cacheblend")],
    6: [("ape", "naive"), ("ape", "cacheblend")],
    8: [("psr", "cacheblend"), ("psr", "s+p"), ("psr", "full-prefill")],
}
"""First minus second, by observation; tuned weights add those of observation 7."""


def make_suite(given: argparse.Namespace) -> dict[str, Any]:
    """The suite that is run."""
    methods = [{"name": name, "label": name} | more for name, more in METHODS.items()]
    # The study's sixth layer, or the last but two of a shallower model.
    depth = AutoConfig.from_pretrained(given.model).get_text_config().num_hidden_layers
    again = {"name": "droidspeak-clc", "params": {"restart_layer": max(2, min(5, depth - 2))}}
    methods.append(again | {"label": "droidspeak-clc"})
    for text in given.adapter:
        label, _, folder = text.partition("=")
        if not folder:
            raise ValueError(f"--adapter must be LABEL=FOLDER, got '{text}'")
        methods.append({"name": given.served, "label": label, "adapter": folder})
        blend = {"name": f"{given.served} + deviation 15 %", "label": f"{label} + deviation"}
        methods.append(blend | {"adapter": folder})
    task = {"task": "eval/tasks/jsonl.yaml", "name": given.data.stem, "source": str(given.data)}
    return {
        "model": given.model,
        "dtype": given.dtype,
        "methods": methods,
        "tasks": [task | {"limit": given.limit or given.states}],
        "ttft": {"num": 0},
        "fidelity": {"num": 0},
    }


def states_of(ready: Ready, number: int) -> dict[str, Any]:
    """Each of `STATES` by layer, means over the first prompts."""
    [task] = ready.suite.tasks
    found = {}
    for spec in ready.suite.methods:
        if spec.label in STATES:
            method, engine = ready.methods[spec.label], ready.engine(spec, task)
            examples = ready.of(task, number)
            found[spec.label] = mean_of([by_layer(engine, one, method) for one in examples])
    return found


def one_prompt(ready: Ready) -> dict[str, Deviation]:
    """The deviation of every token of the first question, for figures 3 and 4."""
    [task] = ready.suite.tasks
    [example] = ready.of(task, 1)
    specs = {spec.label: spec for spec in ready.suite.methods}
    full = build("full-prefill")
    return {
        name: deviation(ready.engine(specs[name], task), example, ready.methods[name], full)
        for name in STATES
    }


def draw(results: Mapping[str, Any], prompt: Mapping[str, Deviation], folder: Path) -> None:
    """All figures, numbered as the study's."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [m for m in results["methods"] if m not in ("no-context", "s+p", "cacheblend-paper")]
    if is_answered(results):
        cost(results, folder / "cost.png", shown)
    layers(results, folder / "beginnings.png", list(STATES))
    chosen = chosen_tokens(prompt["naive"], RATIO)
    draw_deviation(chosen, folder / "figure-3.png", f"One prompt: highest {RATIO:.0%} by layer")
    keys = {name: chosen_tokens(away, 1.0).deviation for name, away in prompt.items()}
    middle = len(keys["naive"]) // 2
    draw_cumulative(keys, folder / "figure-4.png", middle, f"One prompt, layer {middle}")
    overlap = results["methods"]["naive"]["fidelity"]["choice"]["overlap"]
    own = [row[1:] for row in overlap[1:]]
    draw_overlap(own, folder / "figure-5.png", "Choices shared by layers")


def is_answered(results: Mapping[str, Any]) -> bool:
    """Whether questions were answered, and not only cached states measured."""
    return "full-prefill" in results["methods"]


def of_states(number: int, results: Mapping[str, Any]) -> str:
    """What the states say of observations 1 to 4, in a sentence."""
    choice = {m: results["methods"][m]["fidelity"]["choice"] for m in STATES}
    naive = choice["naive"]
    first, chance = np.mean(naive["beginnings"][1:]), naive["first_share"]
    overlap = np.array(naive["overlap"])[1:, 1:]
    others = [np.delete(row, i).mean() for i, row in enumerate(overlap)]
    accrued = {m: np.mean(own["accrued"][1:]) for m, own in choice.items()}
    return {
        1: f"Of the {RATIO:.0%} of tokens that deviate most, {first:.0%} are among the first eight "
        f"of their chunk (mean over layers; by chance {chance:.0%}): "
        + ("**confirmed**." if first > 1.5 * chance else "**not seen here**."),
        2: f"{naive['constant']:.0%} of a layer's choice is every layer's: "
        + ("**confirmed**." if naive["constant"] < 0.3 else "**not seen here**."),
        3: f"The {RATIO:.0%} that deviate most hold {accrued['naive']:.0%} of the deviation by "
        f"naive reuse and {accrued['link0']:.0%} by Link0: "
        + ("smoother." if accrued["link0"] < accrued["naive"] else "not smoother."),
        4: f"The last layer's choice is shared by {others[-1]:.0%} of the others on average, that "
        f"of layer 1 by {others[0]:.0%}: "
        + ("as in the study." if others[-1] > others[0] else "the other way round."),
    }.get(number, "")


def page(results: Mapping[str, Any], tuned: Sequence[str], about: str) -> str:
    """The page's text; its figures lie beside it."""
    compared = dict(COMPARED)
    compared[7] = [(m, other) for m in tuned for other in ("naive", "cacheblend", "full-prefill")]
    figures = {
        1: ("figure-3.png", "beginnings.png"),
        2: ("figure-5.png",),
        3: ("figure-4.png",),
        6: ("cost.png",),
    }

    def shown(name: str) -> bool:
        return is_answered(results) or name != "cost.png"

    lines = ["# The study's observations, measured again", "", about, "", origin(results), ""]
    if is_answered(results):
        lines += ["A difference whose interval holds 0 is not shown by so few questions.", ""]
        lines += [scores(results), "", f1(results)]
    else:
        lines.append("No question was answered: what needs answers is left out.")
    for number, claim in CLAIMS.items():
        if number > 4 and not is_answered(results):
            break
        title = f"Observation {number}" if number < 8 else "Takeaway 3"
        lines += ["", f"## {title}", "", f"The study: {claim}", ""]
        lines += [f"![{title}]({name})\n" for name in figures.get(number, ()) if shown(name)]
        lines += [of_states(number, results), ""] if number in (1, 2, 3, 4) else []
        lines += [choice(results)] if number == 2 else []
        if not is_answered(results):
            continue
        if compared.get(number):
            lines.append(pairs(results, compared[number]))
        elif number == 7:
            lines.append("No tuned weights were given (`--adapter`).")
    return "\n".join(lines) + "\n"


DROPPED = ("sweeps", "budget")
"""Large, and read by no table; differences of the headline score stay, but not by kind."""


def kept(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` that is committed."""
    found = json.loads(json.dumps({k: v for k, v in results.items() if k not in DROPPED}))
    for summary in found["methods"].values():
        for cell in summary["tasks"].values():
            cell.pop("score_minus", None)
    return public(found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or name on the Hub")
    add("--data", type=Path, required=True, help="questions with chunks and answers")
    add("--limit", type=int, default=100, help="questions; 0 answers none")
    add("--states", type=int, default=20, help="questions whose cached states are measured")
    add("--adapter", action="append", default=[], help="LABEL=FOLDER, tuned; repeatable")
    add("--served", default="block-attention", help="the method that serves the adapters")
    add("--dtype", default="float32")
    add("--output", type=Path, required=True, help="rows of answers; a stopped run continues")
    add("--results", type=Path, required=True, help="page, figures and numbers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    quiet_libraries()
    try:
        given.output.mkdir(parents=True, exist_ok=True)
        path = given.output / "suite.yaml"
        replace_text(path, yaml.safe_dump(make_suite(given), sort_keys=False))
        suite = load_suite(path)
        command = ["python", "eval/study/observe.py", *(arguments or sys.argv[1:])]
        results = {"methods": {}, "provenance": provenance(0, command)}
        if given.limit:
            results = run_and_show(suite, given.output, "The study's methods", command)
        results, ready = kept(results), prepare(suite)
        for label, own in states_of(ready, min(given.states, given.limit or given.states)).items():
            results["methods"].setdefault(label, {"n": given.states})["fidelity"] = own
        draw(results, one_prompt(ready), given.results)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    replace_json(given.results / "observations.json", results)
    tuned = [text.partition("=")[0] for text in given.adapter]
    about = f"Model `{Path(given.model).name}`, questions `{given.data.stem}`."
    replace_text(given.results / "README.md", page(json.loads(json.dumps(results)), tuned, about))
    print(given.results / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
