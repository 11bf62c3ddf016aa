"""A small byte-level BPE tokenizer, trained on generated worlds, with a chat template."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.prompt import PromptFormat

BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
RESTATE = "Repeat the facts."
"""The last user turn of a training conversation, which asks for all facts of the context."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""One BOS, then each turn after the token of its role, untrimmed. EOS ends assistant turns."""


def world_texts(
    fmt: PromptFormat, seed: int, aliased: float, num_worlds: int = 8000
) -> Iterator[str]:
    """Yields the pieces of text that occur in prompts of training worlds."""
    config = WorldConfig(
        seed=seed, num_examples=num_worlds * 5, questions_per_world=5, aliased=aliased
    )
    for example in generate_examples(config):
        if example.id.endswith("-0"):
            yield fmt.instruction + "\n\n"
            yield RESTATE
            yield from map(fmt.render_chunk, example.chunks)
        yield fmt.render_question(example.question)
        yield example.target


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains the tokenizer.

    Args:
        texts: Training texts; a common word becomes one token.
        vocab_size: Maximum number of tokens: special ones, 256 bytes and merges.

    Returns:
        A lossless tokenizer for UTF-8 text. It adds no BOS, since the chat template does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
