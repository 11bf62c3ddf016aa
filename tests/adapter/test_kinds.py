"""Adapters of any PEFT configuration: served as they were trained, or refused in one line."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training.runs import DEFAULTS
from training.toy import save_toy, toy_examples, toy_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from blocktune import BlockDataCollator, BlockSFTConfig, BlockSFTTrainer, SaveLayoutCallback, attach
from blocktune.adapter import attach_links
from blocktune.adapter.load import load_model
from blocktune.adapter.merge import merge_adapter
from blocktune.check import check_adapter
from blocktune.links import installed_links, save_links
from blocktune.models.load import load_base
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.training.checkpoint import AdapterFiles, adapter_info

IDS = torch.arange(10, 40)[None]
TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
TASK = {"task_type": "CAUSAL_LM"}
REFUSED = {
    "a PROMPT_TUNING adapter": lambda: peft.PromptTuningConfig(**TASK, num_virtual_tokens=2),
    "a PREFIX_TUNING adapter": lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=2),
    "layer_replication": lambda: LoraConfig(**TARGETS, layer_replication=[[0, 2], [1, 2]]),
    "alora_invocation_tokens": lambda: LoraConfig(**TARGETS, **TASK, alora_invocation_tokens=[5]),
}
UNMERGED = {
    "lora_bias": {**TARGETS, "lora_bias": True},
    "tied": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 4]},
}
MERGED = {
    "patterns": {**TARGETS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "layers": {**TARGETS, "layers_to_transform": [1]},
    "saved as one": {**TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved apart": {**TARGETS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {**TARGETS, "trainable_token_indices": [3, 4]},
    "olora": {**TARGETS, "init_lora_weights": "olora"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("base"))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def save(base, folder, config):
    """An adapter with random weights, as another trainer would leave it; returns its logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    fields = {"layout": LayoutSpec(), "format": PromptFormat(), "training": {}}
    files = AdapterFiles(adapter_info(model, toy_tokenizer(), **fields))
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    files.write_weights(model, folder, None)
    files.complete(model, toy_tokenizer(), folder, None)
    return logits(model) if not config.is_prompt_learning else None


def trainer(model, folder, peft_config=None, **options):
    args = BlockSFTConfig(str(folder), **options_of(max_steps=2, **options))
    return BlockSFTTrainer(
        model, args, None, toy_examples(8), None, toy_tokenizer(), peft_config=peft_config
    )


def options_of(**options):
    names = BlockSFTConfig.__dataclass_fields__
    return {key: value for key, value in DEFAULTS.items() if key in names} | options


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_the_whole_prompt_is_refused_at_every_door(base, tmp_path, kind):
    save(base, tmp_path / "out", REFUSED[kind]())
    for door in (
        lambda: load_model(str(base), tmp_path / "out", device="cpu"),
        lambda: load_model(adapter=tmp_path / "out", merge=False, device="cpu"),
        lambda: merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu"),
        lambda: check_adapter(None, tmp_path / "out", device="cpu"),
        lambda: trainer(AutoModelForCausalLM.from_pretrained(base), tmp_path, REFUSED[kind]()),
        lambda: attach_links(
            get_peft_model(AutoModelForCausalLM.from_pretrained(base), REFUSED[kind]()),
            tmp_path / "out",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{kind} .*train LoRA without it$"):
            door()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", UNMERGED)
def test_what_peft_cannot_merge_is_served_unmerged(base, tmp_path, kind, caplog):
    wanted = save(base, tmp_path / "out", LoraConfig(**UNMERGED[kind]))
    served = load_model(adapter=tmp_path / "out", device="cpu").model
    torch.testing.assert_close(logits(served), wanted, rtol=0, atol=1e-5)
    assert caplog.text.count("is served without merging it: ") == 1
    assert all(check.passed for check in check_adapter(None, tmp_path / "out", device="cpu"))
    with pytest.raises(ValueError, match=r"cannot be merged: .*; serve it with --adapter"):
        merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", MERGED)
def test_all_else_is_merged_as_it_was_trained(base, tmp_path, kind):
    wanted = save(base, tmp_path / "out", LoraConfig(**MERGED[kind]))
    merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (stock, load_model(adapter=tmp_path / "out", device="cpu").model):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=2e-5)
    assert all(check.passed for check in check_adapter(None, tmp_path / "out", device="cpu"))


def named(base, *names):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**TARGETS), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**TARGETS))
    model.set_adapter(names[-1])
    return model


@pytest.mark.parametrize("names", [["mine"], ["default", "mine"]])
def test_the_trained_adapter_is_served_by_any_name(base, tmp_path, names):
    """PEFT saves adapters that are not named "default" in a folder below."""
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    run = trainer(named(base, *names), tmp_path, **options)
    run.train()
    run.save_model()
    wanted = logits(run.model)
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        served = load_model(adapter=folder, device="cpu").model
        torch.testing.assert_close(logits(served), wanted, rtol=0, atol=1e-5)
    again = trainer(named(base, *names), tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(logits(again.model), wanted, rtol=0, atol=1e-5)


def test_another_trainers_adapter_may_have_a_name(base, tmp_path):
    model = named(base, "default", "mine")
    attach(model)
    collator = BlockDataCollator(toy_tokenizer(), LayoutSpec())
    args = {"max_steps": 1, "report_to": "none", "use_cpu": True, "remove_unused_columns": False}
    run = Trainer(
        model,
        TrainingArguments(str(tmp_path), **args, learning_rate=0.1),
        collator,
        toy_examples(8),
        callbacks=[SaveLayoutCallback(collator)],
    )
    run.train()
    run.save_model()
    served = load_model(adapter=tmp_path, device="cpu").model
    torch.testing.assert_close(logits(served), logits(model), rtol=0, atol=1e-5)


def test_several_active_adapters_are_refused_before_the_run(base, tmp_path):
    model = named(base, "default", "mine")
    model.base_model.set_adapter(["default", "mine"])
    with pytest.raises(ValueError, match=r"several adapters are active \(default, mine\)"):
        trainer(model, tmp_path)


@pytest.mark.parametrize("below", [False, True])
def test_an_adapter_without_its_peft_files_is_not_the_base(base, tmp_path, below):
    save(base, tmp_path / "out", LoraConfig(**TARGETS))
    (tmp_path / "out/mine").mkdir()
    for path in (tmp_path / "out").glob("adapter_*"):
        path.rename(tmp_path / "out/mine" / path.name) if below else path.unlink()
    with pytest.raises(ValueError, match=r"out' lacks one of adapter_config\.json and"):
        load_model(adapter=tmp_path / "out", device="cpu")


def test_training_goes_on_from_an_adapters_link_table(base, tmp_path):
    """From PEFT's model with its links, or from the merged folder; only of the same size."""
    first = trainer(
        AutoModelForCausalLM.from_pretrained(base),
        tmp_path / "out",
        LoraConfig(**TARGETS),
        num_links=2,
    )
    first.save_model()
    wanted = installed_links(first.model).weight.data.normal_().clone()
    save_links(installed_links(first.model), tmp_path / "out")
    merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu")

    def loaded():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "out", is_trainable=True)
        attach_links(model, tmp_path / "out")
        return model

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model, adapter in ((loaded(), None), (merged, LoraConfig(**TARGETS))):
        made = trainer(model, tmp_path / "on", adapter, num_links=2, seed=3).model
        table = installed_links(made).weight
        assert table.dtype == torch.float32
        assert table.requires_grad
        torch.testing.assert_close(table.data, wanted, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="it is an adapter; name its base, or merge it first"):
        load_base(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"has 2 trained link, .* this layout 1"):
        trainer(loaded(), tmp_path / "on", num_links=1)


def test_link_tokens_are_trained_beside_other_tokens(base, tmp_path):
    links = {"num_links": 2, "link_mode": "added_tokens"}
    size = len(toy_tokenizer())
    for tokens in ([3, 4], {"embed_tokens": [3, 4]}):
        config = LoraConfig(**TARGETS, trainable_token_indices=tokens)
        model = trainer(AutoModelForCausalLM.from_pretrained(base), tmp_path, config, **links).model
        [rows] = model.peft_config["default"].trainable_token_indices.values()
        assert rows == [3, 4, size, size + 1]
    wrong = peft.IA3Config(**TASK, target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="IA3 cannot train the tokens of link_mode"):
        trainer(AutoModelForCausalLM.from_pretrained(base), tmp_path, wrong, **links)
    wrong = LoraConfig(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="PEFT cannot make this adapter for the model: TypeError"):
        trainer(AutoModelForCausalLM.from_pretrained(base), tmp_path, wrong, **links)


def test_a_merge_of_weights_that_are_no_numbers_writes_nothing(base, tmp_path):
    save(base, tmp_path / "out", LoraConfig(**TARGETS))
    path = tmp_path / "out/adapter_model.safetensors"
    save_file({name: weight * float("nan") for name, weight in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="gives logits that are not numbers"):
        merge_adapter(tmp_path / "out", tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()
