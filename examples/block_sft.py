"""Trains an adapter with BlockSFTTrainer: `python examples/block_sft.py [OUTPUT]`."""

import sys

from peft import LoraConfig

from blocktune import BlockSFTConfig, BlockSFTTrainer, load_examples

output = sys.argv[1] if len(sys.argv) > 1 else "out/block_sft"
options = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
options |= {"train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": "none"}
trainer = BlockSFTTrainer(
    "data/tiny",
    BlockSFTConfig(output, **options, gradient_checkpointing=False),
    train_dataset=load_examples("worlds:train?seed=1&n=160&turns=8"),
    peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
