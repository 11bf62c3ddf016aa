"""Models that others trained and released: the prompt and layout to serve them with.

They are whole models without a ``blocktune.json``. ``--adapter release:NAME`` (with ``--model`` for
a local copy) supplies what that file would say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.info import OWN_WEIGHTS, AdapterInfo
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.prompt import LayoutSpec, PromptFormat

PREFIX = "release:"
"""Start of an adapter's name that names a release."""


@dataclass(frozen=True)
class Release:
    """A released model.

    Attributes:
        repository: On the Hugging Face Hub.
        source: Code or paper that states layout and wording.
        layout: How prompts were laid out in training.
        format: Wording of the prompts.
        chat_template: Renders the turns around the chunks.
        begins_with_bos: Whether a prompt begins with BOS.
        tokens: Special tokens that the layout or the template uses, with the ids they must have.
        link_token: The first link token, where the layout has links.
    """

    repository: str
    source: str
    layout: LayoutSpec
    format: PromptFormat
    chat_template: str
    begins_with_bos: bool = True
    tokens: Mapping[str, int] = field(default_factory=dict)
    link_token: str | None = None

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AdapterInfo:
        """Puts the release's template on its tokenizer; returns what the model is served with.

        BOS is removed from the tokenizer if prompts have none. Raises ValueError if it has other
        ids for the tokens that were trained, or the model has no embeddings for them.
        """
        for token, wanted in self.tokens.items():
            came = tokenizer.convert_tokens_to_ids(token)
            if came != wanted:
                raise ValueError(
                    f"'{self.repository}' was trained with {token} as id {wanted}, this tokenizer "
                    f"has {came}; load the tokenizer that was released with the model"
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


_BLOCK_ATTENTION = "https://github.com/TemporaryLoRA/Block-Attention"
_LAZY_ATTENTION = "https://github.com/illinoisdata/lazy-attention"


def _tulu(
    repository: str, source: str = _BLOCK_ATTENTION, *, block: bool = True, tag: str = ""
) -> Release:
    """Models trained on Block-Attention's data: Tulu's turns, no BOS, everything stripped."""
    return Release(
        repository=repository,
        source=source,
        layout=LayoutSpec(block=block),
        format=PromptFormat(
            instruction=(
                "You are an intelligent AI assistant. Please answer questions based on the user's "
                "instructions. Below are some reference documents that may help you in answering "
                "the user's question."
            ),
            titled="- Title: {title}\n{text}\n",
            untitled="- {text}\n",
            question=(
                "\n\nPlease write a high-quality answer for the given question using only the "
                "provided search documents (some of which might be irrelevant).\n"
                "Question: {question}"
            ),
            block_tag=tag,
            tag_place="prompt",
            strip=True,
        ),
        chat_template=(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
            "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        begins_with_bos=False,
    )


_KVLINK_TOKENS = {
    "<|reserved_special_token_3|>": 128_011,  # the first link
    "<|reserved_special_token_246|>": 128_254,  # opens the documents
    "<|reserved_special_token_247|>": 128_255,  # closes them
}
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def _kvlink(repository: str, system: str, question: str, chat_template: str) -> Release:
    """KVLink with 5 links a document.

    The authors number the documents of a prompt. A text that depends on its place cannot be cached,
    so every document is number 1 here.
    """
    return Release(
        repository=repository,
        source="https://github.com/UCSB-NLP-Chang/KVLink",
        layout=LayoutSpec(num_links=5, link_table="chunk", max_chunks=40),
        format=PromptFormat(
            instruction="",
            system=system,
            titled="Document [1](Title: {title}) {text}\n",
            untitled="Document [1] {text}\n",
            question=question,
        ),
        chat_template=chat_template,
        tokens=_KVLINK_TOKENS,
        link_token="<|reserved_special_token_3|>",
    )


def _kvlink_trained(repository: str) -> Release:
    """As in training: documents between the system turn, which leaves them open, and the user's."""
    return _kvlink(
        repository,
        system=(
            "You are an AI assistant. Use the provided documents to answer the user\u2019s "
            "question. If the information is insufficient, acknowledge the gap or request "
            "clarification."
        ),
        question=(
            "<|reserved_special_token_247|><|eot_id|>" + _HEADER.format("user") + "{question}"
        ),
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
            "{% else %}" + _HEADER.format("{{ m.role }}") + "{{ m.content }}"
            "{% endif %}<|eot_id|>"
            "{{ '<|reserved_special_token_246|>' if m.role == 'system' else '' }}{% endfor %}"
            "{% if add_generation_prompt %}" + _HEADER.format("assistant") + "{% endif %}"
        ),
    )


def _kvlink_evaluated(repository: str) -> Release:
    """As in the evaluation that the paper reports: documents inside the user's turn."""
    return _kvlink(
        repository,
        system=(
            "You are a intelligent AI assistant. Please answer questions based on the user's "
            "instruction. Below are some reference documents that may help you in answering the "
            "user's question."
        ),
        question="<|reserved_special_token_247|>{question}",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}"
            + _HEADER.format("{{ m.role }}")
            # Documents are in the first turn of the user alone.
            + "{% if m.role == 'user' and loop.index < 3 %}"
            "<|reserved_special_token_246|>{% endif %}"
            "{{ m.content }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}" + _HEADER.format("assistant") + "{% endif %}"
        ),
    )


_KVLINK_1B, _KVLINK_3B = "Shiyu-Lab/Llama1B-KVLink5", "Shiyu-Lab/Llama3B-KVLink5"
RELEASES = {
    "tulu3-block-ft": _tulu("ldsjmdy/Tulu3-Block-FT", tag="[Block-Attention]"),
    "tulu3-rag": _tulu("ldsjmdy/Tulu3-RAG", block=False),
    "tulu3-sft": _tulu("ldsjmdy/Tulu3-SFT", block=False),
    "block-ft-llama-1b": _tulu("hxia7/Llama-3.2-1B-Block-FT", _LAZY_ATTENTION),
    "block-ft-llama-8b": _tulu("hxia7/Llama-3.1-8B-Block-FT", _LAZY_ATTENTION),
    "block-ft-qwen3-8b": _tulu("hxia7/Qwen3-8B-Block-FT", _LAZY_ATTENTION),
    "kvlink-1b": _kvlink_trained(_KVLINK_1B),
    "kvlink-3b": _kvlink_trained(_KVLINK_3B),
    "kvlink-1b-eval": _kvlink_evaluated(_KVLINK_1B),
    "kvlink-3b-eval": _kvlink_evaluated(_KVLINK_3B),
}


def find_release(adapter: str) -> Release | None:
    """The release, None if ``adapter`` is not ``release:NAME``; ValueError if there is none."""
    if not adapter.startswith(PREFIX):
        return None
    name = adapter.removeprefix(PREFIX)
    if name not in RELEASES:
        raise ValueError(f"unknown release '{name}'; available: {', '.join(RELEASES)}")
    return RELEASES[name]
