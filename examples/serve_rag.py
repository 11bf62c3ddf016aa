"""Asks a folder of Markdown: BM25 finds sections, the server reuses their caches, answers stream.

Start ``blocktune serve --model data/tiny``, then: ``python examples/serve_rag.py docs/ "Why?"``.
"""

import re
import sys
from pathlib import Path

from openai import OpenAI

from blocktune.data.retrieval import Index
from blocktune.prompt import Chunk


def sections(folder: str) -> list[Chunk]:
    """Every section of every file, with its heading as the title."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.md")))
    found = (re.split(r"^#+\s*(.+)$", text, flags=re.M)[1:] for text in texts)
    pairs = (pair for parts in found for pair in zip(parts[::2], parts[1::2], strict=True))
    return [Chunk(text.strip(), title.strip()) for title, text in pairs if text.strip()]


def main(folder: str, question: str, url: str = "http://127.0.0.1:8000/v1", k: int = 5) -> None:
    """Prints the answer while it comes."""
    client = OpenAI(base_url=url, api_key="none")
    corpus = sections(folder) or sys.exit(f"no section of Markdown in '{folder}'")
    best = [corpus[hit.index] for hit in Index(corpus).search([question], k)[0]]
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"documents": [{"title": one.title, "text": one.text} for one in best]},
    )
    for event in stream:
        print("".join(c.delta.content or "" for c in event.choices), end="", flush=True)
    print(f"\n{event.usage.prompt_tokens_details.cached_tokens} prompt tokens were cached")


if __name__ == "__main__":
    main(*sys.argv[1:4])
