"""What the chunks of one model are, in plain JSON: read without loading the model.

Another engine needs it to use the chunks: which model and tokenizer made them, how the prompt was
worded, and how the keys are rotated. `ChunkFolder.write_manifest` stores it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo
from blocktune.cache.chunk_file import FORMAT
from blocktune.cache.chunk_kv import ChunkKV
from blocktune.models.identity import adapter_fingerprint, base_fingerprint, tokenizer_hash
from blocktune.positions import RopeSpec

MANIFEST_FORMAT = "blocktune manifest 1"


def manifest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: Mapping[str, Any],
    adapter: AdapterInfo | None,
    adapter_folder: str | Path | None,
    rope: RopeSpec,
    sample: ChunkKV,
) -> dict[str, Any]:
    """The manifest of a model, as plain JSON values.

    Args:
        model: As it runs.
        tokenizer: The model's.
        prompt_format: Fields of the prompt format, as in `model_fingerprint`.
        adapter: What the adapter was trained for, or None.
        adapter_folder: Where its files are, or None.
        rope: The frequencies of the keys.
        sample: Any chunk that the model encoded: it has the shapes and the fingerprint.

    Returns:
        ``fingerprint``; ``format`` and ``chunk_format``; ``base``, ``adapter`` (or None) and
        ``tokenizer`` with names, revisions and digests; the adapter's ``scope`` (if it is
        ``encode``, the plain base reads its chunks); ``prompt_format``; ``dtype``; ``layers``,
        those that store keys, each with the shapes of ``key`` and ``value`` (kv heads, head dim);
        ``rope``: ``frequencies``, lists of radians per position of the rotated dimensions'
        pairs, with the first rotated dimension (``start``) and whether pairs are neighbours
        (``interleaved``) of each, whether it is the values that are rotated (``in_values``), and
        ``layer``, the index into them for each decoder layer. Keys are stored rotated, the chunk's
        first token at ``origin``.
    """
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    base = adapter.base_fingerprint if adapter else base_fingerprint(model)
    template = str(tokenizer.chat_template or "").encode()
    return {
        "format": MANIFEST_FORMAT,
        "chunk_format": FORMAT,
        "fingerprint": sample.fingerprint,
        "base": {
            "name": (adapter.base_model if adapter else None) or name,
            "revision": (adapter.base_revision if adapter else None) or revision,
            "architecture": model.config.get_text_config().model_type,
            "fingerprint": base,
        },
        "adapter": _adapter(adapter_folder, adapter.scope if adapter else "both"),
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "hash": tokenizer_hash(tokenizer),
            "template_hash": hashlib.sha256(template).hexdigest(),
        },
        "prompt_format": dict(prompt_format),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "layers": [
            {"key": [key.shape[0], key.shape[2]], "value": [value.shape[0], value.shape[2]]}
            for key, value in zip(sample.keys, sample.values, strict=True)
        ],
        "rope": _rope(rope),
    }


def _adapter(folder: str | Path | None, scope: str) -> dict[str, Any] | None:
    if folder is None:
        return None
    folder, name, revision = Path(folder), str(folder), None
    for cached in (folder, *folder.parents):  # a repository in the cache of the Hub
        if cached.parent.name == "snapshots" and cached.parent.parent.name.startswith("models--"):
            name = cached.parent.parent.name.removeprefix("models--").replace("--", "/")
            revision = cached.name
    known = {"name": name, "revision": revision, "scope": scope}
    return known | {"fingerprint": adapter_fingerprint(folder)}


def _rope(rope: RopeSpec) -> dict[str, Any]:
    layers = [(tuple(one.inv_freq.float().tolist()), *one[1:]) for one in rope.layers]
    different = list(dict.fromkeys(layers))
    return {
        "frequencies": [list(one[0]) for one in different],
        "start": [one[1] for one in different],
        "interleaved": [one[2] for one in different],
        "in_values": [one[3] for one in different],
        "layer": [different.index(one) for one in layers],
    }
