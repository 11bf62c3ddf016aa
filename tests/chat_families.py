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


def rendered(name: str, messages: list[tuple[str, str]]) -> str:
    """What a family's template itself makes of (role, text), the assistant's next turn opened.

    BOS where the template leaves it out; thoughts that it opens are closed, with none in them.
    """
    text = family(name).apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": said}] if name in PARTS else said}
            for role, said in messages
        ],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    text = f"{text}\n</think>\n\n" if text.endswith("<think>\n") else text
    return text if text.startswith("<s>") else f"<s>{text}"
