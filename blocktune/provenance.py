"""Records how a result or an adapter was made: command, commit, versions, hardware."""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = "torch transformers tokenizers numpy peft trl accelerate datasets deepspeed bitsandbytes"
MASK = "HIDDEN"  # in place of a secret
_TOKEN_OPTION = re.compile(r"--?[\w-]*token", re.IGNORECASE)
# Options may be abbreviated (--hub_tok), so tokens of the Hub are also recognised by their form;
# likewise the user and password of a store's URL.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}|(?<=://)[^\s/@]+(?=@)")
_ABSOLUTE = re.compile(r"(?:file://|(?<![\w/.]))/(?!/)(?:[^\s'\"?,:/]+/)+([^\s'\"?,:/]+)")


def provenance(seed: int | None = None, command: list[str] | None = None) -> dict[str, Any]:
    """Describes this process without secrets; ``command`` is by default its own."""
    if command is None:
        program = Path(sys.argv[0]).name
        command = ["blocktune" if program == "cli.py" else program, *sys.argv[1:]]
    facts = {"command": shlex.join(without_secrets(command)), "commit": commit()}
    return facts | {"versions": versions(), "hardware": hardware(), "seed": seed}


def without_secrets(words: list[str]) -> list[str]:
    """Replaces values of options named ``...token``, and what `without_tokens` does, by `MASK`."""
    masked: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if _TOKEN_OPTION.fullmatch(before) and not word.startswith("--"):
            masked.append(MASK)
        elif equals and _TOKEN_OPTION.fullmatch(name):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(without_tokens(word))
    return masked


def without_tokens(text: str) -> str:
    """Replaces what looks like a token of the Hub, or a login in a URL, by `MASK`."""
    return _TOKEN.sub(MASK, text)


def public(value: Any) -> Any:
    """Removes folders of this machine and tokens, which old adapters may have, from provenance."""
    if isinstance(value, dict):
        if isinstance(command := value.get("command"), str):
            value = value | {"command": _bare(command)}
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    return _ABSOLUTE.sub(r"\1", without_tokens(value)) if isinstance(value, str) else value


def _bare(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # not a command line: a quote is not closed
        words = command.split()
    return shlex.join(without_secrets(words))


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` if tracked files differ; None without a checkout."""
    # Ignore a foreign checkout that the package is merely installed in.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    head = _git("rev-parse", "HEAD")
    if head is None or tracked is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Versions of Python, blocktune and the packages that affect results."""
    import blocktune

    result = {"python": platform.python_version(), "blocktune": blocktune.__version__}
    for name in PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def hardware() -> dict[str, Any]:
    """Processor, cores available to this process, torch's threads, and GPUs."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    info = Path("/proc/cpuinfo")
    name = re.search(r"(?m)^model name\s*: (.*\S)", info.read_text() if info.exists() else "")
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": len(cores),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
