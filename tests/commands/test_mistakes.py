"""What a user can get wrong: one clear line, exit code 2, nothing half-written."""

import json
import locale
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from blocktune import cli
from blocktune.adapter import AdapterInfo
from blocktune.commands.application import explain
from blocktune.data import RagExample, write_jsonl
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.prompt import Chunk, LayoutSpec, PromptFormat

ROOT = Path(__file__).resolve().parents[2]
QUESTION = ("--question", "Where was Anna born?")
CHUNK = ("--chunk", "Anna was born in Kirby.")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    chunks = (Chunk("Anna was born in Kirby."), Chunk("Kirby is small."))
    write_jsonl(path, [RagExample(f"Where? {i}", chunks, ("Kirby",)) for i in range(9)])
    return path


@pytest.fixture
def suite(model, questions, tmp_path):
    def write(**changes):
        tasks = [{"name": "mine", "source": str(questions)}]
        record = {"model": model, "methods": ["naive"], "tasks": tasks} | changes
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(record))
        return ("eval", "--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out")

    return write


def test_an_empty_chunk_list(refused, model, tmp_path):
    assert "at least one chunk" in refused("answer", "--model", model, *QUESTION)
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Where?", "chunks": []}) + "\n")
    line = refused("answer", "--model", model, "--input", path)
    assert 'q.jsonl, line 1: field "chunks" must be a non-empty list' in line


def test_a_model_that_is_nowhere(refused):
    for name in ("data/tinny", "/tmp/nothing/there"):
        line = refused("answer", "--model", name, *QUESTION, *CHUNK)
        assert f"from '{name}': there is no such folder" in line


def test_a_parameter_of_no_method(refused, model):
    line = refused("answer", "--model", model, *QUESTION, *CHUNK, "--param", "k=2")
    assert "--param sets a parameter of a method" in line


def test_an_empty_key_is_no_key(refused, model, monkeypatch):
    monkeypatch.setenv("BLOCKTUNE_API_KEY", "")
    assert "set but empty" in refused("serve", "-m", model, "--port", 0)


def test_two_adapters_of_one_name(refused, model):
    names = ["--adapter", "a/out", "--adapter", "b/out"]
    assert "NAME=ADAPTER" in refused("vllm", "serve", model, "--store", "x", *names)


def test_encoding_for_a_method_that_reads_no_chunks(refused, model, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "A."}\n')
    words = ["-i", tmp_path / "d.jsonl", "--store", tmp_path / "s", "-m", model]
    for method in ("full-prefill", "fusionrag"):
        assert f"'{method}' reuses no chunks" in refused("encode", *words, "--method", method)
    assert not (tmp_path / "s").exists()


def test_a_port_that_is_taken(refused, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("serve", "--model", model, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another" in line


def test_a_host_that_no_one_knows(refused, model, monkeypatch):
    reason = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "create_server", Mock(side_effect=reason))
    line = refused("serve", "--model", model, "--port", 9000)
    assert "cannot listen on 127.0.0.1:9000: Name or service not known; choose another" in line


def test_a_chunk_longer_than_the_context(refused, model, tmp_path):
    text = "Anna was born in Kirby. " * 200
    line = refused("answer", "--model", model, *QUESTION, "--chunk", text)
    assert "maximum context length is 512" in line
    path, store = tmp_path / "docs.jsonl", tmp_path / "store"
    lines = [{"text": "Kirby is small."}, {"text": text}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = refused("encode", "--model", model, "--input", path, "--store", store)
    assert "maximum context length is 512" in line
    assert not list(tmp_path.glob("store/**/*.safetensors"))


@pytest.mark.parametrize("command", ["answer", "encode", "eval"])
def test_a_wrong_field_on_line_7(refused, model, questions, suite, tmp_path, command):
    lines = questions.read_text().splitlines()
    lines[6] = json.dumps({"question": "Where?", "chunks": ["Kirby.", 7]})
    questions.write_text("\n".join(lines) + "\n")
    output = tmp_path / "out"
    arguments = {
        "answer": ("answer", "--model", model, "-i", questions, "-o", output),
        "encode": ("encode", "--model", model, "-i", questions, "--store", output),
        "eval": suite(),
    }
    line = refused(*arguments[command])
    assert "questions.jsonl, line 7" in line
    assert "chunks[1]" in line
    assert not output.exists()


def test_an_adapter_made_for_another_base(refused, model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    base.model.embed_tokens.weight.data += 1
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    AdapterInfo(
        base_model="somebody/else",
        base_fingerprint=base_fingerprint(base),
        tokenizer_hash=tokenizer_hash(tokenizer),
        layout=LayoutSpec(),
        format=PromptFormat(),
    ).save(folder)
    (folder / "adapter_config.json").write_text("{}")
    save_file({}, folder / "adapter_model.safetensors")
    line = refused("answer", "--model", model, "--adapter", folder, *QUESTION, *CHUNK)
    assert "was made for base 'somebody/else'" in line
    assert "is not a blocktune adapter" in refused(
        "answer", "--model", model, "--adapter", tmp_path, *QUESTION, *CHUNK
    )


def test_an_unknown_method_or_parameter(refused, model, suite, tmp_path):
    ask = ("answer", "--model", model, *QUESTION, *CHUNK)
    said = refused(*ask, "--method", "magic")
    assert "unknown reuse method 'magic'; available: " in said
    assert "--plugin" in said
    assert "got unknown kk" in refused(*ask, "--method", "epic", "--param", "kk=3")
    for text in ("k", "=3", "k="):
        assert "must be name=value" in refused(*ask, "--method", "epic", "--param", text)
    twice = refused(*ask, "--method", "epic", "--param", "k=3", "--param", "k = 4")
    assert "--param 'k' is given 2 times" in twice
    assert "'epic': 'k' is given 2 times" in refused(*ask, "--method", "naive + epic k=3 k=4")
    for number in ("nan", "inf"):
        assert f"got {number}" in refused(*ask, "--temperature", number)
    serve = ("serve", "--model", model, "--port", 0, "--store-gb", "inf")
    assert "'--store-gb': Input should be less than" in refused(*serve)
    assert "unknown reuse method 'magic'" in refused(*suite(methods=["naive", "magic"]))
    assert "adapter trained with link tokens" in refused(*suite(methods=["naive", "kvlink"]))
    assert not (tmp_path / "out").exists()


def test_an_unknown_yaml_key(refused, suite, tmp_path):
    line = refused(*suite(metods=["naive"]))
    assert "suite.yaml: unknown key 'metods'; known: model, methods, tasks" in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_served_this_way(refused, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for command in (("answer", *QUESTION, *CHUNK), ("check",)):
        assert "RoPE" in refused(command[0], "--model", tmp_path / "gpt2", *command[1:])


def test_a_model_that_is_not_there(refused, tmp_path):
    line = refused("answer", "--model", tmp_path / "none", *QUESTION, *CHUNK)
    assert "cannot load a language model from" in line


def test_questions_given_twice_or_not_at_all(refused, model, questions):
    assert "either --input FILE or --question" in refused("answer", "--model", model)
    both = refused("answer", "--model", model, *QUESTION, *CHUNK, "--input", questions)
    assert "either --input FILE or --question" in both
    assert "no file 'none.jsonl'" in refused("answer", "--model", model, "--input", "none.jsonl")


def test_a_wording_that_is_none(refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr("blocktune.engine.Engine.from_pretrained", None)  # it is found before
    ask, path = ("answer", "--model", model, *QUESTION, *CHUNK, "--format"), tmp_path / "f.yaml"
    assert "no prompt format at" in refused(*ask, path)
    for text, word in (
        ("a: b: c", "not YAML"),
        ("- a", "mapping"),
        ("instructon: x", "instructon"),
    ):
        path.write_text(text)
        assert word in refused(*ask, path)
    (tmp_path / "d.jsonl").write_text('{"text": "Kirby is small."}\n')
    encode = ("encode", "-m", model, "-i", tmp_path / "d.jsonl", "--store", tmp_path / "store")
    assert "instructon" in refused(*encode, "--format", path)
    assert not (tmp_path / "store").exists()


def test_a_file_named_as_a_text(refused, model):
    line = refused("answer", "-m", model, *QUESTION, *CHUNK, "-c", "@notes.txt")
    assert "--chunk must be a text, got '@notes.txt'; for the contents of a file write" in line
    assert "--question must be a text" in refused("answer", "-m", model, "-q", "@q.txt", *CHUNK)


def test_the_only_line_of_a_file_is_not_taken_for_a_torn_answer(refused, model, tmp_path):
    record = [{"question": "Who?", "chunks": ["Anna."]}]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(record))
    assert "is not a log of this command" in refused("answer", "-m", model, "-i", path, "-o", path)
    assert json.loads(path.read_text()) == record


def test_an_output_of_something_else(refused, model, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("mine\n")
    line = refused("answer", "--model", model, "-i", questions, "-o", output)
    assert "answers.jsonl', line 1: not an answer" in line
    assert output.read_text() == "mine\n"


def test_a_failed_generation_leaves_the_old_file(refused, tmp_path):
    path = tmp_path / "worlds.jsonl"
    path.write_text("old")
    assert "got 'magic'" in refused("data", "write", "worlds:dev?kinds=magic", "-o", path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["worlds.jsonl"]


def test_an_unknown_or_abbreviated_option(refused):
    line = refused("answer", "--modle", "m")
    assert "--modle" in line
    assert "answer --help" in line
    line = refused("train", "--train_data", "worlds:train", "--learning-rat", "1")
    assert "did you mean 'learning_rate'" in line
    assert "Did you mean 'answer'" in refused("anser")
    assert "--verbos" in refused("--verbos")
    assert "--limit" in refused("answer", "--limit", "many")


def test_a_training_config_with_an_unknown_key(refused, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train_data: worlds:train\nlearning_rat: 1e-3\n")
    assert "learning_rat" in refused("train", "--config", path)
    assert "none.yaml" in refused("train", "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(("debug", "shown"), [({}, False), ({"BLOCKTUNE_DEBUG": "1"}, True)])
def test_a_process_ends_with_2_and_a_traceback_only_when_asked(tmp_path, debug, shown):
    done = subprocess.run(
        [sys.executable, "-m", "blocktune.cli", "eval"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT)} | debug,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "needs --suite" in done.stderr
    assert ("Traceback" in done.stderr) is shown
    assert done.returncode == (1 if shown else 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "no device 'gpu' here (Expected one of cpu, cuda"),
        ("cuda:99", "no device 'cuda:99' here ("),
        ("xpu", "no device 'xpu' here ("),
    ],
)
def test_a_device_that_is_not_there(refused, model, device, message):
    assert message in refused("answer", "--model", model, *QUESTION, *CHUNK, "--device", device)


@pytest.mark.parametrize(
    "command", [("vllm", "serve", "M", "--store", "s"), ("bench", "vllm", "--tiny")]
)
def test_a_command_that_needs_vllm(refused, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "vLLM is not installed here" in refused(*command)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--families", "--model", "m"), "--model"),
        (("--families", "--method", "naive"), "--method"),
        (("--method", "naive", "--device", "cuda:7"), "--device"),
        (("--method", "naive", "--dtype", "bfloat16"), "--dtype"),
    ],
)
def test_an_option_that_a_check_of_tiny_models_would_not_use(refused, words, name):
    assert f"{name} has no effect on the tiny models" in refused("check", *words)


def test_a_trace_that_is_nowhere(refused, tmp_path):
    assert "gone.jsonl': No such file or directory" in refused("replay", tmp_path / "gone.jsonl")


def test_a_full_device_is_one_line_and_other_errors_of_torch_are_not(monkeypatch, blocktune):
    import torch

    from blocktune.commands import answering

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def bug(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(answering, "read_examples", full)
    done = blocktune("answer", *QUESTION, *CHUNK)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: CUDA out of memory; use smaller batches")
    monkeypatch.setattr(answering, "read_examples", bug)
    assert isinstance(blocktune("answer", *QUESTION, *CHUNK).exception, RuntimeError)


def test_passages_under_another_name(refused, model, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"question": "Where?", "bits": ["Here."], "answer": "Here"}))
    assert "chunks:bits" in refused("answer", "--model", model, "--input", path)


def test_a_recipe_without_config(refused):
    line = refused("train", "recipes/kvlink.yaml")
    assert "did you mean '--config recipes/kvlink.yaml'?" in line


def test_a_pipe_is_no_source(refused, model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refused("answer", "-m", model, "-i", tmp_path / "pipe")


def test_a_terminal_without_size_or_utf8(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")  # as of a container before it knows its terminal
    monkeypatch.setattr(sys, "argv", ["blocktune", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "answer" in capsys.readouterr().out
    monkeypatch.setattr(locale, "getencoding", lambda: "ANSI_X3.4-1968")
    assert "PYTHONUTF8=1" in explain(UnicodeEncodeError("ascii", "ü", 0, 1, "no"))
    assert "PYTHONUTF8" not in explain(ValueError("no"))
    assert "vLLM is not installed here" in explain(ModuleNotFoundError("no", name="vllm.config"))


def test_errors_of_libraries_that_a_user_can_mend():
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "make space on the disk" in explain(torchs)
    assert explain(ImportError("You need to install `galore`")) == "You need to install `galore`"
    full = SafetensorError("Error while serializing: I/O error: No space left on device")
    assert "make space on the disk" in explain(full)


def test_a_reader_that_stops_early_is_no_error():
    command = [sys.executable, "-m", "blocktune.cli", "check", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert not process.stderr.read()


STOPPED = """
import os, signal, sys
from blocktune.cli import main

# Whoever started the tests may have the signal ignored or blocked.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

class Stop:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Stop())
sys.argv[1:] = ["answer", "-m", "none", "-q", "Who?", "-c", "Anna."]
main()
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("typer", ""),
        ("blocktune.commands.store", ""),
        ("blocktune.commands.answering", "stopped\n"),
        ("torch", "stopped\n"),
    ],
)
def test_ctrl_c_while_packages_are_imported(module, said):
    program = [sys.executable, "-c", STOPPED.format(module=module)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)
