"""Publishing on the Hugging Face Hub: what is sent, the model card, and the refusal of what fails.

Loading back needs nothing from here: an adapter's name is accepted wherever its folder is.
"""

from blocktune.hub.card import CardFacts
from blocktune.hub.publisher import Publisher
from blocktune.hub.push import Publication, Sent, prepare, send, show

__all__ = ["CardFacts", "Publication", "Publisher", "Sent", "prepare", "send", "show"]
