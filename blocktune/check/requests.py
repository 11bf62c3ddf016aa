"""The requests that methods are checked on: short, ragged, one of them a single chunk."""

from __future__ import annotations

from dataclasses import dataclass

from blocktune.prompt import Chunk


@dataclass(frozen=True)
class Ask:
    """A question over chunks; the engine's `Request`."""

    question: str
    chunks: tuple[Chunk, ...]


ASK = Ask(
    "Who directed it?",
    (
        Chunk("Anna Belt was born in Port Alder.", "Anna Belt"),
        Chunk("She moved to Kirby."),
        Chunk("The film was directed by Noel Fisher.", "Frozen Shore"),
    ),
)
OTHER = Ask("And where was the music written?", ASK.chunks)
SHORT = Ask("Who?", (Chunk("It was shot in 1966."), Chunk("The company is in Lorne.")))
ALONE = Ask("Who directed it?", ASK.chunks[2:])
LAST = Ask(
    ASK.question, (*ASK.chunks[:2], Chunk("The song was written by Walter Green.", "Frozen Lorne"))
)
"""`ASK` with another last chunk of the same length in bytes, the specimen's tokens."""
HISTORY = (
    Ask("Who was she?", (ASK.chunks[1], ASK.chunks[2], ASK.chunks[0])),
    Ask("Where?", (*SHORT.chunks[::-1], *LAST.chunks[2:])),
)
"""Earlier prompts, for methods that live on them: all chunks of the others, in other contexts, and
none of them twice."""
