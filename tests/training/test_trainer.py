"""What a run leaves behind: adapters that reload exactly, and what its log counts."""

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from training.runs import make_trainer, write_run
from training.toy import save_toy, toy_config, toy_examples
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocktune.adapter import AdapterInfo, load_adapter
from blocktune.attention import attach, make_plan
from blocktune.layout import Layout
from blocktune.links import installed_links
from blocktune.training.launch_checks import refuse_launch

MODES = {
    "lora": {},
    "lora+table": {"num_links": 2},
    "lora+tokens": {"num_links": 2, "link_mode": "added_tokens"},
    "table alone": {"num_links": 2, "freeze_base": True, "use_peft": False},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "packets": {"num_headers": 2, "num_trailers": 1, "freeze_base": True, "use_peft": False},
    "lora+markers": {"num_headers": 1, "num_trailers": 1, "placement": "composite"},
    "markers in the vocabulary": {
        "num_headers": 1,
        "num_trailers": 1,
        "link_mode": "added_tokens",
    },
    "links by chunk": {"num_links": 2, "link_table": "chunk", "max_chunks": 3},
    "shared link": {"num_links": 2, "link_table": "shared", "link_side": "before"},
    "full": {"use_peft": False},
    "full+tokens": {"use_peft": False, "num_links": 2, "link_mode": "added_tokens"},
}
LEARNED = {
    "lora+table": 2,
    "lora+tokens": 2,
    "full+tokens": 2,
    "table alone": 2,
    "packets": 3,
    "lora+markers": 2,
    "markers in the vocabulary": 2,
    "links by chunk": 6,
    "shared link": 1,
}


def logits_of(model, batch):
    layout = Layout.unpack(batch["layout"])
    plan = make_plan("dense", layout)
    with torch.no_grad():
        return model.eval()(
            batch["input_ids"], position_ids=layout.position, plan=plan, use_cache=False
        ).logits


def first_batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def reload(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, info = load_adapter(model, AutoTokenizer.from_pretrained(base), adapter)
    attach(model)
    return model, info


@pytest.mark.parametrize("mode", MODES)
def test_a_trained_adapter_reloads_to_the_same_logits(tmp_path, mode):
    trainer = make_trainer(tmp_path, **MODES[mode])
    batch = first_batch(trainer)
    before = logits_of(trainer.model, batch)
    trainer.train()
    trainer.save_model()
    trained = logits_of(trainer.model, batch)
    assert (trained - before).abs().max() > 1e-3

    out = tmp_path / "out"
    model, info = reload(out if mode.startswith("full") else tmp_path / "base", out)
    assert torch.equal(logits_of(model, batch), trained)
    assert info == AdapterInfo.load(out)
    assert info.num_learned == LEARNED.get(mode, 0)
    assert info.training["world_size"] == 1


@pytest.mark.parametrize("mode", ["lora+table", "lora+tokens", "table alone"])
def test_links_of_untied_embeddings_reload_to_the_same_logits(tmp_path, mode):
    write_run(tmp_path)
    save_toy(tmp_path / "base", config=toy_config(tie_word_embeddings=False))
    trainer = make_trainer(tmp_path, **MODES[mode])
    base = trainer.accelerator.unwrap_model(trainer.model)
    assert not base.config.tie_word_embeddings
    batch = first_batch(trainer)
    trainer.train()
    trainer.save_model()
    model, _ = reload(tmp_path / "base", tmp_path / "out")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model, batch))


@pytest.mark.parametrize("mode", ["lora+table", "table alone"])
def test_link_rows_train_on_tied_embeddings(tmp_path, mode):
    trainer = make_trainer(tmp_path, **MODES[mode])
    base = trainer.accelerator.unwrap_model(trainer.model)
    assert base.config.tie_word_embeddings
    start = installed_links(base).weight.detach().clone()
    vocabulary = base.get_input_embeddings().weight.detach().clone()
    trainer.train()
    moved = (installed_links(base).weight - start).abs()
    assert (moved.amax(1) > 1e-4).all()
    assert torch.equal(base.get_input_embeddings().weight, vocabulary)


def test_added_link_tokens_save_only_their_rows(tmp_path):
    trainer = make_trainer(tmp_path, **MODES["lora+tokens"])
    trainer.train()
    trainer.save_model()
    from safetensors import safe_open

    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert [s for n, s in shapes.items() if "lora_" not in n] == [[2, 32]]


def test_an_adapter_folder_holds_its_run(tmp_path):
    import yaml

    trainer = make_trainer(tmp_path, **MODES["lora+table"])
    trainer.train()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"blocktune.json", "links.safetensors", "resolved_config.yaml"} <= names
    assert ".saving" not in names
    config = yaml.safe_load((tmp_path / "out/resolved_config.yaml").read_text())
    assert config["training"]["num_links"] == 2
    assert config["model"]["lora_r"] == 4
    assert AdapterInfo.load(tmp_path / "out").training["commit"]


def test_num_tokens_counts_rows_that_are_no_padding(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, num_links=1)
    seen = []
    inner = trainer.data_collator

    def counting(records):
        seen.append(sum(record["length"] for record in records))
        return inner(records)

    trainer.data_collator = counting
    trainer.train()
    logged = [e["num_tokens"] for e in trainer.state.log_history if "num_tokens" in e]
    assert logged[:2] == [seen[0], seen[0] + seen[1]]


def test_evaluation_reports_the_loss(tmp_path):
    write_run(tmp_path)
    source = {"eval_data": str(tmp_path / "train.jsonl"), "eval_on_start": True}
    trainer = make_trainer(tmp_path, **source, eval_limit=4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_mean_token_accuracy"] <= 1


def test_evaluation_is_per_token_whatever_the_batches(tmp_path):
    write_run(tmp_path)
    options = {"eval_data": str(tmp_path / "train.jsonl"), "eval_limit": 8, "distill_weight": 0.5}
    options |= {"eval_on_start": True}
    found = []
    for size in (1, 3, 8):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size, **options)
        lengths = trainer.eval_dataset["answer_length"]
        assert len(set(lengths)) > 1  # else a mean of means would do
        metrics = trainer.evaluate()
        parts = {name: metrics[f"eval_{name}"] for name in ("cross_entropy", "divergence")}
        found.append([metrics["eval_loss"], *parts.values()])
        assert metrics["eval_loss"] == pytest.approx(sum(parts.values()) / 2, rel=1e-6)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[1] == pytest.approx(found[2], rel=1e-5)


def test_metrics_get_no_row_that_only_fills_up_a_round(tmp_path, monkeypatch):
    """Two processes take 16 rows at a time; 13 of them have no labels."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    rows = trainer._prepare_evaluation(toy_examples(3))
    assert len(rows) == 16
    loader = DataLoader(rows, batch_size=8, collate_fn=trainer.collator)
    loader = prepare_data_loader(loader, num_processes=2, process_index=0)
    assert [len(batch["labels"]) for batch in loader] == [8]
    assert loader.remainder == 3  # of the last round, `gather_for_metrics` keeps so many


def test_logged_parts_are_per_token_of_the_whole_step(tmp_path):
    logs = []
    for batch, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            distill_weight=0.5,
            max_steps=1,
        )
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    for name in ("loss", "cross_entropy", "divergence", "mean_token_accuracy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


def test_context_parallelism_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)

    class Parallel:
        cp_enabled, sp_enabled = True, False

    trainer.accelerator.state.parallelism_config = Parallel()
    with pytest.raises(ValueError, match="cp_size > 1 drops the layout's mask"):
        refuse_launch(trainer.accelerator, False)


def test_the_command_trains_saves_and_says_what_it_does(tmp_path, capsys):
    from blocktune.training.run import train

    path = write_run(tmp_path, num_links=2)
    folder = train(["--config", str(path)])
    assert folder == Path(tmp_path / "out")
    assert (folder / "blocktune.json").is_file()
    printed = capsys.readouterr().out
    words = ["trainable", "tokens per step", "steps", "num_links 2", "step     4/4"]
    words += ["peak memory", "time", "cross-entropy", "tokens/s", "MFU", "0 s left"]
    for word in words:
        assert word in printed


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    from blocktune.training.run import train

    assert train(["--config", str(write_run(tmp_path)), "--dry_run", "true"]) is None
    assert "training plan" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
