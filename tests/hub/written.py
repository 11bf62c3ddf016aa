"""Results as `blocktune eval` writes them, without a run."""

import json
from pathlib import Path

from blocktune.adapter import AdapterInfo
from blocktune.hub import CardFacts
from blocktune.models.identity import adapter_fingerprint

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
