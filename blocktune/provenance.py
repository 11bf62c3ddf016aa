"""What a result or an adapter needs to be believed and repeated: command, commit, versions."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = "torch transformers tokenizers numpy peft trl accelerate datasets deepspeed bitsandbytes"
MASK = "HIDDEN"
"""Replaces a secret."""
_TOKEN_OPTION = re.compile(r"(--?[\w-]*token)(?:=.*)?", re.IGNORECASE | re.DOTALL)
# Options may be abbreviated (--hub_tok), so a token of the Hub is also known by its own look.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}")
_ABSOLUTE = re.compile(r"(?<![\w/.])/(?!/)(?:[^\s'\"?,:/]+/)+([^\s'\"?,:/]+)")


def provenance(seed: int | None = None, command: list[str] | None = None) -> dict[str, Any]:
    """Describes this process; its program's folder and all tokens are left out, to be published.

    ``command`` is what the user typed, by default ``sys.argv`` with the bare program name.
    """
    typed = [*_program(), *sys.argv[1:]] if command is None else command
    return {
        "command": shlex.join(without_secrets(typed)),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "seed": seed,
    }


def without_secrets(words: list[str]) -> list[str]:
    """A command's words with `MASK` for ``hf_...`` and the values of options named ``...token``."""
    kept: list[str] = []
    for word in words:
        option = _TOKEN_OPTION.fullmatch(kept[-1]) if kept else None
        if option and "=" not in kept[-1] and not word.startswith("--"):
            kept.append(MASK)
        elif (own := _TOKEN_OPTION.fullmatch(word)) and "=" in word:
            kept.append(f"{own[1]}={MASK}")
        else:
            kept.append(without_tokens(word))
    return kept


def without_tokens(text: str) -> str:
    """Text with `MASK` for whatever looks like a token of the Hugging Face Hub."""
    return _TOKEN.sub(MASK, text)


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


def _program() -> list[str]:
    name = Path(sys.argv[0]).name
    return ["blocktune" if name == "cli.py" else name]


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` if tracked files differ; None if there is none."""
    # A package installed inside someone else's checkout is not that checkout's commit.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    head = _git("rev-parse", "HEAD")
    if head is None or tracked is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Versions of Python, blocktune and the packages that decide numbers."""
    import blocktune

    found = {"python": platform.python_version(), "blocktune": blocktune.__version__}
    for name in PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, threads torch uses, and GPUs."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": len(cores),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
