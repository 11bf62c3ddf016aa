"""Initialises and saves the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.tiny_model.config import PretrainConfig


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights, whose embeddings are initialised to speed up learning.

    Byte-level BPE has two tokens for a word, with and without its space, and the model would first
    have to learn that they are the same name. So both get the same embedding. Also, all embeddings
    share a common vector, which does not affect the softmax over tied embeddings. It gives queries
    and keys a constant part, from which RoPE can form heads that look at the previous token, so
    that these are learned early.
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
    """Saves the weights in bfloat16, which halves the download; training continues in float32."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied
    dtype, model.config.dtype = model.config.dtype, torch.bfloat16
    model.save_pretrained(output, state_dict=state)
    model.config.dtype = dtype
