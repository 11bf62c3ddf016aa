"""Study on real questions: recipes of tuning compared with training-free methods.

    python eval/real/study.py all --settings gpu --data DATA --output out/real

The steps, in order; each can be repeated, and continues where it stopped:

    prepare    questions with hard distractors, split into base, rows, choice and test
    base       RAG base: LoRA in full attention on real questions, merged in float32
    choice     check that the base reads: full prefill, no context, naive, CacheBlend
    tune       all recipes, from the base, on the same rows
    test       all methods and recipes on the test questions
    kept       only on request, after test: recipes and CacheBlend on every multi-hop
               question that the base answers, for adjusted F1 with test_limit set
    long       main methods and recipes over 20 and more passages, up to 8k tokens
    place      the same with the evidence first, in the middle or last
    report     tables with paired intervals, as Markdown and JSON

All numbers of a run are in settings.yaml. Changed settings need a new --output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from prepare import PLACES, prepare, prepare_long
from report import MULTI_HOP, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
STEPS = ("prepare", "base", "choice", "tune", "test", "long", "place", "report")
SETS = ("hotpotqa", "2wiki", "squad", "musique")
"""Data sets. The last is neither trained on nor used to choose settings."""
INSTRUCTION = "Answer the question from the passages below. Give only the answer, in a few words."
RECIPES = {
    "block_attention": "block-attention",
    "block_attention_wide": "block-attention",
    "block_attention_layers": "block-attention",
    "block_attention_rate": "block-attention",
    "block_distill": "block-attention",
    "block_distill_wide": "block-attention",
    "kvlink": "kvlink",
    "kvlink_wide": "kvlink",
    "turborag": "turborag",
    "turborag_wide": "turborag",
    "kv_packet": "kv-packet",
    "writer": "block-attention",
    "writer_packet": "kv-packet",
    "writer_answers": "block-attention",
    "writer_links": "kvlink",
    "full_control": "full-prefill",
    "full_control_wide": "full-prefill",
}
"""Recipe -> the method that serves it."""
WIDE = {"learning_rate": 1e-3, "lora_target_modules": "all-linear"}
"""Options of the writer, with which other recipes are trained, too."""
VARIANTS = {
    "block_attention_wide": ("block_attention", WIDE),
    "block_attention_layers": ("block_attention", {"lora_target_modules": "all-linear"}),
    "block_attention_rate": ("block_attention", {"learning_rate": 1e-3}),
    "block_distill_wide": ("block_distill", WIDE),
    "kvlink_wide": ("kvlink", WIDE),
    "turborag_wide": ("turborag", WIDE),
    "full_control_wide": ("full_control", WIDE),
    "writer_packet": ("writer", WIDE | {"num_headers": 8, "num_trailers": 8}),
    "writer_answers": ("writer", WIDE | {"distill_weight": 0.0}),
    "writer_links": ("writer", WIDE | {"distill_weight": 0.0, "num_links": 5}),
}
"""Recipes that use the file of another recipe, with other options."""
BLENDED = ("block_attention", "block_distill")
"""Recipes that are also served with CacheBlend, which recomputes 15 %."""
UNTUNED = [
    "full-prefill",
    "no-context",
    "naive",
    {"name": "epic", "label": "epic 15 %", "params": {"share": 0.15}},
    {"name": "cacheblend", "label": "cacheblend 15 %", "params": {"ratio": 0.15}},
    "psr",
    {"name": "cache-craft", "params": {"warm_up": 1}, "budget": 0.15},
    {"name": "prophetkv", "label": "prophetkv 15 %", "params": {"ratio": 0.15}},
    "infoflow",
    "a3",
    "agentkvshift",
    "relaxkv",
    {"name": "fusionrag", "params": {"neighbours": 5}},
]
"""Methods without training. cache-craft takes every chunk from one earlier prompt; fusionrag's
neighbours come from the same batch. agentkvshift recomputes twice 10 % of a chunk, others 15 %."""
CHOICE = [UNTUNED[0], UNTUNED[1], UNTUNED[2], UNTUNED[4]]
LONG = [*UNTUNED[:5], UNTUNED[7], UNTUNED[8]]
LONG_TUNED = ("block_attention", "block_distill", "kvlink", "writer", "full_control")


def convert(gguf: Path, output: Path) -> None:
    """Converts a Llama in GGUF to a float32 checkpoint (needs the package ``gguf``).

    The weights are copied into a new model, since `save_pretrained` refuses one read from GGUF.

    Args:
        gguf: The file; quantised weights are dequantised to float32.
        output: Folder for the checkpoint.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "model_type", "transformers_version"):
        config.pop(key, None)
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 12)  # GGUF stores it as float32
    model = LlamaForCausalLM(LlamaConfig(**config | {"architectures": ["LlamaForCausalLM"]}))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = config["eos_token_id"]
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


class Study:
    """One run of the study: its settings, paths and steps."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.output
        self.settings = yaml.safe_load((HERE / "settings.yaml").read_text())[args.settings]
        self.settings["model"] = args.model or self.settings["model"]
        self.seeds = self.settings["seeds"]
        self.names = args.recipes or list(RECIPES)

    def check(self) -> None:
        """Raises ValueError if data or weights in the output folder have other settings."""
        settings = {key: self.settings[key] for key in ("model", "prepare", "base", "tune")}
        path = self.out / "settings.yaml"
        if not path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        elif yaml.safe_load(path.read_text()) != settings:
            raise ValueError(f"{path} differs from '{self.args.settings}'; use a new --output")

    def prepare(self) -> None:
        if (self.out / "data/counts.json").exists():
            return
        if not self.args.data:
            raise ValueError("prepare needs --data, the folder of the data sets; see README.md")
        print(prepare(self.args.data, self.out / "data", self.settings["prepare"]))

    def prepare_long(self) -> dict[str, Any]:
        """Writes the data of `long` and `place`, if not done; returns their settings."""
        settings = self.settings["long"]
        if not (self.out / f"data/last-{settings['place']}").exists():
            if not self.args.data:
                raise ValueError("long and place need --data, the folder of the data sets")
            print(prepare_long(self.args.data, self.out / "data", self.settings))
        return settings

    def base(self) -> None:
        adapter = self.out / "base-adapter"
        options = {"train_data": self.out / "data/base.jsonl"} | self.settings["base"]
        self.train("full_control", adapter, self.settings["model"], options, 0)
        if not (self.out / "base/config.json").exists():
            # in float32: bfloat16 would round away part of the adapter
            self.run("merge", adapter, "--output", self.out / "base", "--dtype", "float32")

    def choice(self) -> None:
        limit = self.settings.get("choice_limit")
        for number in self.settings["passages"]:
            self.ask(f"choice-{number}", CHOICE, limit, SETS[:-1])

    def tune(self) -> None:
        options = {"train_data": self.out / "data/rows.jsonl"} | self.settings["tune"]
        model = self.out / "base"
        with ThreadPoolExecutor(self.args.jobs) as pool:
            runs = [(name, seed) for seed in self.seeds for name in self.names]
            list(pool.map(lambda r: self.train(r[0], self.adapter(*r), model, options, r[1]), runs))
        for adapter in [self.adapter(*run) for run in runs if run[0] == "writer"]:
            # checks, among others, that full attention is bit-identical to the base
            self.run("check", "--model", model, "--adapter", adapter, "--dtype", "float32")

    def test(self) -> None:
        tuned = self.tuned(self.names)
        for entry in list(tuned):
            if entry["label"] in BLENDED:
                tuned.append(entry | UNTUNED[4] | {"label": f"{entry['label']} + 15 %"})
            if entry["label"] in ("block_attention", "writer"):
                label = f"{entry['label']} in full"
                tuned.append(entry | {"name": "full-prefill", "label": label})
        for number in self.settings["passages"]:
            self.ask(f"test-{number}", UNTUNED + tuned, self.settings.get("test_limit"), SETS)

    def kept(self) -> None:
        """Asks all that adjusted F1 needs: the multi-hop questions that the base answers."""
        for number in self.settings["passages"]:
            source, every, kept = (f"{part}-{number}" for part in ("test", "every", "kept"))
            if not self.args.plan:
                keep_rows(self.out / source, self.out / every)
            self.ask(every, UNTUNED[:1], None, MULTI_HOP, source)
            if not self.args.plan:
                keep_questions(self.out, source, every, kept)
            self.ask(kept, [UNTUNED[0], UNTUNED[4], *self.tuned(self.names)], None, MULTI_HOP)

    def long(self) -> None:
        settings = self.prepare_long()
        methods = LONG + self.tuned([n for n in self.names if n in LONG_TUNED])
        for number in settings["passages"]:
            self.ask(f"long-{number}", methods, settings["limit"], SETS)

    def place(self) -> None:
        settings = self.prepare_long()
        methods = LONG + self.tuned([n for n in self.names if n in LONG_TUNED])
        for place in PLACES:
            self.ask(f"{place}-{settings['place']}", methods, settings["limit"], SETS)

    def tuned(self, names: list[str]) -> list[dict[str, Any]]:
        """Suite entries of the given recipes, of those that are trained."""
        tuned: list[dict[str, Any]] = []
        for name in names:
            trained = [seed for seed in self.seeds if _is_complete(self.adapter(name, seed))]
            if len(trained) == 1:
                which = {"adapter": str(self.adapter(name, trained[0]))}
            elif trained:
                which = {"adapter": str(self.adapter(name, "{seed}")), "seeds": trained}
            else:
                continue
            tuned.append({"name": RECIPES[name], "label": name} | which)
        return tuned

    def report(self) -> None:
        write_report(self.out, self.args.results, self.args.settings, self.args.steps)

    def adapter(self, name: str, seed: int | str) -> Path:
        return self.out / "tuned" / f"{name}-{seed}"

    def train(self, recipe: str, folder: Path, model: Any, options: dict, seed: int) -> None:
        """Trains one adapter, unless it is complete; continues from its last checkpoint."""
        if _is_complete(folder):
            return
        file, variant = VARIANTS.get(recipe, (recipe, {}))
        path = Path("recipes") / f"{file}.yaml"
        if not yaml.safe_load(path.read_text()).get("use_peft"):
            options = {k: v for k, v in options.items() if not k.startswith(("lora_", "learning_"))}
        options = {"model_name_or_path": model, **options, "instruction": INSTRUCTION, "seed": seed}
        options |= variant
        options |= self.settings.get("recipes", {}).get(recipe, {})
        if list(folder.glob("checkpoint-*")):
            options["resume_from_checkpoint"] = True
        words = [w for key, value in options.items() for w in (f"--{key}", str(value))]
        self.run("train", "--config", path, "--output_dir", folder, *words, log=f"{folder}.log")

    def ask(
        self,
        part: str,
        methods: list,
        limit: int | None,
        sets: tuple[str, ...],
        source: str | None = None,
    ) -> None:
        """Runs `blocktune eval` on a part of the data, or on that of ``source``."""
        sets = tuple(name for name in sets if name in (self.args.sets or sets))
        if wanted := self.args.methods:
            labels = [m if isinstance(m, str) else m.get("label", m["name"]) for m in methods]
            if unknown := sorted(set(wanted) - set(labels)):
                raise ValueError(f"--methods {unknown}: {part} asks {', '.join(labels)}")
            methods = [m for m, label in zip(methods, labels, strict=True) if label in wanted]
        tasks = [
            {"task": "eval/tasks/jsonl.yaml", "name": name}
            | {"source": str(self.out / f"data/{source or part}/{name}.jsonl")}
            | ({"limit": limit} if limit else {})
            for name in sets
        ]
        suite = {"model": str(self.out / "base"), "dtype": self.settings["dtype"]}
        suite |= {"methods": methods, "tasks": tasks, "ttft": {"num": self.settings["ttft"]}}
        folder = self.out / part
        folder.mkdir(exist_ok=True)
        path = folder / "suite.yaml"
        path.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
        self.run("eval", "--suite", path, "--output", folder)

    def run(self, *words: Any, log: str | None = None) -> None:
        """Runs `blocktune`, or with --plan only prints the command."""
        command = [sys.executable, "-m", "blocktune.cli", *map(str, words)]
        if words[0] == "eval" and self.args.jobs > 1:  # one small model leaves a GPU mostly idle
            start = f"-m torch.distributed.run --standalone --nproc_per_node {self.args.jobs}"
            command[1:1] = start.split()
        print(shlex.join(["python", *command[1:]]), flush=True)
        if self.args.plan:
            return
        if log:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log or os.devnull, "a") as file:
            to = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
            if subprocess.run(command, check=False, **to).returncode:
                raise ValueError(f"this command failed{f', see {log}' if log else ''}")


def keep_rows(source: Path, target: Path, ids: set[tuple[str, str]] | None = None) -> None:
    """Copies rows of multi-hop questions (those of ``ids``), so that they are not asked again."""
    (target / "rows").mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("rows/*.jsonl")):
        if ".part" in path.name or (target / "rows" / path.name).exists():
            continue
        rows = [(json.loads(line), line) for line in path.read_text().splitlines(keepends=True)]
        lines = [
            line
            for row, line in rows
            if row["task"] in MULTI_HOP and (ids is None or (row["task"], row["id"]) in ids)
        ]
        (target / "rows" / path.name).write_text("".join(lines), encoding="utf-8")


def keep_questions(out: Path, source: str, every: str, kept: str) -> None:
    """Writes the data of ``kept``: the questions whose F1 is above 0 in the rows of ``every``."""
    rows = map(json.loads, (out / every / "rows/full-prefill.jsonl").read_text().splitlines())
    ids = {(row["task"], row["id"]) for row in rows if row["f1"] > 0}
    (out / "data" / kept).mkdir(exist_ok=True)
    for name in MULTI_HOP:
        lines = (out / f"data/{source}/{name}.jsonl").read_text().splitlines(keepends=True)
        wanted = [line for line in lines if (name, str(json.loads(line)["id"])) in ids]
        (out / f"data/{kept}/{name}.jsonl").write_text("".join(wanted), encoding="utf-8")
    keep_rows(out / every, out / kept, ids)


def _is_complete(folder: Path) -> bool:
    """Whether a training has finished, which writes its state last."""
    return (folder / "trainer_state.json").exists() and (folder / "blocktune.json").exists()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("steps", nargs="+", choices=(*STEPS, "kept", "all"))
    add("--settings", default="gpu", help="gpu, cpu or dry, of settings.yaml")
    add("--data", type=Path, help="folder of the data sets (prepare, long and place)")
    add("--model", help="folder or name on the Hub; default: the settings' base model")
    add("--gguf", type=Path, help="convert this file into the folder --model first")
    add("--output", type=Path, default=Path("out/real"), help="data, weights and rows")
    add("--results", type=Path, default=Path("eval/results/real"), help="tables")
    add("--recipes", nargs="+", choices=RECIPES, help="tune and test only these")
    add("--methods", nargs="+", help="ask only these, by label, such as 'cacheblend 15 %%'")
    add("--sets", nargs="+", choices=SETS, help="ask only questions of these data sets")
    add("--jobs", type=int, default=1, help="number of parallel trainings or evaluation processes")
    add("--plan", action="store_true", help="print the commands of the steps after prepare")
    args = parser.parse_args()
    study = Study(args)
    try:
        if args.gguf and not (Path(args.model) / "config.json").exists():
            convert(args.gguf, Path(args.model))
        study.check()
        for step in STEPS if "all" in args.steps else args.steps:
            getattr(study, step)()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
