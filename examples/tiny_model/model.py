"""The tiny model: how it starts, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.tiny_model.config import PretrainConfig


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights, whose embeddings spare it two detours.

    A word starts out alike with and without its space: byte-level BPE has two tokens for it, one
    for the start of a text (a title), and the model would first have to learn that they are one
    name. And all embeddings have a vector in common (which no softmax over tied embeddings sees):
    with it queries and keys have a constant part, the only thing that RoPE can turn into "the
    token before", so that heads that look back are found early.
    """
    torch.manual_seed(config.seed)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config.model_config(*special))
    vocabulary, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.data
    rows.normal_(0, config.embedding_std)
    for token, index in vocabulary.items():
        if len(token) > 2 and token[0] == "Ġ" and token[1:] in vocabulary:
            rows[vocabulary[token[1:]]] = rows[index]
    rows += config.embedding_std * torch.randn(config.width)
    return model


def save(model: LlamaForCausalLM, output: Path) -> None:
    """Writes the weights in bfloat16, which halves the download; training continues in float32."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied
    dtype, model.config.dtype = model.config.dtype, torch.bfloat16
    model.save_pretrained(output, state_dict=state)
    model.config.dtype = dtype
