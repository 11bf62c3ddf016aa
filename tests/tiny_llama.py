"""A random Llama of two layers and 32 dimensions, for tests that need some model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def tiny_llama(tokenizer: PreTrainedTokenizerBase, context: int, **options) -> LlamaForCausalLM:
    """The same weights each time; ``context`` in tokens, ``options`` of `LlamaConfig`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        **options,
    )
    return LlamaForCausalLM(config)
