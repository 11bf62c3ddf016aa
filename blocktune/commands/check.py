"""`blocktune methods`, `check` and `profile-layers`: list methods and test them on a model."""

import json
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from blocktune.commands import options as opt
from blocktune.commands.application import command
from blocktune.commands.options import option


@command(
    "blocktune methods cacheblend deviation",
    "blocktune methods --plugin mine.py",
    "blocktune methods --json | jq '.[] | select(.kind == \"method\") | .name'",
    "Methods can be composed: 'kvlink + epic', 'block-attention + deviation 15 %'.",
)
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """List methods, selectors, repairs, reshapes and layouts, with requirements and parameters."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from blocktune.methods.describe import GROUPS, describe_all
    from blocktune.registry import require_one_of

    descriptions = describe_all()
    for name in names or ():
        require_one_of("a name", name, [entry.name for entry in descriptions])
    descriptions = [entry for entry in descriptions if not names or entry.name in names]
    if as_json:
        opt.tell(True, [entry._asdict() for entry in descriptions])
        return
    console = Console(highlight=False)
    for group, heading in GROUPS.items():
        entries = [entry for entry in descriptions if entry.group == group]
        if entries:
            console.print(Text(f"\n{heading}", style="bold"))
        for entry in entries:
            needed = f"  for {entry.weights}" * (entry.weights != "any")
            given = [f"  {n}=" + json.dumps(v).strip('"') for n, v in entry.parameters.items()]
            parts = (entry.name, "cyan"), (needed, "magenta"), *given
            console.print(Padding(Text.assemble(*parts), (0, 0, 0, 2)))
            about = f"{entry.summary} {entry.source}" if names else entry.summary
            console.print(Padding(Text(about, style="dim"), (0, 0, 0, 6)))


@command(
    "blocktune check --model data/tiny",
    "blocktune check --method 'naive + first-k 8'   # the contract of one method",
    "blocktune check --method mine --plugin mine.py",
    "blocktune check --model Qwen/Qwen3-8B --dtype float32 --json",
    "blocktune check --families --json   # every class of transformers",
    "blocktune check --families --only cohere --only gpt_oss",
    "The exit code is 0 if every check passed, else 1.",
)
def check(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    method: option(str | None, "Check this method instead, by default on a tiny model.") = None,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    families: option(bool, "Check tiny models of all causal LM classes.", "--families") = False,
    only: option(list[str] | None, "With --families: only this model type; repeatable.") = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check on your model that masks, relocation and caches match dense attention."""
    if only and not families:
        raise ValueError("--only selects model types for --families; add --families")
    unused = {"dtype": None if dtype == "auto" else dtype, "device": device, "quantize": quantize}
    unused |= {"model": model, "adapter": adapter, "method": method} if families else {}
    for name, value in unused.items():
        if value is not None and (families or (method and model is adapter is None)):
            raise ValueError(f"--{name} has no effect on the tiny models of this check; drop it")
    if families:
        from blocktune.check.families import check_families, model_types, table

        opt.quiet_libraries()
        names = model_types(only or ())
        results = list(opt.tracked(check_families(names), "checking", len(names)))
        opt.tell(as_json, {"families": [asdict(result) for result in results]}, table(results))
        raise typer.Exit(int(any(result.verdict == "wrong" for result in results)))
    from blocktune.adapter import find_release
    from blocktune.check import check_adapter, check_method, check_model
    from blocktune.methods import parse_method

    chosen = None if method is None else parse_method(method)
    opt.quiet_libraries()
    limit = None
    if chosen is None and adapter is not None and find_release(adapter) is None:
        checks = check_adapter(model, adapter, dtype=dtype, device=device, quantize=quantize)
    else:
        engine = None
        if chosen is None or model is not None or adapter is not None:
            engine = opt.load_engine(model, adapter, None, dtype, device, quantize)
            limit = engine.prompts.exact_tokens
        checks = check_model(engine) if chosen is None else check_method(chosen, engine)
    rows = []
    for result in checks:
        diff, bound = result.max_abs_diff, result.tolerance
        is_least = diff > bound if result.passed else diff < bound  # a NaN passes no check
        accepted = f"{'at least ' * is_least}{bound:.1e}"
        rows.append(("ok" if result.passed else "FAILED", result.name, f"{diff:.1e}", accepted))
    sound = all(result.passed for result in checks)
    where = "on this model" if chosen is None else f"by '{chosen.name}'"
    extent = "" if limit is None else f" up to {limit:,} tokens"
    line = f"Reuse {where} is sound{extent}." if sound else f"Do not serve: reuse {where} fails."
    table = opt.Table(("", "check", "difference", "tolerance"), rows, left=("check",))
    opt.tell(as_json, {"checks": [asdict(result) for result in checks]}, table, line)
    raise typer.Exit(0 if sound else 1)


@command(
    "blocktune profile-layers -m data/tiny -i 'worlds:dev?n=32'",
    "blocktune profile-layers -m M -i held_out.jsonl --limit 50 --most-layers 8 --json",
    "Use the result as parameters of the method:",
    "blocktune answer -m M -i q.jsonl --method 'droidspeak first_layer=9 ratio=0.125'",
)
def profile_layers(
    source: option(str, "Held-out questions: JSONL or `blocktune data` source.", "--input -i"),
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    limit: opt.Limit = None,
    most_layers: option(int | None, "Most layers in a range to try. Default: all.", min=1) = None,
    batch_size: opt.BatchSize = 8,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure which range of layers to recompute for all chunks: the profile for `droidspeak`."""
    from blocktune.commands.answering import read_examples
    from blocktune.evaluation.fidelity import profile_layers

    examples = read_examples(source, limit, None, [])
    engine = opt.load_engine(model, adapter, None, dtype, device, quantize)
    how = {"most_layers": most_layers, "batch_size": batch_size}
    bar = partial(opt.tracked, label="profiling")
    profile, rows = profile_layers(engine, examples, **how, progress=bar), []
    for point in (point for point in profile if point.efficient):
        layers = f"{point.first_layer}-{point.first_layer + point.num_layers - 1}"
        quality = f"{point.divergence:.4f}", f"{point.agreement:.0%}"
        rows.append((str(point.first_layer), f"{point.ratio:.4g}", layers, *quality))
    table = opt.Table(("first_layer", "ratio", "layers", "divergence", "agreement"), rows)
    opt.tell(as_json, [asdict(point) for point in profile], table)
