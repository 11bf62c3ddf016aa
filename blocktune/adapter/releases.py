"""Published models of other projects, with the prompt and layout to serve them.

``releases.yaml`` has what their ``blocktune.json`` would have, for ``--adapter release:NAME``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.info import OWN_WEIGHTS, AdapterInfo
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.prompt import LayoutSpec, PromptFormat

PREFIX = "release:"  # marks the name of a release


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
        """Sets the tokenizer's chat template and BOS; returns the description of the adapter.

        Raises ValueError if the trained tokens have other ids here, or no embeddings.
        """
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


RELEASES = _read(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def find_release(adapter: str) -> Release | None:
    """The release named ``release:NAME``, or None for other names; ValueError if it is unknown."""
    if not adapter.startswith(PREFIX):
        return None
    name = adapter.removeprefix(PREFIX)
    if name not in RELEASES:
        raise ValueError(f"unknown release '{name}'; available: {', '.join(RELEASES)}")
    return RELEASES[name]
