"""What the client refuses before vLLM is asked; vLLM is not needed."""

import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoTokenizer, Ministral3Config
from vllm_cases import make_adapter

from blocktune.commands.serve import serve_vllm
from blocktune.engine import Engine
from blocktune.models.load import read_config, read_tokenizer
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.vllm import ChunkClient, client, launch
from blocktune.vllm.client import lora_rank, open_clients

TINY = "data/tiny"


def test_a_model_that_is_exact_up_to_a_length_is_refused(tmp_path):
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    config = Ministral3Config(hidden_size=64, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="more with positions than a rotation") as error:
        ChunkClient(str(tmp_path), store=tmp_path / "store")
    assert "\n" not in str(error.value)


def test_a_fingerprint_is_chosen_by_its_first_digits(tmp_path):
    """Two dtypes of one model are in the store: neither is taken by chance."""
    for dtype in ("float32", "bfloat16"):
        Engine.from_pretrained(TINY, store=tmp_path, dtype=dtype, device="cpu").encode(["A chunk."])
    base, _ = open_clients(TINY, {}, tmp_path)
    with pytest.raises(ValueError, match="chunks of several models"):
        _ = base.fingerprint
    for manifest in base.store.manifests():
        whole = manifest["fingerprint"]
        for given in (whole, whole[:12]):
            assert open_clients(TINY, {}, tmp_path, given)[0].fingerprint == whole
            assert ChunkClient(TINY, store=tmp_path, fingerprint=given).fingerprint == whole
    with pytest.raises(ValueError, match="no chunks of fingerprint '123456'"):
        open_clients(TINY, {}, tmp_path, "123456")


@pytest.mark.parametrize("store", ["memory=1GB", "chunks/,press=snapkv:0.5"])
def test_a_store_that_vllm_cannot_read_is_refused(store):
    with pytest.raises(ValueError, match=f"whole chunks from a folder or a URL, got '{store}'"):
        ChunkClient(TINY, store=store)


@pytest.mark.parametrize(
    "option",
    [
        *("--kv-offloading-size", "--kv_transfer_config={}", "--model", "--tokenizer=x"),
        *("--revision", "--chat-template", "--default_chat_template_kwargs={}", "--kv-tr"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_options_that_replace_the_connector_the_model_or_its_wording_are_refused(
    tmp_path, option, in_file
):
    args, named = [option, "1"], option.replace("_", "-").partition("=")[0]
    if in_file:
        (file := tmp_path / "vllm.yaml").write_text(f"port: 1\n{option[2:].partition('=')[0]}: x\n")
        args = ["--port", "2", "--config", str(file)]
    with pytest.raises(ValueError, match=f"leave out {named}: "):
        serve_vllm(SimpleNamespace(args=args), TINY, str(tmp_path))


def test_other_options_are_vllms(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "serve", Mock())
    (file := tmp_path / "vllm.yaml").write_text("tokenizer_mode: auto\n")
    args = ["--config", str(file), "--chat-template-content-format", "string", "--ssl-keyfile", ""]
    serve_vllm(SimpleNamespace(args=args), TINY, "store")
    assert launch.serve.call_args.args[3] == args


@pytest.mark.parametrize("adapters", [["a=x", "a=y"], [f"{TINY}=x"]])
def test_names_of_models_are_given_once(tmp_path, adapters):
    with pytest.raises(ValueError, match="is given 2 times; name it: NAME=ADAPTER"):
        serve_vllm(SimpleNamespace(args=[]), TINY, str(tmp_path), adapters)


def test_a_folder_with_an_equals_sign_is_no_name_of_an_adapter(tmp_path, monkeypatch):
    (folder := tmp_path / "lr=0.1").mkdir()
    monkeypatch.setattr(launch, "serve", Mock())
    serve_vllm(SimpleNamespace(args=[]), TINY, "store", [str(folder), f"b={folder}"])
    assert launch.serve.call_args.args[1] == {"lr=0.1": str(folder), "b": str(folder)}


def test_a_store_out_of_reach_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the store 'redis://127\.0\.0\.1:1/0': "):
        _ = ChunkClient(TINY, store="redis://127.0.0.1:1/0").fingerprint


def test_a_revision_is_passed_on_as_one(tmp_path, monkeypatch):
    """vLLM takes it as an option of its own; the chunks are named without it."""
    monkeypatch.setattr(client, "read_config", lambda *_: read_config(TINY))
    monkeypatch.setattr(client, "read_tokenizer", lambda *_: read_tokenizer(TINY))
    made = ChunkClient("some/model@main", store=tmp_path)
    assert (made.source, made.name) == (("some/model", "main"), "some/model")
    with pytest.raises(ValueError, match="encode --model some/model@main --store"):
        _ = made.fingerprint
    assert ChunkClient(TINY, store=tmp_path).source == (TINY, None)


def test_chunks_of_another_model_of_the_same_name_are_not_used(tmp_path, monkeypatch):
    other, store = tmp_path / "other" / "tiny", tmp_path / "store"
    shutil.copytree(TINY, other)
    Engine.from_pretrained(str(other), store=store, device="cpu").encode(["A chunk."])
    assert ChunkClient(str(other), store=store).fingerprint
    with pytest.raises(ValueError, match="has no chunks of 'data/tiny'"):
        _ = ChunkClient(TINY, store=store).fingerprint
    shutil.rmtree(other)  # encoded on another machine: only the name can be compared
    assert ChunkClient(TINY, store=store).fingerprint
    config = read_config(TINY)
    config._commit_hash = "1" * 40
    monkeypatch.setattr(client, "read_config", lambda *_: config)
    monkeypatch.setattr(client, "read_tokenizer", lambda *_: read_tokenizer(TINY))
    assert ChunkClient("org/tiny", store=store).fingerprint
    with pytest.raises(ValueError, match="has no chunks of 'org/tiny'"):
        _ = ChunkClient("org/tiny@main", store=store).fingerprint


def test_chunks_of_earlier_weights_in_the_same_folder_are_not_used(tmp_path):
    folder, store = str(tmp_path / "model"), tmp_path / "store"
    shutil.copytree(TINY, folder)
    engine = Engine.from_pretrained(folder, store=store, device="cpu")
    engine.encode(["A chunk."])
    assert ChunkClient(folder, store=store).fingerprint == engine.fingerprint
    model = engine.model
    torch.nn.init.normal_(model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    model.save_pretrained(folder)  # trained again
    with pytest.raises(ValueError, match=r"no chunks of '.*/model' with its present weights"):
        _ = ChunkClient(folder, store=store).fingerprint
    retrained = Engine.from_pretrained(folder, store=store, device="cpu")
    retrained.encode(["A chunk."])
    assert ChunkClient(folder, store=store).fingerprint == retrained.fingerprint


def test_chunks_of_another_instruction_are_found(tmp_path):
    """`encode --instruction` is `Engine.reworded`; an engine's own wording comes first."""
    words = PromptFormat(instruction="Be brief.")
    engine = Engine.from_pretrained(TINY, store=tmp_path, device="cpu")
    engine.reworded(words).encode(["A chunk."])
    found = ChunkClient(TINY, store=tmp_path, format=words)
    assert found.fingerprint == engine.fingerprint
    assert not found.missing(found.read({"question": "Who?", "chunks": ["A chunk."]}).plan)
    own = Engine(engine.model, engine.tokenizer, format=words, store=engine.store)
    assert ChunkClient(TINY, store=tmp_path, format=words).fingerprint == own.fingerprint
    assert ChunkClient(TINY, store=tmp_path).fingerprint == engine.fingerprint


def test_an_adapter_without_chunks_is_named_in_the_command(tmp_path):
    adapter = make_adapter(tmp_path / "a", LayoutSpec(num_headers=1), False)
    with pytest.raises(ValueError, match=f"encode --model {TINY} --adapter {adapter} --store"):
        _ = ChunkClient(TINY, adapter, store=tmp_path / "store").fingerprint


def test_links_are_refused_as_vllms_limit_and_not_for_want_of_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"vLLM cannot serve 'kvlink'.*blocktune serve"):
        ChunkClient(TINY, store=tmp_path).built("kvlink")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "cannot load a language model from"),
        ("tokenizer.json", "cannot load a tokenizer from"),
        ("generation_config.json", "generation_config.json: not JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, reason):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / file).write_text("{")
    with pytest.raises(ValueError, match=reason) as error:
        ChunkClient(str(tmp_path / "model"), store=tmp_path / "store")
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_exist_is_an_error_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such folder, and no repository of that name"):
        ChunkClient("no/such-model", store=tmp_path)


def test_a_rank_that_vllm_does_not_load_is_refused(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text('{"r": 24, "rank_pattern": {"q_proj": 33}}')
    assert lora_rank(tmp_path) == 64
    config.write_text('{"r": 1024}')
    with pytest.raises(ValueError, match="rank 1024, and vLLM loads at most 512"):
        lora_rank(tmp_path)
