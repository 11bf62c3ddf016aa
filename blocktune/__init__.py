"""Fine-tune, cache and reuse retrieved chunks with any RoPE decoder on the Hugging Face stack.

The public names below are imported on first use, so that ``import blocktune`` and
``blocktune --help`` load neither torch nor transformers::

    from blocktune import Engine, load_examples

    engine = Engine.from_pretrained("data/tiny")
    examples = load_examples("worlds:test?seed=1&n=8")
    for answer in engine.answer(examples, "cacheblend"):
        print(answer.text, answer.usage.recompute_ratio)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Usage": "blocktune.engine:Usage",
    "Answer": "blocktune.engine:Answer",
    "BlockDataCollator": "blocktune.training.collator:BlockDataCollator",
    "BlockSFTConfig": "blocktune.training.config:BlockSFTConfig",
    "BlockSFTTrainer": "blocktune.training.trainer:BlockSFTTrainer",
    "Chunk": "blocktune.prompt:Chunk",
    "Engine": "blocktune.engine:Engine",
    "Layout": "blocktune.layout:Layout",
    "LayoutSpec": "blocktune.prompt:LayoutSpec",
    "PromptFormat": "blocktune.prompt:PromptFormat",
    "RagExample": "blocktune.data:RagExample",
    "SaveLayoutCallback": "blocktune.training.checkpoint:SaveLayoutCallback",
    "Sampling": "blocktune.engine:Sampling",
    "attach": "blocktune.attention:attach",
    "available_methods": "blocktune.methods:available",
    "block_attention": "blocktune.attention:block_attention",
    "build_method": "blocktune.methods:build",
    "detach": "blocktune.attention:detach",
    "load_examples": "blocktune.data:load_examples",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blocktune' has no attribute '{name}'")
    module, attribute = _HOMES[name].split(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
