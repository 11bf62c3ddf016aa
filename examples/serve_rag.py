"""RAG over a folder of Markdown: BM25 finds sections, the server reuses their cached keys.

Start ``blocktune serve --model data/tiny``, then: ``python examples/serve_rag.py docs/ "Why?"``.
"""

import re
import sys
from pathlib import Path

from openai import OpenAI

from blocktune.data.retrieval import Index
from blocktune.prompt import Chunk


def sections(folder: str) -> list[Chunk]:
    """All sections of all files as chunks, with their headings as titles."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob("*.md")))
    files = (re.split(r"^#+\s*(.+)$", text, flags=re.M)[1:] for text in texts)
    pairs = (pair for parts in files for pair in zip(parts[::2], parts[1::2], strict=True))
    return [Chunk(text.strip(), title.strip()) for title, text in pairs if text.strip()]


def main(folder: str, question: str, url: str = "http://127.0.0.1:8000/v1", k: int = 5) -> None:
    """Retrieves sections and prints the answer as it is generated."""
    client = OpenAI(base_url=url, api_key="none")
    corpus = sections(folder) or sys.exit(f"no Markdown sections in '{folder}'")
    best = [corpus[place] for place in Index(corpus).search([question], k)[0]]
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"documents": [{"title": c.title, "text": c.text} for c in best]},
    )
    for event in stream:
        print("".join(c.delta.content or "" for c in event.choices), end="", flush=True)
    print(f"\n{event.usage.prompt_tokens_details.cached_tokens} prompt tokens were cached")


if __name__ == "__main__":
    main(*sys.argv[1:4])
