"""What was trained is what is served: the first answer token's logits, through files and caches."""

import pytest
import torch
from training.runs import make_trainer
from training.toy import toy_examples

from blocktune.attention import make_plan
from blocktune.engine import Engine
from blocktune.layout import Layout
from blocktune.methods import build

PACKETS = {"num_headers": 2, "num_trailers": 1, "freeze_base": True, "use_peft": False}
TAGS = {"block_tag": "[Block-Attention]", "full_tag": "[Full-Attention]", "both_modes": True}
RUNS = {
    "packets": (PACKETS | {"distill_weight": 1.0}, "kv-packet"),
    "markers": ({"num_headers": 1, "num_trailers": 1}, "turborag"),
    "markers, composite": (
        {"num_headers": 1, "num_trailers": 1, "placement": "composite"},
        "composite",
    ),
    "links by chunk": ({"num_links": 2, "link_table": "chunk", "max_chunks": 3}, "kvlink"),
    "one link for all": ({"num_links": 2, "link_table": "shared"}, "kvlink"),
    "links before": ({"num_links": 2, "link_side": "before"}, "kvlink"),
    "tags, block": (TAGS, "block-attention"),
    "tags, full": (TAGS, "full-prefill"),
    "control": ({"block_share": 0.0}, "full-prefill"),
    "writer": ({"scope": "encode", "distill_weight": 1.0}, "block-attention"),
    "writer with answers": ({"scope": "encode", "distill_weight": 0.5}, "block-attention"),
    "writer, rsLoRA": ({"scope": "encode", "use_rslora": True}, "block-attention"),
    "writer, dropout": ({"scope": "encode", "lora_dropout": 0.1}, "block-attention"),
    "writer and packets": (
        {"scope": "encode", "num_headers": 2, "num_trailers": 2, "distill_weight": 1.0},
        "kv-packet",
    ),
    "writer and links": ({"scope": "encode", "num_links": 2}, "kvlink"),
    "writer, shared prefix": ({"scope": "encode", "shared_prefix": True}, "block-attention"),
    "reader": ({"scope": "read"}, "block-attention"),
    "reader, both modes": ({"scope": "read", "both_modes": True}, "full-prefill"),
    "shared prefix": ({"shared_prefix": True}, "block-attention"),
}


def trained_logits(trainer, block: bool) -> torch.Tensor:
    """Logits before the first answer token of the first example, as the trainer lays it out."""
    parts = [part for record in trainer.train_dataset for part in record["parts"]]
    part = next(p for p in parts if p["block"] is block and p["index"] in (0, 1))
    batch = trainer.data_collator([{"parts": [part]}])
    layout = Layout.unpack(batch["layout"])
    before = int((batch["labels"][0] != -100).nonzero()[0]) - 1
    plan = make_plan("split", layout)
    with torch.no_grad():
        out = trainer.model.eval()(
            batch["input_ids"], position_ids=layout.position, plan=plan, use_cache=False
        )
    return out.logits[0, before]


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_is_served_as_it_was_trained(tmp_path, name):
    options, method = RUNS[name]
    composite = build("turborag", positions="composite")
    trainer = make_trainer(tmp_path, **options, max_steps=2, learning_rate=2e-2)
    trainer.train()
    trainer.save_model()
    engine = Engine.from_pretrained(str(tmp_path / "base"), str(tmp_path / "out"), device="cpu")
    asked = composite if method == "composite" else method
    served = engine.next_logits(toy_examples(1), asked)[0]
    trained = trained_logits(trainer, block=method != "full-prefill")
    torch.testing.assert_close(served, trained, rtol=1e-5, atol=2e-5)
    plain = Engine.from_pretrained(str(tmp_path / "base"), device="cpu")
    untrained = plain.next_logits(toy_examples(1), "naive" if method != "full-prefill" else method)
    assert (untrained[0] - served).abs().max() > 1e-2


def test_a_control_is_not_served_as_block_attention(tmp_path):
    trainer = make_trainer(tmp_path, block_share=0.0, max_steps=1)
    trainer.train()
    trainer.save_model()
    engine = Engine.from_pretrained(str(tmp_path / "base"), str(tmp_path / "out"), device="cpu")
    with pytest.raises(ValueError, match="needs an adapter trained with block attention"):
        engine.next_logits(toy_examples(1), "block-attention")
    # Plain reuse of it still cuts the prompt into chunks.
    naive = engine.next_logits(toy_examples(1), "naive")
    full = engine.next_logits(toy_examples(1), "full-prefill")
    assert (naive - full).abs().max() > 1e-3
