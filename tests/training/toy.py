"""Models, a tokenizer and examples small enough to train inside a test."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from blocktune.data.example import RagExample
from blocktune.prompt import Chunk

NAMES = ("Anna", "Bert", "Clara", "David", "Emil", "Flora", "Gustav", "Hanna")
PLACES = ("Alder", "Birch Hill", "Cedar", "Dogwood by the sea", "Elm", "Fir Hill", "Gorse", "Hazel")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=sorted(alphabet)
    )
    texts = [e.question + " ".join(c.text for c in e.chunks) for e in toy_examples(50)]
    tokenizer.train_from_iterator([*texts, *NAMES, *PLACES], trainer)
    return tokenizer.to_str()


def toy_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def toy_config(**overrides) -> LlamaConfig:
    values = {
        "vocab_size": len(toy_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**values | overrides)


def toy_model(seed: int = 0, config=None):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config or toy_config()).eval()


def save_toy(folder, seed: int = 0, config=None) -> str:
    """A base model's folder, as a user would have it."""
    toy_model(seed, config).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def toy_examples(count: int, chunks: int = 3) -> list[RagExample]:
    """Who lives where; chunks vary in length, so batches are padded, and answers, so that a mean
    of means is no mean over tokens."""
    examples = []
    for index in range(count):
        facts = [((index + k) % 8, (3 * index + k) % 8) for k in range(chunks)]
        passages = tuple(
            Chunk(f"{NAMES[who]} lives in {PLACES[where]}." + " It is far." * (k * index % 3))
            for k, (who, where) in enumerate(facts)
        )
        who, where = facts[index % chunks]
        examples.append(
            RagExample(f"Where does {NAMES[who]} live?", passages, (PLACES[where],), id=str(index))
        )
    return examples
