"""`blocktune figure`: the study's pictures on any model, and bars of finished results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blocktune.commands.options import Adapter, Device, Dtype, Model, quiet_libraries, teach

if TYPE_CHECKING:
    from blocktune.evaluation.choice import Chosen

Draw = Callable[["Chosen", Path, str], None]

Source = Annotated[
    str, typer.Option("--input", "-i", help="Questions: a file, a set's name or a generator.")
]
Index = Annotated[int, typer.Option(min=0, help="Which question, from 0.")]
Ratio = Annotated[float, typer.Option(help="Share of the tokens that counts as high.")]
Method = Annotated[str, typer.Option(help="Reuse that is compared with full prefill.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The picture, a PNG.")]
Run = Annotated[Path, typer.Argument(help="The --output folder of a finished run.")]
Score = Annotated[str, typer.Option(help="score, em, f1, substring_em or adjusted_f1.")]


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="Draw the study's figures on any model, or bars of finished results.",
    )
    ask = "--model data/tiny -i 'worlds:test?n=1'"
    for function, example in (
        (_of_choice("deviation", _deviation), f"blocktune figure deviation {ask} -o out/d.png"),
        (cumulative, f"blocktune figure cumulative {ask} --layer 1 -o out/cumulative.png"),
        (_of_choice("overlap", _overlap), f"blocktune figure overlap {ask} -o out/overlap.png"),
        (bars, "blocktune figure bars out/quick -o out/bars.png"),
        (psr, "blocktune figure psr out/psr -o out/psr.png"),
    ):
        group.command(function.__name__, epilog=teach(example))(function)
    app.add_typer(group, name="figure")


def _of_choice(name: str, draw: Draw) -> Callable[..., None]:
    """The command that draws which tokens of one question deviate most; its help is ``draw``'s."""

    def command(
        model: Model,
        source: Source,
        output: Output,
        index: Index = 0,
        method: Method = "naive",
        ratio: Ratio = 0.15,
        adapter: Adapter = None,
        dtype: Dtype = "auto",
        device: Device = None,
    ) -> None:
        from blocktune.evaluation.choice import chosen_tokens

        found = _measured(model, source, index, [method], adapter, dtype, device)
        draw(chosen_tokens(found[method], ratio), output, f"{method}: highest {ratio:.0%}")

    command.__name__, command.__doc__ = name, draw.__doc__
    return command


def _deviation(chosen: Chosen, output: Path, title: str) -> None:
    """Which tokens' keys deviate most from full prefill's, layer by layer (figure 3)."""
    from blocktune.evaluation.choice import beginnings_of
    from blocktune.evaluation.figure_states import draw_deviation

    typer.echo(draw_deviation(chosen, output, f"{title} by layer"))
    shares = ", ".join(f"{share:.0%}" for share in beginnings_of(chosen))
    typer.echo(f"of them first tokens of a chunk, by layer: {shares}")


def _overlap(chosen: Chosen, output: Path, title: str) -> None:
    """How many tokens chosen at one layer are chosen at another (figure 5)."""
    from blocktune.evaluation.figure_states import draw_overlap

    typer.echo(draw_overlap(chosen, output, title))


def cumulative(
    model: Model,
    source: Source,
    output: Output,
    index: Index = 0,
    method: Annotated[list[str] | None, typer.Option(help="Reuse to draw; repeat it.")] = None,
    layer: Annotated[int, typer.Option(min=0, help="Whose keys, from 0.")] = 1,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Deviation accrued over tokens, the highest first (figure 4, middle)."""
    from blocktune.evaluation.choice import chosen_tokens
    from blocktune.evaluation.figure_states import draw_cumulative

    names = method or ["naive", "link0"]
    found = _measured(model, source, index, names, adapter, dtype, device)
    keys = {name: chosen_tokens(away, 1.0).deviation for name, away in found.items()}
    layers = min(map(len, keys.values()))
    if layer >= layers:
        raise ValueError(f"--layer must be below the model's {layers} layers, got {layer}")
    typer.echo(draw_cumulative(keys, output, layer, f"Layer {layer}"))


def bars(
    run: Run,
    output: Output,
    score: Score = "score",
    method: Annotated[list[str] | None, typer.Option(help="A label to draw; repeat it.")] = None,
) -> None:
    """Methods side by side on every task of a finished run (figures 2 and 4 to 8)."""
    from blocktune.evaluation.compare import load_results
    from blocktune.evaluation.figure_bars import draw_bars

    typer.echo(draw_bars(load_results(run), output, score=score, methods=method, title=run.name))


def psr(run: Run, output: Output, score: Score = "score") -> None:
    """The ablation of prefix, scale and recompute in a finished run (figure 9)."""
    from blocktune.evaluation.compare import load_results
    from blocktune.evaluation.figure_bars import draw_bars, psr_methods

    results = load_results(run)
    shown = psr_methods(results)
    typer.echo(draw_bars(results, output, score=score, methods=shown, title="PSR's ablation"))


def _measured(
    model: str,
    source: str,
    index: int,
    methods: list[str],
    adapter: str | None,
    dtype: str,
    device: str | None,
) -> dict:
    """Each method's deviation from full prefill on one question."""
    quiet_libraries()
    from blocktune.data import load_examples
    from blocktune.engine import Engine
    from blocktune.evaluation.probe import deviation
    from blocktune.methods import parse_method

    built = {name: parse_method(name) for name in methods}
    engine = Engine.from_pretrained(model, adapter, dtype=dtype, device=device)
    examples = load_examples(source, limit=index + 1, tokenizer=engine.tokenizer)
    if len(examples) <= index:
        raise ValueError(f"'{source}' has {len(examples)} questions, --index {index} is not there")
    oracle = parse_method("full-prefill")
    return {name: deviation(engine, examples[index], m, oracle) for name, m in built.items()}
