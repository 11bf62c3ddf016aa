"""Where a run's examples come from and how they are worded."""

from __future__ import annotations

from dataclasses import dataclass, field

from blocktune.prompt import PromptFormat


@dataclass
class DataArgs:
    """Where examples come from and how they are worded.

    Raises:
        ValueError: If no examples are named, two ways to name them are mixed, or the wording
            lacks a placeholder.
    """

    train_data: str = field(
        default="", metadata={"help": "Source of examples, see `load_examples`: file, hf:, worlds:"}
    )
    train_limit: int | None = field(
        default=None, metadata={"help": "Use the first examples only, at most this many"}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "YAML of a mixture of sources and modes, for train_data"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Source of examples for the evaluation loss"}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on the first examples only"}
    )
    instruction: str = field(
        default=PromptFormat.instruction, metadata={"help": "Opens the user turn"}
    )
    system: str | None = field(default=None, metadata={"help": "Text of the system turn"})
    titled: str = field(
        default=PromptFormat.titled, metadata={"help": "A chunk with {title} and {text}"}
    )
    untitled: str = field(
        default=PromptFormat.untitled, metadata={"help": "A chunk without a title: {text}"}
    )
    question_format: str = field(
        default=PromptFormat.question, metadata={"help": "What follows the chunks: {question}"}
    )
    block_tag: str = field(
        default="", metadata={"help": "Opens the user turn of block examples, also when served"}
    )
    full_tag: str = field(default="", metadata={"help": "The same in full attention"})

    def __post_init__(self):
        if not self.train_data and not self.mixture:
            raise ValueError("train_data is missing; name a source, e.g. 'worlds:train?seed=1'")
        if self.mixture and (self.train_data or self.train_limit is not None):
            raise ValueError(
                "a mixture names its own sources and limits; leave train_data and train_limit out"
            )
        _ = self.format  # checks the wording before anything is loaded

    @property
    def format(self) -> PromptFormat:
        """The wording of every prompt."""
        return PromptFormat(
            instruction=self.instruction,
            system=self.system,
            titled=self.titled,
            untitled=self.untitled,
            question=self.question_format,
            block_tag=self.block_tag,
            full_tag=self.full_tag,
        )
