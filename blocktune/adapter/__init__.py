"""Adapters: folders with trained weights and everything needed to serve them."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.adapter.info": "INFO_FILE OWN_WEIGHTS RELEASES AdapterInfo Release find_release",
        "blocktune.adapter.load": "PEFT_FILE attach_links load_adapter",
        "blocktune.adapter.scope": "SCOPES scope_adapter scope_of",
    },
)
