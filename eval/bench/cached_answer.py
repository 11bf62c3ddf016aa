"""Time to first token of cached answers against a full prefill."""

import random
from dataclasses import asdict

from shape import Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blocktune.data import RagExample
from blocktune.engine import Engine, Usage
from blocktune.prompt import Chunk

METHODS = ("full-prefill", "naive", "cacheblend", "epic")


def measure_cached_answer(shape: Shape, repeats: int = 3) -> dict:
    """The fastest of some answers by each method, every chunk already cached."""
    engine = Engine(shape.model(), word_tokenizer(shape.vocabulary))
    example = random_example(shape)
    engine.encode(example.chunks)
    usages = {name: fastest(engine, example, name, repeats) for name in METHODS}
    full_s = usages["full-prefill"].ttft_s
    return {
        name: {
            "ttft_s": usage.ttft_s,
            "ttft_over_full": usage.ttft_s / full_s,
            "ttft": asdict(usage.ttft),
            "recompute_ratio": usage.recompute_ratio,
            "context_tokens": usage.context_tokens,
            "chunk_hits": usage.chunk_hits,
            "chunk_misses": usage.chunk_misses,
            "bytes_read": usage.bytes_read,
        }
        for name, usage in usages.items()
    }


def fastest(engine: Engine, example: RagExample, method: str, repeats: int) -> Usage:
    """The usage of the fastest answer; one before them warms up kernels and the allocator."""
    answers = [engine.answer([example], method, max_new_tokens=8) for _ in range(repeats + 1)]
    return min((answer.usage for [answer] in answers[1:]), key=lambda usage: usage.ttft_s)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a word, so that a chunk's length is known; no file is needed."""
    words = {f"w{index}": index + 2 for index in range(min(size, 4096) - 2)}
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def random_example(shape: Shape) -> RagExample:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1000)}" for _ in range(count))

    chunks = [Chunk(words(shape.chunk)) for _ in range(shape.tokens // shape.chunk)]
    return RagExample(question=words(shape.question), chunks=tuple(chunks), answers=("w0",))
