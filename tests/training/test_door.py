"""The training door: rows as users have them, a trainer as TRL's, a layout beside any adapter."""

import json
from unittest.mock import patch
from weakref import WeakSet

import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training.runs import DEFAULTS, losses, write_run
from training.toy import save_toy, toy_examples, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from blocktune import (
    BlockDataCollator,
    BlockSFTConfig,
    BlockSFTTrainer,
    Engine,
    LayoutSpec,
    PromptFormat,
    SaveLayoutCallback,
    attach,
)
from blocktune.data import load_examples
from blocktune.data.sources.records import LeftOut
from blocktune.layout import Kind, Layout
from blocktune.training.collator import _warn_unattached
from blocktune.training.dataset import to_sample
from blocktune.training.run import train

EXAMPLE = toy_examples(1)[0]
TEXTS = [chunk.text for chunk in EXAMPLE.chunks]
ASKED = {"role": "user", "content": EXAMPLE.question}
SAID = {"role": "assistant", "content": EXAMPLE.answers[0]}
ROWS = {
    "question": {"question": EXAMPLE.question, "chunks": TEXTS, "answers": list(EXAMPLE.answers)},
    "with columns of no use": {**EXAMPLE.to_json(), "score": 0.5, "source": None},
    "messages": {"messages": [ASKED, SAID], "documents": TEXTS},
    "documents with titles": {
        "messages": [ASKED, SAID],
        "documents": [{"title": None, "text": text} for text in TEXTS],
    },
    "documents as Cohere has them": {
        "messages": [ASKED, SAID],
        "documents": [{"id": str(i), "data": {"text": text}} for i, text in enumerate(TEXTS)],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": EXAMPLE.question},
            {"from": "gpt", "value": EXAMPLE.answers[0], "weight": 1},
        ],
        "documents": TEXTS,
    },
    "prompt": {
        "prompt": EXAMPLE.question, "completion": EXAMPLE.answers[0], "documents": TEXTS
    },
    "question and documents": {
        "question": EXAMPLE.question, "documents": TEXTS, "answers": list(EXAMPLE.answers)
    },
    "prompt as messages": {"prompt": [ASKED], "completion": [SAID], "documents": TEXTS},
    "HotpotQA": {
        "question": EXAMPLE.question, "answer": EXAMPLE.answers[0],
        "context": {"title": [None] * len(TEXTS), "sentences": [[text] for text in TEXTS]},
    },
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}


def options(**more) -> dict:
    left_out = ("use_peft", "lora_r", "lora_dropout", "lora_target_modules")
    return {k: v for k, v in (DEFAULTS | more).items() if k not in left_out}


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_every_form_are_the_same_batch(form, tmp_path):
    collator = BlockDataCollator(toy_tokenizer(), LayoutSpec())
    batch, expected = collator([ROWS[form]]), collator([EXAMPLE])
    assert batch.keys() == {"input_ids", "labels", "layout", "attention_mask"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    rows = batch["input_ids"].shape
    assert batch["layout"].shape == (*rows, 9)  # segments, never rows x rows
    layout = Layout.unpack(batch["layout"])
    assert layout.group[layout.kind == Kind.CHUNK].unique().tolist() == [0, 1, 2]
    (through,) = Dataset.from_list([ROWS[form]])
    assert torch.equal(collator([through])["input_ids"], expected["input_ids"])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[form]) + "\n")
    assert torch.equal(collator(load_examples(file))["input_ids"], expected["input_ids"])


def test_a_row_that_pandas_read_from_a_table(tmp_path):
    """Lists come as NumPy arrays, at any depth."""
    path = tmp_path / "rows.parquet"
    pandas.DataFrame([ROWS["HotpotQA"]]).to_parquet(path)
    (row,) = pandas.read_parquet(path).to_dict("records")
    sample = to_sample(row, toy_tokenizer(), PromptFormat())
    assert sample == to_sample(ROWS["HotpotQA"], toy_tokenizer(), PromptFormat())


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_reply_that_is_not_to_be_learned_is_left_out(mark):
    """As OpenAI and Axolotl mark it; the marks of questions mean nothing."""
    turns = [{**ASKED, "train": False}, SAID, ASKED, {**SAID, **mark}]
    assert to_sample({"messages": turns[:2], "documents": TEXTS}, toy_tokenizer(), PromptFormat())
    for more in ({"documents": TEXTS}, {}):
        with pytest.raises(LeftOut, match="not to be learned"):
            to_sample({"messages": turns, **more}, toy_tokenizer(), PromptFormat())


def test_a_system_turn_and_later_turns_are_kept(tmp_path):
    later = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, ASKED, SAID, *later], "documents": TEXTS}
    sample = to_sample(row, toy_tokenizer(), PromptFormat())
    assert sample.wording.system == "Be brief."
    assert sample.example.followups == (("Why?", "So."),)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert to_sample(load_examples(file)[0], toy_tokenizer(), PromptFormat()) == sample
    batch = BlockDataCollator(toy_tokenizer())([row])
    text = toy_tokenizer().decode(batch["input_ids"][0])
    assert text.index("Be brief.") < text.index(TEXTS[0]) < text.index("Why?")
    learnt = batch["labels"][batch["labels"] != -100]
    assert toy_tokenizer().decode(learnt) == f"{EXAMPLE.answers[0]}<|end|>So.<|end|>"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"title": "x"}, "^no known shape; the columns are title, wanted are question, chunks"),
        ({"messages": [ASKED], "documents": TEXTS}, "no answer to train on"),
        ({"messages": [SAID, ASKED], "documents": TEXTS}, '"messages" must be .*assistant'),
        ({"prompt": "Who?", "documents": TEXTS}, "no answer to train on"),
        (
            {"prompt": "a", "completion": "b", "documents": [{"title": "x"}]},
            r'"documents\[0\]" must',
        ),
        ({"question": "Who?", "chunks": ["a"]}, "no answer"),
        ({}, "remove_unused_columns: false"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row, words):
    with pytest.raises(ValueError, match=words):
        BlockDataCollator(toy_tokenizer())([row])


def test_a_row_that_is_too_long_is_refused():
    length = BlockDataCollator(toy_tokenizer())([EXAMPLE])["input_ids"].shape[1]
    BlockDataCollator(toy_tokenizer(), max_length=length)([EXAMPLE])
    with pytest.raises(ValueError, match=f"{length} tokens, max_length is {length - 1}"):
        BlockDataCollator(toy_tokenizer(), max_length=length - 1)([EXAMPLE])


def test_a_row_that_cannot_be_tokenised_is_named_by_its_question():
    """A collator gets single rows, so it knows no index."""
    with pytest.raises(ValueError, match=r"^a row \('Where does .*'\): token '.*' has id"):
        BlockDataCollator(toy_tokenizer(), num_tokens=10)([EXAMPLE])


def test_rows_are_tokenised_once(monkeypatch):
    collator = BlockDataCollator(toy_tokenizer(), LayoutSpec())
    expected = collator([ROWS["messages"]])
    monkeypatch.setattr("blocktune.training.collator.to_sample", None)
    assert torch.equal(collator([dict(ROWS["messages"])])["input_ids"], expected["input_ids"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("door") / "base")


def test_a_model_by_name_trains_as_the_command(base, tmp_path):
    write_run(tmp_path / "a", model_name_or_path=base, seed=3)
    train(["--config", str(tmp_path / "a/run.yaml")])
    state = json.loads((tmp_path / "a/out/trainer_state.json").read_text())
    expected = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    rows = Dataset.from_json(str(tmp_path / "a/train.jsonl"))
    args = BlockSFTConfig(str(tmp_path / "b"), **options(seed=3))
    trainer = BlockSFTTrainer(base, args, train_dataset=rows, peft_config=LoraConfig(**LORA))
    trainer.train()
    assert losses(trainer) == expected
    trainer.save_model()
    asked = toy_examples(2)
    engines = [
        Engine.from_pretrained(str(tmp_path / path), device="cpu") for path in ("a/out", "b")
    ]
    one, other = (engine.next_logits(asked, "block-attention") for engine in engines)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_trainer_takes_what_trl_users_pass(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    seen, learnt = {}, []

    def compute_metrics(prediction):
        logits, labels = prediction
        seen.update(logits=logits.shape, labels=labels.shape)
        hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
        return {"accuracy": hits.mean()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: learnt.append(1))
    trainer = BlockSFTTrainer(
        model=model,
        args=BlockSFTConfig(
            str(tmp_path), **options(block_share=0.5), eval_strategy="steps", eval_steps=2
        ),
        data_collator=BlockDataCollator(toy_tokenizer(), format=PromptFormat(system="Be brief.")),
        train_dataset=toy_examples(16),
        eval_dataset={"few": toy_examples(3), "more": Dataset.from_list([ROWS["prompt"]] * 2)},
        processing_class=toy_tokenizer(),
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert len(learnt) == 4
    assert "Be brief." in toy_tokenizer().decode(trainer.prepared.dataset[0]["parts"][0]["prefix"])
    assert trainer.prepared.num_block == 8
    for name in ("few", "more"):
        entry = next(e for e in trainer.state.log_history if f"eval_{name}_accuracy" in e)
        assert entry[f"eval_{name}_accuracy"] == pytest.approx(entry["eval_mean_token_accuracy"])
    assert seen["logits"] == (*seen["labels"], len(toy_tokenizer()))
    fresh = trainer.evaluate([ROWS["question"]])
    assert fresh["eval_loss"] > 0
    predicted = trainer.predict(Dataset.from_list([ROWS["question"]]))
    assert predicted.metrics["test_loss"] == pytest.approx(fresh["eval_loss"])
    assert predicted.predictions.shape[-1] == len(toy_tokenizer())


def started(init=True, **more) -> LoraConfig:
    return LoraConfig(**LORA | more, init_lora_weights=init)


def distilled() -> BlockSFTConfig:
    return BlockSFTConfig("out", **options(distill_weight=0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": TrainingArguments}, "args must be a BlockSFTConfig, got TrainingArguments"),
        ({"data_collator": list}, "data_collator must be a BlockDataCollator, got list"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": list}, "no example to train on"),
        (
            {"train_dataset": lambda: [EXAMPLE, {"question": "Who?", "chunks": [1]}]},
            r'^row 1 of the dataset: field "chunks\[0\]" must be',
        ),
        ({"train_dataset": dict}, r"rows, got dict; pass one split \(dataset\['train'\]\)"),
        (
            {"data_collator": lambda: BlockDataCollator(toy_tokenizer(), LayoutSpec(num_links=1))},
            "num_links=1.*set it in the configuration",
        ),
        ({"data_collator": lambda: BlockDataCollator(toy_tokenizer(), seed=5)}, "has seed 5"),
        (
            {"data_collator": lambda: BlockDataCollator(toy_tokenizer(), max_length=10)},
            "max_length 10, but the configuration has None",
        ),
        ({"args": lambda: BlockSFTConfig("out", use_cpu=True, push_to_hub=True)}, "blocktune push"),
        ({"peft_config": lambda: started("pissa_niter_4")}, "changes the base at random"),
        ({"peft_config": lambda: started("pissa"), "args": distilled}, "is not the base after"),
        ({"peft_config": lambda: started(bias="all"), "args": distilled}, "with a trained bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_trainer_is_refused(tmp_path, change, words):
    values = {"model": toy_model(), "args": BlockSFTConfig(str(tmp_path), **options())}
    values |= {"train_dataset": toy_examples(2), "processing_class": toy_tokenizer()}
    for name, made in change.items():
        values[name] = made(str(tmp_path)) if made is TrainingArguments else made and made()
    with pytest.raises(ValueError, match=words):
        BlockSFTTrainer(**values)


@pytest.mark.parametrize("full", [False, True])
def test_any_trainers_adapter_is_served(base, tmp_path, full):
    """Here transformers' own Trainer, which knows neither TRL nor PEFT's saving."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if full else get_peft_model(model, LoraConfig(**LORA))
    collator = BlockDataCollator(toy_tokenizer(), LayoutSpec(placement="parallel"))
    own = ("disable_tqdm", "max_steps", "learning_rate", "report_to", "use_cpu")
    args = TrainingArguments(
        str(tmp_path / "out"),
        remove_unused_columns=False,
        save_steps=2,
        **{k: DEFAULTS[k] for k in own},
    )
    trainer = Trainer(
        model, args, collator, toy_examples(16), callbacks=[SaveLayoutCallback(collator)]
    )
    with pytest.raises(ValueError, match=r"call blocktune.attach\(model\) first"):
        trainer.train()
    attach(model)
    trainer.train()
    trainer.save_model(tmp_path / "elsewhere")
    trained = model.eval()(**collator([EXAMPLE])).logits
    before = int((collator([EXAMPLE])["labels"][0] != -100).nonzero()[0]) - 1
    for folder in ("out/checkpoint-4", "elsewhere"):
        engine = Engine.from_pretrained(str(tmp_path / folder), device="cpu")
        assert engine.adapter.layout.placement == "parallel"
        served = engine.next_logits([EXAMPLE], "block-attention")
        torch.testing.assert_close(served[0], trained[0, before], rtol=1e-5, atol=2e-5)
    changed = BlockDataCollator(toy_tokenizer())
    callbacks = [SaveLayoutCallback(changed)]
    other = Trainer(model, args, changed, toy_examples(16), callbacks=callbacks)
    moved = (tmp_path / "out/checkpoint-4").rename(tmp_path / "moved")  # out of output_dir
    words = "step 4 was trained with layout .*'parallel'.* now it is .*'sequential'"
    with pytest.raises(ValueError, match=words):
        other.train(resume_from_checkpoint=str(moved))


def test_an_adapter_is_trained_on_the_base_that_it_names(base, tmp_path):
    """PiSSA changes the base, as it does on loading; a merge in memory is lost."""
    asked = toy_examples(2)

    def trainer(model):
        attach(model)
        collator = BlockDataCollator(toy_tokenizer())
        args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **options())
        return Trainer(model, args, collator, asked, callbacks=[SaveLayoutCallback(collator)])

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, started("pissa"))
    trainer(model).save_model(tmp_path / "pissa")
    engine = Engine.from_pretrained(str(tmp_path / "pissa"), device="cpu")
    batch = BlockDataCollator(toy_tokenizer())([EXAMPLE])
    before = int((batch["labels"][0] != -100).nonzero()[0]) - 1
    served = engine.next_logits([EXAMPLE], "block-attention")[0]
    torch.testing.assert_close(served, model.eval()(**batch).logits[0, before], rtol=0, atol=1e-5)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_output_embeddings().weight.data += 0.1
    given = {"train_dataset": asked, "processing_class": toy_tokenizer()}
    args = BlockSFTConfig(str(tmp_path), **options())
    with pytest.raises(ValueError, match=r"other weights than .*base"):
        BlockSFTTrainer(model, args, peft_config=LoraConfig(**LORA), **given)
    added = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    added.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"after model\.add_adapter"):
        trainer(added)
    with pytest.raises(ValueError, match=r"other weights than .*base"):
        trainer(get_peft_model(model, LoraConfig(**LORA)))


def test_predictions_come_in_the_order_of_the_rows(tmp_path):
    args = BlockSFTConfig(str(tmp_path), **options(train_sampling_strategy="group_by_length"))
    model, rows, asked = toy_model(), toy_examples(4), toy_examples(9)
    trainer = BlockSFTTrainer(model, args, train_dataset=rows, processing_class=toy_tokenizer())
    labels = trainer.predict(asked).label_ids
    said = [toy_tokenizer().decode(row[row >= 0], skip_special_tokens=True) for row in labels]
    assert said == [example.answers[0] for example in asked]


def test_rows_that_a_source_leaves_out_are_left_out(tmp_path, caplog):
    """As `load_examples` does; a single such row must not stop a run in a later step."""
    useless = {"messages": [{"role": "user", "content": "Hi"}, SAID]}
    unanswerable = {"question": "Who?", "chunks": TEXTS, "answers": []}
    said = {"question": "Who?", "chunks": TEXTS, "answers": [], "response": "Nobody knows"}
    values = {"args": BlockSFTConfig(str(tmp_path), **options(max_steps=1))}
    values |= {"model": toy_model(), "processing_class": toy_tokenizer()}
    rows = [*toy_examples(2), useless, unanswerable, unanswerable, said]
    trainer = BlockSFTTrainer(train_dataset=rows, **values)
    assert trainer.prepared.num_examples == 3
    assert "1 rows are left out" in caplog.text
    assert "2 rows are left out: no answer" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be learned .*give it 'documents'"):
        BlockDataCollator(toy_tokenizer())([useless])


def test_a_model_that_ignores_layouts_is_told_about(caplog):
    """Without `attach` transformers drops the layout, and trains full attention."""
    collator = BlockDataCollator(toy_tokenizer())
    with patch("blocktune.training.collator.ATTACHED", WeakSet()) as attached:
        _warn_unattached.cache_clear()
        collator(toy_examples(1))
        assert "blocktune.attach(model)" in caplog.text
        caplog.clear()
        _warn_unattached.cache_clear()
        model = toy_model()
        attached.add(model)
        collator(toy_examples(1))
        assert not caplog.text


def test_one_answer_is_an_answer():
    fmt = PromptFormat()
    row = {"question": "Who?", "chunks": ["Anna."], "answer": "Anna"}
    assert to_sample(row, toy_tokenizer(), fmt).example.answers == ("Anna",)
