"""The description of an adapter: its base, and the layout and format of its prompts.

An adapter is a folder: PEFT's files (unless only links were trained), ``links.safetensors`` (if it
has a link table) and ``blocktune.json``, which is written last and required for loading. For models
that other projects published, ``releases.yaml`` has what ``blocktune.json`` would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.scope import SCOPES, scope_of
from blocktune.files import replace_json
from blocktune.links import link_base
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import read_tokenizer
from blocktune.parsing import load_json, mapping, read
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.registry import require_one_of

INFO_FILE = "blocktune.json"
FORMAT_VERSION = 1
OWN_WEIGHTS = "the model in its own folder"
"""``base_model`` of a fully trained or merged model, which needs no other base."""
LINK_MODES = ("table", "added_tokens")
PREFIX = "release:"  # marks the name of a release


@dataclass(frozen=True)
class AdapterInfo:
    """The contents of ``blocktune.json``: serving must use the layout and format of training.

    Raises ValueError if the link mode or the scope is unknown.
    """

    base_model: str  # name or path of the base as given to the run, or `OWN_WEIGHTS`
    base_fingerprint: str  # see `blocktune.models.identity.base_fingerprint`
    tokenizer_hash: str  # see `blocktune.models.identity.tokenizer_hash`; without link tokens
    layout: LayoutSpec  # layout of prompts
    format: PromptFormat  # wording of prompts
    link_mode: str = "table"  # one of `LINK_MODES`; no effect without learned tokens
    link_seed: int = 0  # seed of the initial embeddings of added link tokens
    link_token: str = "<|link_0|>"  # the first learned token, if they are in the vocabulary
    scope: str = "both"  # rows that LoRA acts on, one of `SCOPES`
    base_revision: str | None = None  # the base's commit on the Hub, or the requested revision
    quantization: str | None = None  # of the base in training
    rope: Mapping[str, Any] = field(default_factory=dict)  # of the base; for information only
    training: Mapping[str, Any] = field(default_factory=dict)  # provenance of the run
    format_version: int = FORMAT_VERSION  # of this file

    def __post_init__(self):
        require_one_of("link_mode", self.link_mode, LINK_MODES)
        require_one_of("scope", self.scope, SCOPES)

    @property
    def num_learned(self) -> int:
        """Number of learned tokens: links of all chunks, headers and trailers."""
        return self.layout.num_learned

    @property
    def has_table(self) -> bool:
        """Whether the learned tokens are in ``links.safetensors``."""
        return self.num_learned > 0 and self.link_mode == "table"

    @property
    def adds_tokens(self) -> bool:
        """Whether learned tokens must be added to the base before the adapter fits it."""
        return self.num_learned > 0 and not self.has_table and self.base_model != OWN_WEIGHTS

    def link_base(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Id of the first learned token, for `blocktune.prompt.lay_out`; None without any."""
        if not self.num_learned:
            return None
        if self.link_mode == "table":
            return link_base(model)
        return tokenizer.convert_tokens_to_ids(self.link_token)

    def tokenizer(self, folder: Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The run's: the ``base``'s, or if its template or padding was changed, the adapter's."""
        if self.tokenizer_hash == tokenizer_hash(base) or not any(folder.glob("tokenizer*")):
            return base
        own = read_tokenizer(folder)
        return own if self.tokenizer_hash == tokenizer_hash(own) else base

    def require_served(self, model: PreTrainedModel, format: PromptFormat) -> None:
        """Raises ValueError if ``model`` has another scope, or ``format`` differs from training."""
        if format != self.format:
            raise ValueError(
                f"the adapter was trained with the prompt format {self.format}, got {format}; "
                "leave out the format to use the adapter's"
            )
        if self.scope != scope_of(model):
            raise ValueError(
                f"the adapter has scope '{self.scope}' and the model '{scope_of(model)}'; call "
                "blocktune.adapter.attach_links on PEFT's unmerged model"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes ``blocktune.json`` to ``folder`` atomically."""
        path = Path(folder) / INFO_FILE
        replace_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> AdapterInfo:
        """Reads ``blocktune.json``; ValueError if there is none, or it is damaged or newer."""
        path = Path(folder) / INFO_FILE
        if not path.is_file():
            lack = f"it has no {INFO_FILE}" if path.parent.is_dir() else "there is no such folder"
            raise ValueError(
                f"{folder} is not a blocktune adapter: {lack}; a trainer writes {INFO_FILE} "
                "with callbacks=[SaveLayoutCallback(collator)]"
            )
        values = dict(mapping(load_json(path), str(path)))
        version = values.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:  # first, since another version may have other keys
            wanted = f"adapter format {FORMAT_VERSION}, got {version}"
            raise ValueError(f"{path}: this blocktune reads {wanted}; update blocktune")
        for name, spec in (("layout", LayoutSpec), ("format", PromptFormat)):
            if name in values:
                values[name] = spec.from_dict(values[name])
        return read(cls, values, str(path))


@dataclass(frozen=True)
class Release:
    """A published model."""

    repository: str  # on the Hugging Face Hub
    source: str  # code or paper that states layout and wording
    layout: LayoutSpec  # layout of prompts in training
    format: PromptFormat  # wording of prompts in training
    chat_template: str  # renders the turns around the chunks
    begins_with_bos: bool = True  # whether a prompt begins with BOS
    # special tokens that the layout or the template uses, and their required ids
    tokens: Mapping[str, int] = field(default_factory=dict)
    link_token: str | None = None  # the first link token, if the layout has links

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AdapterInfo:
        """Sets the tokenizer's template and BOS; describes the adapter (ValueError: other ids)."""
        for token, expected in self.tokens.items():
            actual = tokenizer.convert_tokens_to_ids(token)
            if actual != expected:
                raise ValueError(
                    f"'{self.repository}' was trained with {token} as id {expected}, this "
                    f"tokenizer has {actual}; load the released one"
                )
        rows = model.get_input_embeddings().weight.shape[0]
        last = self.tokens[self.link_token] + self.layout.num_learned - 1 if self.link_token else 0
        if last >= rows:
            raise ValueError(
                f"'{self.repository}' has link tokens up to id {last}, this model embeds {rows} "
                "tokens; load the released weights"
            )
        tokenizer.chat_template = self.chat_template
        if not self.begins_with_bos:
            tokenizer.bos_token = None
        return AdapterInfo(
            base_model=OWN_WEIGHTS,
            base_fingerprint=base_fingerprint(model),
            tokenizer_hash=tokenizer_hash(tokenizer),
            layout=self.layout,
            format=self.format,
            link_mode="added_tokens",
            link_token=self.link_token or "",
            training={"released as": self.repository, "stated by": self.source},
        )


def _read(text: str) -> dict[str, Release]:
    """Reads the releases. Fields that a model lacks are those of its family."""
    releases = {}
    for family in yaml.safe_load(text).values():
        models = family.pop("models")
        for name, own in models.items():
            layout = LayoutSpec.from_dict(family.get("layout", {}) | own.get("layout", {}))
            format = PromptFormat.from_dict(family["format"] | own.get("format", {}))
            releases[name] = Release(**family | own | {"layout": layout, "format": format})
    return releases


RELEASES = _read(Path(__file__).with_name("releases.yaml").read_text(encoding="utf-8"))


def find_release(adapter: str) -> Release | None:
    """The release named ``release:NAME``, or None for other names; ValueError if it is unknown."""
    if not adapter.startswith(PREFIX):
        return None
    name = adapter.removeprefix(PREFIX)
    if name not in RELEASES:
        raise ValueError(f"unknown release '{name}'; available: {', '.join(RELEASES)}")
    return RELEASES[name]
