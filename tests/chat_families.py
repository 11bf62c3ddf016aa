"""Chat templates of model families, on a small tokenizer."""

import functools

from tiny_tokenizer import build_tokenizer, trl_template

# Trims user text: llama3. No system role: gemma. Thinks unless told not to: qwen3, qwen3_5_think.
# Today's date: llama3_2. Wants lists of parts: PARTS. No BOS of its own: qwen2_5, phi3.
FAMILIES = ("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_5_think", "gemma")
FAMILIES += ("gemma3", "phi3", "cohere", "deepseekv3", "llava_next", "smolvlm")
PARTS = ("llava_next", "smolvlm")


@functools.cache
def family(name: str):
    """The template of a family on a tokenizer that puts BOS before text by itself."""
    return build_tokenizer(trl_template(name), adds_bos=True)


def unthought(rendered: str) -> str:
    """A rendered prompt whose template opens the model's thoughts, with none in them."""
    opened = "<think>\n"
    return f"{rendered}\n</think>\n\n" if rendered.endswith(opened) else rendered
