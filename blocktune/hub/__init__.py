"""Publishing adapters on the Hugging Face Hub: the files, the model card, and checks before.

Loading does not need it: the name of an adapter on the Hub can be used in place of a folder.
"""

from blocktune.hub.card import CardFacts
from blocktune.hub.push import Publication, Publisher, prepare, send, show

__all__ = ["CardFacts", "Publication", "Publisher", "prepare", "send", "show"]
