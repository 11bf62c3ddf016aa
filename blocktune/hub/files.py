"""Which files of an adapter's folder are published, and what is rewritten in them on the way."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, PEFT_FILE, AdapterInfo
from blocktune.provenance import without_secrets, without_tokens

PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", PEFT_FILE, INFO_FILE, "config.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
"""Names of what is published; checkpoints, logs and optimizer states stay at home."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OF_THE_RUN = ("training_args.bin",)
_OF_A_CHECKPOINT = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_ABSOLUTE = re.compile(r"(?<![\w/.])/(?!/)(?:[^\s'\"?,:/]+/)+([^\s'\"?,:/]+)")

Source = Path | bytes


def files_of(folder: Path, info: AdapterInfo, base: str) -> dict[str, Source]:
    """What is sent of a folder, by name; JSON that names the base gets its name on the Hub."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        if any(fnmatch(name, pattern) for pattern in _OF_A_CHECKPOINT):
            raise ValueError(
                f"'{folder}' is a checkpoint to resume from (it holds '{name}'); push "
                f"the finished adapter, '{folder.parent}', or a copy of this folder without "
                "*.pt and *.pth"
            )
        if any(fnmatch(name, pattern) for pattern in PICKLES) and name not in _OF_THE_RUN:
            raise ValueError(
                f"'{folder}' holds '{name}', a pickle, which can run code where it is loaded; "
                "save its weights as safetensors and remove it"
            )
    kept = {name: folder / name for name in names if is_published(name)}
    if not any(name.endswith(".safetensors") for name in kept):
        raise ValueError(f"'{folder}' holds no weights (*.safetensors); nothing to publish")
    rewritten: dict[str, Source] = {INFO_FILE: _info(info, base)}
    if PEFT_FILE in kept:
        rewritten[PEFT_FILE] = _peft(folder / PEFT_FILE, info, base)
    return kept | rewritten


def is_published(name: str) -> bool:
    """Whether a file of this name is one that `files_of` publishes."""
    return any(fnmatch(name, pattern) for pattern in PUBLISHED)


def public(value: Any) -> Any:
    """Provenance without this machine's folders and without tokens of the Hub.

    Of an absolute path the last name stays. Adapters trained before commands were recorded
    without their secrets may hold one.
    """
    if isinstance(value, dict):
        return {
            key: public(_bare(inner) if key == "command" and isinstance(inner, str) else inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [public(inner) for inner in value]
    return _ABSOLUTE.sub(r"\1", without_tokens(value)) if isinstance(value, str) else value


def _bare(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # no command line: a quote is left open
        words = command.split()
    return shlex.join(without_secrets(words))


def _info(info: AdapterInfo, base: str) -> bytes:
    training = public(info.training)
    whole = info.base_model == OWN_WEIGHTS
    if whole and "started_from" in training:
        training["started_from"] = base
    named = replace(info, base_model=OWN_WEIGHTS if whole else base, training=training)
    return _json(named.to_dict())


def _peft(path: Path, info: AdapterInfo, base: str) -> bytes:
    values = json.loads(path.read_text(encoding="utf-8"))
    return _json(values | {"base_model_name_or_path": base, "revision": info.base_revision})


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
