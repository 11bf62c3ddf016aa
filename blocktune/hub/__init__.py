"""Publishing adapters on the Hugging Face Hub: the files, the model card, and checks before."""

from blocktune.hub.card import CardFacts
from blocktune.hub.push import Publisher, prepare, send, show

__all__ = ["CardFacts", "Publisher", "prepare", "send", "show"]
