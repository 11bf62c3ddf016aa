"""KVShareArena: a clone of the same shape, answered; what `kva validate` asks of a result file."""

import hashlib
import json

import pytest
import torch
from training.toy import toy_model, toy_tokenizer

from blocktune.engine import Engine
from blocktune.evaluation.arena import SUBSETS, answered, load_exam, run_exam
from blocktune.methods import build

# What the arena's `validate` demands, as its schema file of kva.result.v1 lists it.
SUMMARY = {"method", "track", "subset", "model", "n", "backend", "versions", "git_rev"}
ITEM = {
    *("_id", "pred", "golds", "f1_raw", "recomputed_layer_tokens"),
    *("dense_payload_layer_tokens", "kv_bytes", "ttft_ms"),
}
CARD = {"name", "provenance", "backend", "versions", "cost_notes", "training_data"}
TEMPLATE = "Read this.\n{context}\n\nQuestion: {input}\nAnswer:"


def record(index: int) -> dict:
    chunks = [f"Passage {i + 1}:\nHanna {index + i} lives in Elm." for i in range(3)]
    return {
        "_id": f"q{index}",
        "context": "".join(chunks),
        "input": f"Where does Hanna {index} live?",
        "answers": ["Elm"],
        "chunks": chunks,
        "n_tok_ctx": 40,
    }


@pytest.fixture
def clone(tmp_path):
    """A folder laid out as the arena's repository, with three questions a subset."""
    questions, assets = tmp_path / "data/queryset", tmp_path / "kvsharearena/assets"
    questions.mkdir(parents=True)
    assets.mkdir(parents=True)
    digests = {}
    for subset in SUBSETS:
        name = f"{subset}_n100.jsonl"
        text = "".join(json.dumps(record(index)) + "\n" for index in range(3))
        (questions / name).write_text(text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    (questions / "sha256.json").write_text(json.dumps(digests))
    (assets / "prompts.json").write_text(json.dumps({"P_c": "You answer.", "P_p": "no"}))
    config = {
        "dataset2prompt": dict.fromkeys(SUBSETS, TEMPLATE),
        "dataset2maxlen": dict.fromkeys(SUBSETS, 4),
    }
    (assets / "longbench_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def engine():
    return Engine(toy_model(), toy_tokenizer())


def test_a_prompt_is_the_arenas_own_text_piece_by_piece(clone, engine):
    exam = load_exam(clone, "hotpotqa")
    pieces = exam.pieces(exam.rows[0], engine)
    texts = [engine.tokenizer.decode(ids) for ids in (pieces.prefix, *pieces.chunks, pieces.query)]
    assert texts == [
        "<|bos|><|system|>You answer.<|end|><|user|>Read this.\n",
        *exam.rows[0]["chunks"],
        "\n\nQuestion: Where does Hanna 0 live?\nAnswer:<|end|><|assistant|>",
    ]
    rendered = engine.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "You answer."},
            {
                "role": "user",
                "content": TEMPLATE.format(
                    context=exam.rows[0]["context"], input=exam.rows[0]["input"]
                ),
            },
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "".join(texts) == rendered


def test_the_result_file_is_what_the_arena_validates(clone, engine, monkeypatch):
    exam = load_exam(clone, "qasper")
    monkeypatch.setattr(engine.model.config, "_name_or_path", "/data/of-mine/toy")
    path = run_exam(engine, build("epic", k=2), exam, clone / "out", None, "port")
    assert path.name == "epic_re_qasper.json"
    document = json.loads(path.read_text())
    summary, results, card = (document[key] for key in ("summary", "results", "method_card"))
    assert document["schema"] == "kva.result.v1"
    assert summary.keys() >= SUMMARY
    assert card.keys() >= CARD
    assert (summary["track"], summary["subset"], summary["n"]) == ("re", "qasper", 3)
    assert card["provenance"] == "port"
    assert summary["model"] == "toy"  # the file is published
    assert [row["_id"] for row in results] == ["q0", "q1", "q2"]
    for row in results:
        assert row.keys() >= ITEM
        assert row["golds"] == ["Elm"]
        assert row["ttft_ms"] > 0


def test_costs_are_counted_on_the_payload(clone, engine):
    exam = load_exam(clone, "hotpotqa")
    row = exam.rows[1]
    payload = sum(map(len, exam.pieces(row, engine).chunks))
    layers, config = 2, engine.model.config
    token = 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values, float32

    def cost(method):
        found = answered(engine, build(method), exam, row)
        assert found["dense_payload_layer_tokens"] == payload * layers
        return found["recomputed_layer_tokens"], found["kv_bytes"]

    assert cost("naive") == (0, payload * layers * token)
    assert cost("full-prefill") == (payload * layers, payload * layers * token)
    # All chunks stand after a prefix: two tokens of each, in both layers.
    assert cost("epic k=2") == (3 * 2 * layers, payload * layers * token)
    assert answered(engine, build("no-context"), exam, row)["kv_bytes"] == 0


def test_chunks_are_encoded_before_the_clock_and_forgotten_after(clone, engine, monkeypatch):
    exam, hits = load_exam(clone, "hotpotqa"), []
    start = engine.start

    def watched(pieces, method):
        run = start(pieces, method)
        hits.append(run.assembled.hits)
        return run

    monkeypatch.setattr(engine, "start", watched)
    answered(engine, build("naive"), exam, exam.rows[0])
    assert hits[0] == [3]
    assert len(engine.store.held()) == 0


def test_a_stopped_run_continues_and_other_weights_and_code_are_refused(clone, engine, monkeypatch):
    exam, out = load_exam(clone, "hotpotqa"), clone / "out"
    asked = []
    run_exam(engine, build("naive"), exam, out, 2, "port")
    first = json.loads((out / "naive_re_hotpotqa.json").read_text())["results"]
    original = engine.lay_out
    engine.lay_out = lambda pieces, *rest: asked.append(1) or original(pieces, *rest)
    try:
        run_exam(engine, build("naive"), exam, out, None, "port")
    finally:
        del engine.lay_out
    results = json.loads((out / "naive_re_hotpotqa.json").read_text())["results"]
    assert results[:2] == first
    assert len(results) == 3
    assert len(asked) == 2  # one question: laid out to be encoded, and to be answered
    with torch.no_grad():
        other = Engine(toy_model(seed=1), toy_tokenizer())
    refused = pytest.raises(ValueError, match="is of other weights, method, questions or code")
    with refused:
        run_exam(other, build("naive"), exam, out, None, "port")
    monkeypatch.setattr("blocktune.evaluation.arena.code_digest", lambda method: "other code")
    with refused:
        run_exam(engine, build("naive"), exam, out, None, "port")


def test_what_is_wrong_is_one_line(clone, engine, tmp_path):
    with pytest.raises(ValueError, match=r"no file .*qasper_n100.jsonl'; --questions is a clone"):
        load_exam(tmp_path / "nowhere", "qasper")
    with pytest.raises(ValueError, match="subset must be one of qasper"):
        load_exam(clone, "musique")
    path = clone / "data/queryset/qasper_n100.jsonl"
    path.write_text(path.read_text().replace("Elm", "Oak"))
    with pytest.raises(ValueError, match="is not the frozen file: its SHA-256 is"):
        load_exam(clone, "qasper")
    with pytest.raises(ValueError, match="takes chunks out of earlier prompts"):
        run_exam(
            engine, build("cache-craft"), load_exam(clone, "hotpotqa"), clone / "out", None, "port"
        )
    with pytest.raises(ValueError, match=r"provenance must be one of official, .* got 'mine'"):
        run_exam(engine, build("naive"), load_exam(clone, "hotpotqa"), clone / "out", None, "mine")
