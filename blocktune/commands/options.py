"""Options that several commands share, and the engine they describe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore, StoreStats
    from blocktune.cache.records import Embedder
    from blocktune.cache.responses import ResponseCache
    from blocktune.engine import Engine

MODEL, PROMPT = "Model", "Prompt"  # panels of the help
of_model = partial(Option, rich_help_panel=MODEL)
of_prompt = partial(Option, rich_help_panel=PROMPT)

Model = Annotated[
    str | None,
    of_model(
        "--model",
        "-m",
        help="Base model: a folder or a name on the HF Hub. Default: the adapter's own base.",
    ),
]
Adapter = Annotated[
    str | None,
    of_model(
        help="Adapter from `blocktune train`: a folder, or USER/NAME\\[@REVISION] on the HF Hub; "
        "or release:NAME (such as release:kvlink-1b) for published models. Default: none."
    ),
]
Store = Annotated[
    str | None,
    Option(
        metavar="PLACE[,NAME=VALUE...]",
        help="Encoded chunks, read and added to: a folder or a URL (s3://, valkey://), then "
        "memory, cpu, disk, remote, remote_bytes, policy (lru, lfu, fifo, gdsf), quota, ttl, codec "
        "(as-is, fp8, int8, int4), press (NAME:RATIO of kvpress), trace. Such as "
        "chunks/,disk=50GB,policy=gdsf. Default: memory only.",
    ),
]
Responses = Annotated[
    str | None,
    Option(
        metavar="exact|semantic:SIMILARITY[:MODEL]",
        help="Keep whole answers in the store: for the same prompt, or also for questions over the "
        "same chunks whose sentence embeddings are that similar (such as 0.95). Default: none.",
    ),
]
Dtype = Annotated[
    str, of_model(help="float32, bfloat16, float16, or auto (as the model was saved).")
]
Quantize = Annotated[
    str | None,
    of_model(help="Quantise the base while it loads: nf4 (4 bits, as in QLoRA) or int8."),
]
Device = Annotated[
    str | None, of_model(help="Such as cuda:0 or cpu. Default: a GPU if there is one.")
]
Instruction = Annotated[
    str | None,
    of_prompt(help="Instruction before the chunks. Default: the adapter's, or the built-in one."),
]
System = Annotated[str | None, of_prompt(help="System message. Default: the chat template's own.")]
Format = Annotated[
    Path | None,
    of_prompt(
        "--format",
        help="YAML with the wording of the prompt: instruction, system, titled, untitled, "
        "question. --instruction and --system override it.",
    ),
]
of_decoding = partial(Option, rich_help_panel="Decoding")
MaxNewTokens = Annotated[int, of_decoding(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, of_decoding(help="0 picks the likeliest token; higher values sample more evenly.")
]
TopP = Annotated[
    float, of_decoding(help="Nucleus sampling: keep tokens up to this cumulative probability.")
]
Seed = Annotated[int, of_decoding(help="Random seed for sampling.")]
BatchSize = Annotated[int, Option(min=1, help="Questions per batch.")]
Limit = Annotated[int | None, Option(min=1, help="Use only the first N questions.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for programs.")]


def teach(*lines: str) -> str:
    """An epilogue of examples; commands are coloured, explanations are not."""
    shown = (f"  [cyan]{x}[/cyan]" if x.startswith(("blocktune", " ")) else x for x in lines)
    return "\n".join(["[bold]Examples[/bold]", *shown])


def quiet_libraries() -> None:
    """Silences progress bars and notes of the libraries below; their errors are still shown."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    # A tied embedding gets its own weights where an adapter changes one end.
    warnings.filterwarnings("ignore", message="(?s).*ensure_weight_tying")
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
    store: str | ChunkStore | None,
    dtype: str,
    device: str | None,
    quantize: str | None = None,
    recurrent: bool = False,
) -> Engine:
    """Loads an engine; ``recurrent``: also one with recurrent layers, which reuses no chunks."""
    quiet_libraries()
    from blocktune.engine import Engine

    engine = Engine.from_pretrained(
        *(model, adapter),
        **{"store": store, "dtype": dtype, "device": device, "quantize": quantize},
        recurrent=recurrent,
    )
    engine.store.warn_rejected = False  # `rejected` says it in one line at the end
    return engine


def responses(text: str | None, store: ChunkStore) -> ResponseCache | None:
    """The response cache that an option asks for."""
    from blocktune.cache.responses import ResponseCache

    return None if text is None else ResponseCache.parse(text, store)


def embedder(model: str | None, store: str | None) -> Embedder | None:
    """The embedding model of two options; its results are kept if there is a store."""
    if model is None:
        return None
    from blocktune.cache import ChunkStore
    from blocktune.cache.records import Embedder

    return Embedder(model, None if store is None else ChunkStore.open(store))


def rejected(stats: StoreStats, place: str | None) -> str:
    """One line on the entries of a store that could not be used; empty if there were none."""
    if not stats.rejected:
        return ""
    return (
        f"{stats.rejected:,} stored chunks could not be used and were encoded again, the first: "
        f"{stats.first_rejected}; all: blocktune store verify {place}"
    )


def reworded(
    engine: Engine, instruction: str | None, system: str | None, path: Path | None
) -> Engine:
    """The engine with the wording that the options ask for; without any, as it is."""
    from blocktune.parsing import load_yaml
    from blocktune.prompt import PromptFormat

    asked = {}
    if path is not None:
        asked = load_yaml(path, "prompt format", "give a YAML file with keys such as instruction")
        if not isinstance(asked, dict):
            raise ValueError(f"{path}: must be a mapping of keys to text, got {asked!r:.60}")
    given = {"instruction": instruction, "system": system}
    asked |= {name: text for name, text in given.items() if text is not None}
    format = PromptFormat.from_dict(engine.format.to_dict() | asked)
    if engine.adapter is not None and format != engine.adapter.format:
        typer.echo("note: the adapter was trained with another wording of the prompt", err=True)
    return engine if format == engine.format else engine.reworded(format)
