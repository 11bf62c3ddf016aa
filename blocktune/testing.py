"""Small random models with a tokenizer, for checking and timing methods."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blocktune.adapter import AdapterInfo
from blocktune.engine import Engine
from blocktune.links import install_links, new_links
from blocktune.methods import Weights
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.prompt import LayoutSpec, PromptFormat

WORDS = PromptFormat(instruction="Answer.")
BARE = PromptFormat(
    instruction="", titled="{title} {text} ", untitled="{text} ", question="{question}"
)
TRAINED = {  # layout of the simulated adapter of `small_engine`, by weights
    Weights.ANY: None,
    Weights.BLOCK: LayoutSpec(),
    Weights.LINKS: LayoutSpec(num_links=2),
    Weights.WRAPS: LayoutSpec(num_headers=2, num_trailers=1),
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def small_engine(weights: Weights = Weights.ANY, *, bare: bool = False, seed: int = 0) -> Engine:
    """An engine with a random Llama of seven layers, as if it were trained for ``weights``.

    If ``bare``, there is no BOS and no instruction, so that prompts start with a chunk.
    """
    tokenizer = byte_tokenizer(bos=not bare)
    # With the usual 0.02, a wrong mask would change logits by less than rounding does.
    model = random_llama(len(tokenizer), seed=seed, initializer_range=0.2, **TINY)
    words, info = (BARE if bare else WORDS), None
    if (trained := TRAINED[weights]) is not None:
        digests = base_fingerprint(model), tokenizer_hash(tokenizer)
        info = AdapterInfo("random", *digests, trained, words)
        if trained.num_learned:
            install_links(model, new_links(model, trained.num_learned, seed))
    return Engine(model, tokenizer, format=words, adapter=info)


def random_llama(vocab_size: int, *, seed: int = 0, **config) -> LlamaForCausalLM:
    """A Llama with random weights; ``config`` are fields of `LlamaConfig`."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": vocab_size - 1, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **ids, **config)).eval()


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and no chat template, with or without a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
