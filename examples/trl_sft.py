"""Block attention in your own TRL script: `python examples/trl_sft.py [OUTPUT]`."""

import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from blocktune import BlockDataCollator, LayoutSpec, SaveLayoutCallback, attach, load_examples

set_seed(0)
model = AutoModelForCausalLM.from_pretrained("data/tiny", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("data/tiny")
attach(model)  # a forward pass with a layout uses its mask; all others are unchanged
collator = BlockDataCollator(tokenizer, LayoutSpec())
examples = load_examples("worlds:train?seed=1&n=160&turns=8")
trainer = SFTTrainer(
    model,
    SFTConfig(
        sys.argv[1] if len(sys.argv) > 1 else "out/trl_sft",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,  # the collator reads question, chunks and answers
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=Dataset.from_list([example.to_json() for example in examples]),
    data_collator=collator,
    callbacks=[SaveLayoutCallback(collator)],  # saves the files for Engine.from_pretrained(OUTPUT)
    peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
