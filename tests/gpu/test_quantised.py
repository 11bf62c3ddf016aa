"""4- and 8-bit bases on the device: trained on, served with their adapter, moved nowhere."""

import pytest
import torch
from training.runs import make_trainer
from training.toy import toy_examples

from blocktune.engine import Engine


@pytest.mark.parametrize(("name", "flag"), [("nf4", "load_in_4bit"), ("int8", "load_in_8bit")])
def test_an_adapter_is_trained_and_served_on_a_quantised_base(tmp_path, shape, name, flag):
    on_cpu = shape.device == "cpu"
    options = {flag: True, "dtype": "float32" if on_cpu else "bfloat16", "bf16": not on_cpu}
    trainer = make_trainer(tmp_path, num_links=2, use_cpu=on_cpu, **options)
    trainer.train()
    trainer.save_model()
    engine = Engine.from_pretrained(
        str(tmp_path / "base"), tmp_path / "out", quantize=name, dtype=options["dtype"]
    )
    assert engine.model.device.type == shape.device
    logits = engine.next_logits(toy_examples(2), "kvlink")
    assert logits.isfinite().all()
    again = engine.next_logits(toy_examples(2), "kvlink")
    torch.testing.assert_close(again, logits)
