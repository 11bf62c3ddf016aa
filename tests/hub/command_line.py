"""Programs in processes of their own, with the stand-in as their Hub."""

import os
import subprocess
import sys
from pathlib import Path

from hub.stand_in import TOKEN

ROOT = Path(__file__).resolve().parents[2]


def blocktune(hub, home: Path, *arguments, **variables):
    """The command line in a process of its own, with the stand-in as its Hub."""
    return python(hub, home, "-m", "blocktune.cli", *arguments, **variables)


def python(hub, home: Path, *arguments, **variables):
    """Python with ``variables`` in its environment; ``home`` holds what it downloads."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
    env |= {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *(str(part) for part in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def put_base(hub, folder: Path):
    """The base of a run as a repository of the Hub."""
    base = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    hub.put("org/base", base | {"README.md": b"---\nlicense: mit\n---\n"})
