"""Every supported family: trained with links on a base from a folder, saved, loaded and served."""

import pytest
import torch
from families import BASE, FAMILIES, HEAD, build
from training.runs import make_trainer
from training.test_served import trained_logits
from training.toy import toy_examples, toy_tokenizer
from transformers import Llama4TextConfig, NemotronConfig, PhimoeConfig, StableLmConfig

from blocktune.data.example import write_jsonl
from blocktune.engine import Engine


def save_base(folder, config) -> None:
    """A base and examples, as `write_run` would make them of the toy model."""
    config.vocab_size = len(toy_tokenizer())
    build(config).save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    write_jsonl(folder / "train.jsonl", toy_examples(16))


def require_served(folder, trainer, method: str) -> None:
    """Trains: the logits are served from files and caches, and not those of the base."""
    trainer.train()
    trainer.save_model()
    engine = Engine.from_pretrained(str(folder / "base"), str(folder / "out"), device="cpu")
    served = engine.next_logits(toy_examples(1), method)[0]
    torch.testing.assert_close(served, trained_logits(trainer, block=True), rtol=1e-5, atol=2e-5)
    plain = Engine.from_pretrained(str(folder / "base"), device="cpu")
    assert (plain.next_logits(toy_examples(1), "naive")[0] - served).abs().max() > 1e-2
    logits = plain.model(torch.arange(8)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_as_it_was_trained(tmp_path, family):
    save_base(tmp_path, FAMILIES[family]())
    trainer = make_trainer(tmp_path, num_links=1, max_steps=2, learning_rate=1e-2)
    require_served(tmp_path, trainer, "kvlink")


@pytest.mark.parametrize("config", [NemotronConfig, StableLmConfig])
@pytest.mark.parametrize("scope", ["encode", "read"])
def test_layers_that_pass_only_their_mask_to_attention(tmp_path, config, scope):
    """Their attention finds its plan and its rows, also when checkpointing runs a layer again."""
    save_base(tmp_path, config(**BASE))
    options = {"lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True}
    options |= {"scope": scope, "max_steps": 2, "learning_rate": 1e-1}
    require_served(tmp_path, make_trainer(tmp_path, **options), "block-attention")


ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}


@pytest.mark.parametrize("config", [Llama4TextConfig, PhimoeConfig])
def test_routers_that_are_linear_layers_are_left_out_of_all_of_them(tmp_path, config):
    save_base(tmp_path, config(**HEAD | ROUTED))
    trainer = make_trainer(tmp_path, num_links=1, max_steps=2, learning_rate=1e-2)
    require_served(tmp_path, trainer, "kvlink")
    assert not any("router" in name and "lora" in name for name, _ in trainer.model.named_modules())


def test_prompts_of_a_packed_row_are_trained_as_they_are_served(tmp_path):
    """Llama 4 scales queries by their index in the row, whatever their position is."""
    save_base(tmp_path, Llama4TextConfig(**HEAD | ROUTED, floor_scale=200))
    packed = make_trainer(tmp_path, pack_length=250).train_dataset
    assert 100 < max(packed["length"]) <= 199
