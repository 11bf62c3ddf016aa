"""Options that several commands share, and the engine they describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from blocktune.engine import Engine

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Base model: a folder or a name on the HF Hub; by default the adapter's own.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Made by `blocktune train`: a folder, or USER/NAME\\[@REVISION] on the HF Hub; "
        "release:kvlink-1b and the like for models that others trained; none runs the base model."
    ),
]
Store = Annotated[
    Path | None, typer.Option(help="Folder of encoded chunks; none keeps them in memory.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: as the model was saved.")
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Quantise the base while it loads: nf4 (4 bits) or int8; see QLoRA."),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cuda:0 or cpu; by default a GPU if there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def teach(*lines: str) -> str:
    """An epilogue of examples; lines that are commands stand out from those that explain."""
    shown = (f"  [cyan]{x}[/cyan]" if x.startswith(("blocktune", " ")) else x for x in lines)
    return "\n".join(["[bold]Examples[/bold]", *shown])


def quiet_libraries() -> None:
    """Silences the progress bars and notes of the libraries below; their errors still come."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    # A filter, since they set their own level on import; it does not reach a logger's children.
    for name in (
        *("bitsandbytes", "bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"),
        "DeepSpeed",
    ):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_engine(
    model: str | None,
    adapter: str | None,
    store: Path | None,
    dtype: str,
    device: str | None,
    quantize: str | None = None,
) -> Engine:
    """Loads an engine."""
    quiet_libraries()
    from blocktune.engine import Engine

    return Engine.from_pretrained(
        model, adapter, store=store, dtype=dtype, device=device, quantize=quantize
    )
