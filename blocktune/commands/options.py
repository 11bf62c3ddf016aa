"""Options that several commands share, and loading the engine that they describe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from blocktune.tables import Table

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine
    from blocktune.methods import Method

MODEL, PROMPT, DECODING = "Model", "Prompt", "Decoding"  # panels of the help
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # to another program
PLACE = "PLACE[,NAME=VALUE...]"  # of a store


def option(kind: Any, help: str, names: str = "", panel: str | None = None, **more: Any) -> Any:
    """The annotation of an option. ``names``, with spaces between, default to the parameter's."""
    return Annotated[kind, Option(*names.split(), help=help, rich_help_panel=panel, **more)]


BASE = "Base model: a folder or a name on the HF Hub. Default: the adapter's own base."
Model = option(str | None, BASE, "--model -m", panel=MODEL)
Adapter = option(
    str | None,
    "Adapter from `blocktune train`: a folder, or USER/NAME\\[@REVISION] on the HF Hub; "
    "or release:NAME (such as release:kvlink-1b) for published models. Default: none.",
    panel=MODEL,
)
METHOD = (
    "Reuse method, see `blocktune methods`; 'A + B' composes. Default: the adapter's, or naive."
)
MethodName = option(str | None, METHOD, "--method")
Store = option(
    str | None,
    "Store of encoded chunks to read and add to: a folder or a URL (s3://, valkey://), "
    "such as chunks/,disk=50GB. Settings: memory, cpu, disk, remote, remote_bytes, "
    "wait, policy (lru, lfu, fifo, gdsf), quota, ttl, codec (as-is, fp8, int8, int4), press "
    "(NAME:RATIO of kvpress), trace; see docs/store.md. Default: memory only.",
    metavar=PLACE,
)
Responses = option(
    str | None,
    "Reuse whole answers from the store: for the same prompt (exact), or for similar "
    "questions over the same chunks (semantic:0.95 or semantic:0.95:MODEL). Default: none.",
    metavar="KIND",
)
Dtype = option(str, "float32, bfloat16, float16, or auto: as the model was saved.", panel=MODEL)
Quantize = option(str | None, "Quantize the base: nf4 (4 bits, as in QLoRA) or int8.", panel=MODEL)
Device = option(str | None, "Such as cuda:0 or cpu. Default: a GPU if there is one.", panel=MODEL)
Instruction = option(str | None, "Instruction. Default: the adapter's, or our own.", panel=PROMPT)
System = option(str | None, "System message. Default: the chat template's own.", panel=PROMPT)
WORDING = "YAML with instruction, system, titled, untitled, question; the two above override it."
Format = option(Path | None, WORDING, "--format", panel=PROMPT)
MaxNewTokens = option(int, "Maximum length of an answer, in tokens.", panel=DECODING, min=1)
Temperature = option(float, "0: greedy decoding. Higher values sample more evenly.", panel=DECODING)
TopP = option(float, "Nucleus sampling: keep tokens up to this total probability.", panel=DECODING)
Seed = option(int, "Random seed for sampling.", panel=DECODING)
BatchSize = option(int, "Questions per batch.", min=1)
Limit = option(int | None, "Use only the first N questions.", min=1)
AsJson = option(bool, "Print JSON for programs.", "--json")


def to_file(help: str, names: str = "--output -o", kind: Any = Path | None, **more: Any) -> Any:
    """The annotation of an option for an output file. A folder is refused before any work."""
    return option(kind, help, names, dir_okay=False, readable=False, writable=True, **more)


def to_folder(help: str, names: str = "--output -o", kind: Any = Path | None) -> Any:
    """The same for an output folder."""
    return option(kind, help, names, file_okay=False, readable=False, writable=True)


def tell(as_json: bool, record: Any, *shown: str | Table) -> None:
    """Prints a record as JSON for programs, or else texts and tables for people."""
    if as_json:
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    for part in shown:
        typer.echo(part) if isinstance(part, str) else part.show()


def tracked(items: Iterable, label: str, total: int | None = None, shown: bool = True) -> Iterator:
    """Iterates with a progress bar on standard error, which leaves standard output to results."""
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, label, total, console=Console(stderr=True), disable=not shown))


def quiet_libraries() -> None:
    """Silences progress bars and warnings of libraries; their errors are still shown."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    # An adapter may change one of two tied embeddings; one that cannot be merged is reported.
    warnings.filterwarnings("ignore", message="(?s).*(ensure_weight_tying|lora_bias=True)")
    # A filter, since they set their level on import. It does not apply to child loggers.
    children = ("", ".autograd._functions", ".backends.cpu.ops")
    for name in ("DeepSpeed", *(f"bitsandbytes{child}" for child in children)):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_engine(
    model: str | None,
    adapter: str | None,
    store: str | ChunkStore | None,
    dtype: str,
    device: str | None,
    quantize: str | None = None,
    method: Method | None = None,
    words: Mapping[str, str] | None = None,
) -> Engine:
    """Loads an engine for ``method``; ``words`` override fields of its prompt format."""
    quiet_libraries()
    from blocktune.cache.store.config import StoreConfig
    from blocktune.engine import Engine
    from blocktune.methods.press import Press
    from blocktune.prompt import LayoutSpec, PromptFormat

    # A store has a length: to ask whether it is true would list its files.
    config = StoreConfig.parse(store or "") if isinstance(store, str | None) else store.config
    if config.press is not None:
        press = Press(config.press)
        if method is not None:
            press.require(method, method.layout(LayoutSpec()))
    engine = Engine.from_pretrained(
        *(model, adapter),
        **{"store": store, "dtype": dtype, "device": device, "quantize": quantize},
        recurrent=method is not None and not method.reuses_chunks,
    )
    engine.store.warn_rejected = False  # one line at the end reports them
    format = PromptFormat.from_dict(engine.format.to_dict() | dict(words or {}))
    if engine.adapter is not None and format != engine.adapter.format:
        typer.echo("note: the adapter was trained with a different prompt format", err=True)
    return engine if format == engine.format else engine.reworded(format)


def wording(instruction: str | None, system: str | None, path: Path | None) -> dict[str, str]:
    """The fields of `PromptFormat` that the options set; ValueError if one is wrong."""
    from blocktune.parsing import load_yaml, mapping
    from blocktune.prompt import PromptFormat

    words = {}
    if path is not None:
        hint = "give a YAML file with keys such as instruction"
        words |= mapping(load_yaml(path, "prompt format", hint), str(path))
    given = {"instruction": instruction, "system": system}
    words |= {name: text for name, text in given.items() if text is not None}
    PromptFormat.from_dict(words)
    return words
