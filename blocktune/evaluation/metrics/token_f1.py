"""CacheBlend's F1, which compares token ids instead of words."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from blocktune.evaluation.metrics.squad import bag_f1, best, normalize_answer


def token_f1(prediction: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """F1 of the bags of token ids of the normalised texts, without the first token of each.

    Only the first line counts, and one that opens with yes or no counts as that word.

    Args:
        prediction: The output.
        answers: Accepted answers.
        tokenizer: The model's own; scores of different tokenizers do not compare.

    Source: ``compute_f1`` and ``parse_generation`` of github.com/YaoJiayi/CacheBlend,
    ``example/utils.py``. There the first token is dropped because it is BOS; a tokenizer that adds
    none (Qwen) would lose a word, so it is dropped only where it is BOS. Departure: a blank
    prediction is scored, where the source fails.
    """
    predicted = _ids(tokenizer, normalize_answer(first_line(prediction)))
    return best(
        lambda answer: bag_f1(predicted, _ids(tokenizer, normalize_answer(answer))), answers
    )


def first_line(text: str) -> str:
    """The first line, shortened to yes or no where it opens so."""
    line = text.lstrip("\n").split("\n")[0]
    if line.startswith(("Yes", "yes")):
        return "Yes"
    # The source looks for "No" behind leading space, but for "Yes" only at the very start.
    if line.split() and line.split()[0].startswith(("No", "no")):
        return "No"
    return line


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    opens = bool(ids) and ids[0] == tokenizer.bos_token_id
    return ids[1:] if opens else ids
