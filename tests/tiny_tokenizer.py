"""A small byte-level BPE tokenizer with a chat template, trained on the words below in a moment."""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """
Anna Belt was born in Port Alder and studied chemistry at the college there. She later moved to
Lower Kirby, where she led the museum for nine years. The film Frozen Shore was directed by Noel
Fisher, whose brother wrote the music. It was shot in Port Alder in 1966. The company is based in
Upper Lorne; its founder, Walter Gray, is known as Duke. Answer the question from the passages
below. Question: Who directed the film that was shot in the town where Anna Belt was born?
"""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def build_tokenizer(
    template: str | None = TEMPLATE, *, adds_bos: bool = False, **special: str | None
) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the special tokens that ``template`` writes out become its own.

    Args:
        template: Chat template, or None.
        adds_bos: Whether the tokenizer itself puts BOS first, as Llama's does.
        special: Replaces ``bos_token``, ``eos_token`` or ``pad_token``.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    written = re.findall(r"<[|\uff5c][^<>{}'\"]+[|\uff5c]>|<\w+_of_turn>", template or "")
    tokens = [*SPECIAL, *sorted(set(written))]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(tokens)),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    if adds_bos:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    names = {name: token for name, token in names.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def trl_template(name: str) -> str:
    """A real model family's chat template, from the files that TRL installs."""
    folder = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")
