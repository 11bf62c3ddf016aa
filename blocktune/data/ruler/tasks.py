"""The thirteen tasks of RULER: how each is made, worded and scored."""

from __future__ import annotations

from dataclasses import dataclass

from blocktune.data.ruler.chains import INSTRUCTION as VT_INSTRUCTION
from blocktune.data.ruler.counting import CWE_INSTRUCTION
from blocktune.data.ruler.niah import Niah
from blocktune.prompt.format import PromptFormat

ALL, ANY = "ruler_recall", "ruler_any"
"""The evaluation's names of RULER's scorers: ``string_match_all``, the share of answers that the
output holds, and ``string_match_part``, whether it holds any of them."""

_FWE_INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words."
)


@dataclass(frozen=True)
class RulerTask:
    """One task.

    Attributes:
        family: ``niah``, ``vt``, ``cwe``, ``fwe``, ``squad`` or ``hotpotqa``: what makes it.
        instruction: What RULER says before the context.
        scorer: ``ruler_recall`` or ``ruler_any``.
        max_new_tokens: Longest answer, counted in the length of the prompt as RULER does.
        least: Smallest size of the context: lines, sentences, words or documents.
        niah: The variant of a needle task, else None.
        question: What RULER says around the question, after the context.
    """

    family: str
    instruction: str
    scorer: str
    max_new_tokens: int
    least: int = 1
    niah: Niah | None = None
    question: str = "Question: {question}"

    @property
    def format(self) -> PromptFormat:
        """The wording of RULER's prompt, chunks in place of the context."""
        return PromptFormat(
            instruction=self.instruction,
            titled="{title}\n{text}\n",
            untitled="{text}\n",
            question=self.question,
        )


def _niah(haystack: str, **changes) -> RulerTask:
    variant = Niah(haystack, **changes)
    several = variant.num_values * variant.num_queries > 1
    kind = variant.values if several else variant.values[:-1]
    some, are = ("Some", "are") if several else ("A", "is")
    instruction = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards."
    )
    return RulerTask("niah", instruction, ALL, 128, niah=variant, question="{question}")


def _qa(dataset: str) -> RulerTask:
    asked = "Answer the question based on the given documents. Only give me the answer and do not "
    asked += "output any other words."
    instruction = f"{asked}\n\nThe following are given documents."
    question = f"{asked}\n\nQuestion: {{question}}"
    return RulerTask(dataset, instruction, ANY, 32, question=question)


RULER_TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", values="uuids"),
    "niah_multikey_1": _niah("essay", num_keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _niah("essay", num_values=4),
    "niah_multiquery": _niah("essay", num_queries=4),
    "vt": RulerTask("vt", VT_INSTRUCTION, ALL, 30),
    "cwe": RulerTask("cwe", CWE_INSTRUCTION, ALL, 120, least=11),
    "fwe": RulerTask("fwe", _FWE_INSTRUCTION, ALL, 50, least=64),
    "qa_1": _qa("squad"),
    "qa_2": _qa("hotpotqa"),
}
"""By RULER's name. Source: ``scripts/synthetic.yaml`` and ``constants.py`` of its repository."""
