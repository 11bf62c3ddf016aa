"""Publishing on the Hugging Face Hub: which files, the model card, and the checks before.

Loading needs nothing from here: an adapter's name is accepted wherever its folder is.
"""

from blocktune.hub.card import CardFacts
from blocktune.hub.push import Publication, Publisher, prepare, send, show

__all__ = ["CardFacts", "Publication", "Publisher", "prepare", "send", "show"]
