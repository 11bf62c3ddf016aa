"""`blocktune eval`, `eval compare`, `eval arena`, `eval report`, `blocktune tune`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from blocktune.commands import options as opt
from blocktune.commands.application import app, command, resumable, teach
from blocktune.commands.options import option

EXAMPLES = teach(
    "blocktune eval --suite eval/suites/quick.yaml --output out/quick",
    "blocktune eval --suite eval/suites/quick.yaml --output out/try --limit 20",
    "blocktune eval --suite eval/suites/quick.yaml --output out/matched --layer-budget 0.4",
    "A stopped command continues where it stopped: repeat it. On several GPUs:",
    "  accelerate launch -m blocktune.cli eval --suite SUITE --output out/run",
    "blocktune eval compare out/before out/after",
    "blocktune eval report out/quick",
)
Run = Annotated[Path, Argument(help="The --output folder of a finished run.")]

group = typer.Typer(rich_markup_mode="rich")
app.add_typer(group, name="eval")


@group.callback(invoke_without_command=True, epilog=EXAMPLES)
def evaluate(
    context: typer.Context,
    suite: option(Path | None, "YAML file of methods and tasks; see eval/suites/.") = None,
    output: opt.to_folder("Folder for rows, results.json and plot.") = None,
    limit: option(int | None, "Only the first N questions of each task.", min=1) = None,
    model: option(str | None, "Overrides the suite's.", "--model -m") = None,
    device: option(str | None, "Overrides the suite's.") = None,
    quantize: option(str | None, "nf4 or int8; overrides the suite's.") = None,
    store: option(str | None, "Store of chunks, as in `answer`; overrides the suite's.") = None,
    budget: option(float | None, "Share that every selector may recompute.", min=0, max=1) = None,
    layer_budget: option(float | None, "The same, of layers times tokens.", min=0, max=1) = None,
) -> None:
    """Compare methods on the same questions: accuracy with intervals, cost, time to first token."""
    if context.invoked_subcommand is not None:
        if given := [name for name, value in context.params.items() if value is not None]:
            command = f"`blocktune eval {context.invoked_subcommand}`"
            raise ValueError(f"--{given[0].replace('_', '-')} has no effect on {command}; drop it")
        return
    if suite is None or output is None:
        raise ValueError("`blocktune eval` needs --suite FILE and --output FOLDER")
    opt.quiet_libraries()
    from blocktune.evaluation.report.terminal import run_and_show
    from blocktune.evaluation.suite import changed, load_suite

    given = {"model": model, "device": device, "quantize": quantize, "store": store}
    loaded = changed(load_suite(suite), limit, **given)
    loaded = at_one_budget(loaded, budget, layer_budget)
    with resumable(f"the rows so far are in {output}"):
        run_and_show(loaded, output, title=suite.stem)


def at_one_budget(suite, budget: float | None, layer_budget: float | None):
    """Gives every method of the suite that selects tokens the same budget."""
    from blocktune.methods import build_entry
    from blocktune.methods.select import takes_budget

    if budget is None and layer_budget is None:
        return suite
    share = f"{100 * (budget or layer_budget or 0):g} %"
    share += " of the layer-tokens" * (budget is None)

    def named(label):  # it may state another budget, as in ``naive + epic 15 %``
        return f"{label} at {share}" if {"%", "="} & set(label) else label

    takes = [takes_budget(build_entry(spec.entry()).select()) for spec in suite.methods]
    if not any(takes):
        raise ValueError("no method of the suite takes a budget; drop it, or add cacheblend")
    given = {"budget": budget, "layer_budget": layer_budget}
    methods = tuple(
        replace(spec, **given, label=named(spec.label)) if is_taken else spec
        for spec, is_taken in zip(suite.methods, takes, strict=True)
    )
    labels = {old.label: new.label for old, new in zip(suite.methods, methods, strict=True)}
    pool = {named(name): [labels[one] for one in own] for name, own in suite.pool.items()}
    return replace(suite, methods=methods, pool=pool)


@command("blocktune eval compare out/before out/after", of=group)
def compare(
    before: Run,
    after: Run,
    seed: option(int, "Random seed of the significance test.", min=0) = 0,
    as_json: opt.AsJson = False,
) -> None:
    """Compare two runs method by method, on the questions that both answered."""
    from blocktune.evaluation.compare import compare, compare_table

    changes = compare(before, after, seed=seed)
    table = compare_table(changes, before, after)
    opt.tell(as_json, [change._asdict() for change in changes], table)


@command(
    "git clone https://github.com/xishi404/KVShareArena",
    "blocktune eval arena --questions KVShareArena -m Qwen/Qwen3-8B --method naive -o out/arena",
    "kva validate out/arena/naive_re_hotpotqa.json",
    "A stopped command continues where it stopped: repeat it.",
    of=group,
)
def arena(
    questions: option(Path, "Clone of the KVShareArena repository."),
    output: opt.to_folder("Folder for the result files.", kind=Path),
    method: option(str, "A method, as in `blocktune answer`.") = "naive",
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    subset: option(list[str] | None, "qasper, multifieldqa_en or hotpotqa. Default: all.") = None,
    port: option(str, "Origin: official, port or reference.", "--provenance") = "port",
    limit: opt.Limit = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantize: opt.Quantize = None,
) -> None:
    """Answer the frozen questions of KVShareArena and write files for its leaderboard."""
    from blocktune.evaluation.arena import SUBSETS, load_exam, run_exam
    from blocktune.methods import parse_method

    chosen = parse_method(method)
    exams = [load_exam(questions, name) for name in subset or SUBSETS]
    engine = opt.load_engine(model, adapter, None, dtype, device, quantize, method=chosen)
    for exam in exams:
        with resumable(f"the rows so far are in {output}"):
            path = run_exam(engine, chosen, exam, output, limit, port)
        summary = json.loads(path.read_text())["summary"]
        score, share = 100 * summary["f1_raw"], summary["recompute_fraction"]
        typer.echo(f"{path}: F1 {score:.1f}, {share:.0%} recomputed, {summary['n']} questions")


@command("blocktune eval report out/quick", of=group)
def report(
    run: Run,
    title: option(str | None, "Title of the page. Default: the name of the folder.") = None,
) -> None:
    """Write the report of a run: one HTML file that works offline, and its plots as PNGs."""
    from blocktune.evaluation.report.page import write_report

    typer.echo(write_report(run, title))


@command(
    "blocktune tune --config eval/tuning/psr.yaml --output out/tuned",
    "torchrun --nproc_per_node 2 -m blocktune.cli tune --config eval/tuning/psr.yaml -o out/tuned",
    "A stopped command continues where it stopped: repeat it.",
)
def tune(
    config: option(Path, "YAML file of the run; see eval/tuning/."),
    output: opt.to_folder("Folder for rows and tuned.json.", kind=Path),
    limit: opt.Limit = None,
    model: option(str | None, "Overrides the YAML's.", "--model -m") = None,
    as_json: opt.AsJson = False,
) -> None:
    """Choose a method's parameters on held-out questions; test splits are refused."""
    from blocktune.evaluation import sweep
    from blocktune.tables import with_interval

    spec = sweep.load_tuning(config)
    task = replace(spec.task, limit=limit or spec.task.limit)
    spec = replace(spec, model=model or spec.model, task=task)
    opt.quiet_libraries()
    with resumable(f"the rows so far are in {output}"):
        result = sweep.tune(spec, output)
    if result is None:  # of several processes the main one reports
        return
    names, rows = list(result["best"]["values"]), []
    for point in result["points"]:
        score = with_interval("score", point["score"], point["score_ci95"])
        values = map(str, point["values"].values())
        rows.append((*values, score, f"{point['recompute_ratio']:.0%}"))
    headings = (*names, f"{result['task']['metric']} (95 %)", "recomputed")
    line = f"best: {result['best']['label']}; all points in {output / sweep.TUNED}"
    opt.tell(as_json, result, opt.Table(headings, rows, left=names), line)
