"""Fine-tune, cache and reuse retrieved chunks with any RoPE decoder on the Hugging Face stack.

The public names below are imported on first use, so that ``import blocktune`` and
``blocktune --help`` load neither torch nor transformers::

    from blocktune import Engine, load_examples

    engine = Engine.from_pretrained("data/tiny")
    examples = load_examples("worlds:test?seed=1&n=8")
    for answer in engine.answer(examples, "cacheblend"):
        print(answer.text, answer.usage.recompute_ratio)
"""

from blocktune.lazy import exports

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.attention": "attach block_attention detach",
        "blocktune.data": "RagExample load_examples",
        "blocktune.engine": "Answer Engine Sampling Usage",
        "blocktune.layout": "Layout",
        "blocktune.methods": "available_methods=available build_method=build",
        "blocktune.prompt": "Chunk LayoutSpec PromptFormat",
        "blocktune.training.checkpoint": "SaveLayoutCallback",
        "blocktune.training.collator": "BlockDataCollator",
        "blocktune.training.config": "BlockSFTConfig",
        "blocktune.training.trainer": "BlockSFTTrainer",
    },
)
__all__.append("__version__")
