"""Results as `blocktune eval` writes them, and the stand-in as the Hub of this process."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub.stand_in import TOKEN
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

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


@contextmanager
def online(hub, home: Path):
    """This process has the stand-in as its Hub; ``home`` holds what it downloads."""
    found = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    changes = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": found, "HF_HUB_OFFLINE": False}
    changes |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home / "hub")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # made when the library was imported
        patch.setattr(transformers_hub, "_hf_api", None)  # and this one when it was first asked
        patch.setenv("HF_TOKEN", TOKEN)
        yield


def put_base(hub, folder: Path):
    """The base of a run as a repository of the Hub."""
    base = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    hub.put("org/base", base | {"README.md": b"---\nlicense: mit\n---\n"})
