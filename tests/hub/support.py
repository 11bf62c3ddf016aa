"""Results as `blocktune eval` writes them, and programs that have the stand-in as their Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub.stand_in import TOKEN

from blocktune.adapter import AdapterInfo
from blocktune.hub import CardFacts
from blocktune.models.identity import adapter_fingerprint

ROOT = Path(__file__).resolve().parents[2]
FACTS = CardFacts(base_model="org/base", license="apache-2.0")


def write_results(path: Path, folder: Path, **changes) -> Path:
    """Of a run of the base and two adapters, one of them in ``folder``; changes its provenance."""
    base = {"adapter": None, "n": 600, "em": 0.615, "ci95": [0.58, 0.65], "f1": 0.64}
    tuned = {"adapter": "out", "n": 600, "em": 0.6, "ci95": [0.56, 0.64], "adjusted_f1": 0.97}
    tuned |= {"f1": 0.7, "f1_ci95": [0.65, 0.75]}
    made = {
        "command": "blocktune eval --suite /home/me/s.yaml",
        "commit": "0123456789abcdef",
        "base_fingerprint": AdapterInfo.load(folder).base_fingerprint,
        "adapter_fingerprints": {"out": adapter_fingerprint(folder), "elsewhere": "0" * 16},
    }
    methods = {"full-prefill": base, "kvlink": tuned, "other": tuned | {"adapter": "elsewhere"}}
    methods["mean"] = tuned | {"seeds": {"kvlink": 0.6, "kvlink-1": 0.5}}
    path.write_text(json.dumps({"methods": methods, "provenance": made | changes}))
    return path


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
