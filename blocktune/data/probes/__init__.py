"""What the study left open: conversations whose turns are chunks, code whose files are chunks.

Source: arXiv:2603.20218, section 6.
"""

from blocktune.data.probes.code import CodeConfig, generate_code
from blocktune.data.probes.dialogue import DialogueConfig, generate_dialogues

__all__ = ["CodeConfig", "DialogueConfig", "generate_code", "generate_dialogues"]
