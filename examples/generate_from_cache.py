"""Uses stock `generate` with cached chunks: one context, several questions.

Run it: ``python examples/generate_from_cache.py [MODEL] [METHOD]``.
"""

import sys

from blocktune import Chunk, Engine

CHUNKS = [
    Chunk("Anna Belt was born in Port Alder. She is a painter.", "Anna Belt"),
    Chunk("Frozen Shore is a film from 1966. It was directed by Noel Fisher.", "Frozen Shore"),
]
QUESTIONS = ["Who directed Frozen Shore?", "Where was Anna Belt born?"]


def main(model: str = "data/tiny", method: str = "naive") -> None:
    """Answers every question from the same cache."""
    engine = Engine.from_pretrained(model)
    context = engine.cache(CHUNKS, method)
    for question in QUESTIONS:
        inputs = context.inputs(question)
        output = engine.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        print(question, "->", engine.tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
