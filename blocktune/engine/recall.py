"""Serving chunks from earlier full prompts, and learning from those computed in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blocktune.cache import ChunkKV, Recall, RowCache, Variant, VariantStore, cache_fix_overhead
from blocktune.engine.attention_probes import ChunkMass
from blocktune.engine.encode import Encoder, Piece
from blocktune.layout import GLOBAL, Kind
from blocktune.methods.select import Stored
from blocktune.prompt import Batch, Pieces

Ids = tuple[int, ...]


def contexts_of(variants: VariantStore, pieces: Pieces, how: Recall) -> list[Ids] | None:
    """What each chunk of a prompt was encoded after, in the variant that fits this prompt best.

    Returns:
        Blanks of every chunk, or None where a chunk has no variant, or where so much would have to
        be recomputed that little is saved: such a prompt is computed in full, which is exact and
        leaves a variant of each of its chunks behind.
    """
    chunks = pieces.chunks
    found = [variants.recall(c, chunks[:i], how.alpha) for i, c in enumerate(chunks)]
    if None in found:
        return None
    afresh = sum(r.overhead * len(c) for r, c in zip(found, chunks, strict=True))
    if afresh > how.refresh * sum(map(len, chunks)):
        return None
    contexts = [recalled.variant.blanks for recalled in found]
    for chunk, blanks in zip(pieces.chunks, contexts, strict=True):
        variants.used(chunk, blanks)
    return contexts


def rehearsals(pieces: Sequence[Pieces], count: int) -> list[list[Pieces]]:
    """``count`` earlier batches over the same chunks, each time turned by one place more."""
    return [[_turned(prompt, by) for prompt in pieces] for by in range(1, count + 1)]


def _turned(pieces: Pieces, by: int) -> Pieces:
    by = by % max(1, len(pieces.chunks))
    return pieces._replace(chunks=pieces.chunks[by:] + pieces.chunks[:by])


def stored_context(
    variants: VariantStore, batch: Batch, pieces: Sequence[Pieces], alpha: float
) -> Stored:
    """Looks up, for every chunk of a batch, what is stored of the variant it is served from."""
    layout = batch.layout
    result = Stored(torch.ones_like(layout.kind).float(), torch.zeros_like(layout.kind).float())
    for index, prompt in enumerate(pieces):
        for number, chunk in enumerate(prompt.chunks):
            own = layout.chunk[index] == number
            blanks = batch.input_ids[index, own & (layout.kind[index] == Kind.BLANK)]
            variant = variants.of(chunk, tuple(blanks.tolist()))
            if variant is None:
                continue
            context = prompt.chunks[:number]
            share = cache_fix_overhead(variant, len(chunk), context, alpha)
            rows = own & layout.is_context[index]
            result.overhead[index, rows] = share
            result.tokens[index, rows] = variant.tokens.to(result.tokens.device)
    return result


def learn(
    encoder: Encoder, cache: RowCache, mass: ChunkMass, pieces: Sequence[Pieces], how: Recall
) -> None:
    """Keeps every chunk of the prompts that were computed in full, and what it attended to.

    Args:
        encoder: Its variants learn the statistics. Its store keeps the keys and values, under the
            key that encoding the chunk after these very blanks would have.
        cache: After the prefill.
        mass: What rows paid chunks, all layers read.
        pieces: The prompts; those served from caches are passed over.
        how: Says how many variants of a chunk are kept.
    """
    columns = mass.columns
    for index, prompt in enumerate(pieces):
        blanks = prompt.prefix
        for number, chunk in enumerate(prompt.chunks):
            own = (columns.chunk[index] == number) & (columns.kind[index] == Kind.CHUNK)
            if int(columns.group[index][own][0]) != GLOBAL:
                break
            piece = Piece(chunk, blanks)
            kv = _cut(cache, index, own, piece, encoder.fingerprint)
            encoder.store.put(encoder.key(piece), kv)
            paid = mass.mass[index, own].cpu() / mass.layers
            outside = paid[:, :number]
            encoder.variants.learn(
                chunk,
                Variant(
                    prefix=prompt.prefix,
                    context=prompt.chunks[:number],
                    inter=outside.sum(0),
                    tokens=outside.sum(1),
                    intra=float(paid[:, number].sum()),
                ),
                how.most,
            )
            blanks = blanks + chunk


def _cut(cache: RowCache, prompt: int, own: Tensor, piece: Piece, fingerprint: str) -> ChunkKV:
    """One chunk out of a full prefill, at the position where it stood."""
    return ChunkKV(
        keys=tuple(layer.keys[prompt][:, own] for layer in cache.layers),
        values=tuple(layer.values[prompt][:, own] for layer in cache.layers),
        token_ids=torch.tensor(piece.ids),
        fingerprint=fingerprint,
        origin=len(piece.blanks),
    ).compact()
