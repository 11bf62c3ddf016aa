"""Adapters: what was trained, for which base, and the layout and prompt it must be served with.

An adapter is a folder: PEFT's files (unless only links were trained), ``links.safetensors`` (if it
has a link table) and ``blocktune.json``, which is written last and without which nothing loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.identity import base_fingerprint, same_base, tokenizer_hash
from blocktune.links import add_link_tokens, install_links, link_base, load_links
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.prompt.format import build_strict

INFO_FILE = "blocktune.json"
PEFT_FILE = "adapter_config.json"
FORMAT_VERSION = 1
OWN_WEIGHTS = "the model in its own folder"
"""``base_model`` of a fully trained model, which needs no other base."""
LINK_MODES = ("table", "added_tokens")


@dataclass(frozen=True)
class AdapterInfo:
    """All that serving needs to know of an adapter: the contents of ``blocktune.json``.

    Attributes:
        base_model: Name or path of the base as the run was given it, or `OWN_WEIGHTS`.
        base_fingerprint: See `blocktune.identity.base_fingerprint`.
        tokenizer_hash: See `blocktune.identity.tokenizer_hash`; before link tokens were added.
        layout: How prompts were laid out in training, and must be in serving.
        format: How prompts were worded.
        link_mode: ``table`` or ``added_tokens``; means nothing without links.
        link_seed: Seed the rows of added link tokens started from.
        base_revision: The base's revision on the Hub, or None.
        training: Provenance: commit, versions, data, seed, steps.
        format_version: Of this file.

    Raises:
        ValueError: If the version or the link mode is unknown.
    """

    base_model: str
    base_fingerprint: str
    tokenizer_hash: str
    layout: LayoutSpec
    format: PromptFormat
    link_mode: str = "table"
    link_seed: int = 0
    base_revision: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"this blocktune reads adapter format {FORMAT_VERSION}, got "
                f"{self.format_version}; update blocktune or train the adapter again"
            )
        if self.link_mode not in LINK_MODES:
            modes = ", ".join(LINK_MODES)
            raise ValueError(f"unknown link_mode '{self.link_mode}'; available: {modes}")

    @property
    def num_links(self) -> int:
        """Link rows per chunk."""
        return self.layout.num_links

    def link_base(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Id of link slot 0 for `blocktune.prompt.lay_out`, or None without links."""
        if not self.num_links:
            return None
        if self.link_mode == "table":
            return link_base(model)
        return tokenizer.convert_tokens_to_ids("<|link_0|>")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterInfo:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        wanted = ("base_model", "base_fingerprint", "tokenizer_hash", "layout", "format")
        if missing := [name for name in wanted if name not in values]:
            raise ValueError(f"{INFO_FILE} lacks '{missing[0]}'; train the adapter again")
        nested = {
            "layout": LayoutSpec.from_dict(values["layout"]),
            "format": PromptFormat.from_dict(values["format"]),
        }
        return build_strict(cls, {**values, **nested}, INFO_FILE)

    def save(self, folder: str | Path) -> Path:
        """Writes ``blocktune.json`` into ``folder``, whole or not at all."""
        path = Path(folder) / INFO_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> AdapterInfo:
        """Reads ``blocktune.json``.

        Raises:
            ValueError: If ``folder`` is no blocktune adapter, or its file is not understood.
        """
        path = Path(folder) / INFO_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is no blocktune adapter: it has no {INFO_FILE}")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is not a {INFO_FILE} of blocktune: {error}") from None


def load_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path,
    revision: str | None = None,
    merge: bool = False,
) -> tuple[PreTrainedModel, AdapterInfo]:
    """Puts an adapter on a bare base model: LoRA through PEFT, link table or link tokens.

    Args:
        model: The base, as loaded; its weights are wrapped in place.
        tokenizer: The base's; gets the link tokens where the adapter added some.
        adapter: A local folder, or a repository's name on the Hugging Face Hub.
        revision: Of the repository.
        merge: Merge LoRA weights into the base; links are installed after that, since merging
            replaces an embedding that PEFT trained.

    Returns:
        The model to run and the adapter's info.

    Raises:
        ValueError: If there is no such adapter, it is damaged, or it was made for another base
            or tokenizer; nothing is changed then.
    """
    folder = adapter_folder(adapter, revision)
    info = AdapterInfo.load(folder)
    _check_base(info, model, tokenizer, adapter)
    has_table = info.num_links > 0 and info.link_mode == "table"
    table = load_links(folder) if has_table else None
    if info.num_links and info.link_mode == "added_tokens":
        add_link_tokens(model, tokenizer, info.num_links, info.link_seed)
    if (folder / PEFT_FILE).is_file():
        from peft import PeftModel  # serving without an adapter needs no PEFT

        model = PeftModel.from_pretrained(model, folder)
        model = model.merge_and_unload() if merge else model
    if table is not None:
        install_links(model, table.to(model.dtype))
    return model.eval(), info


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The adapter's local folder, fetched from the Hub if it is not one already.

    Raises:
        ValueError: If it is neither a folder nor a repository that can be reached.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no adapter '{adapter}': it is no local folder, and the Hub says: {reason}"
        ) from None


def _check_base(info: AdapterInfo, model, tokenizer, adapter) -> None:
    came = model.config._name_or_path or type(model).__name__
    if not same_base(info.base_fingerprint, base_fingerprint(model)):
        raise ValueError(
            f"adapter '{adapter}' was made for base '{info.base_model}' "
            f"({info.base_fingerprint}), got '{came}' ({base_fingerprint(model)}); "
            f"load '{info.base_model}', or train an adapter for '{came}'"
        )
    if info.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"adapter '{adapter}' was trained with the tokenizer and chat template of "
            f"'{info.base_model}' ({info.tokenizer_hash}), got another from "
            f"'{tokenizer.name_or_path}' ({tokenizer_hash(tokenizer)}); use the base's own"
        )
