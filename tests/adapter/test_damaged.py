"""Files of a model or an adapter that are cut off: one line that names the file."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from training.runs import write_run
from transformers import AutoModelForCausalLM

from blocktune import Engine
from blocktune.models.load import load_base
from blocktune.training.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    train(["--config", str(write_run(folder, max_steps=1, num_links=1))])
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("out/adapter_model.safetensors", "out/links.safetensors", "out/adapter_config.json"),
        *("out/blocktune.json", "base/model.safetensors", "base/config.json"),
        "base/tokenizer.json",
    ],
)
@pytest.mark.parametrize("how", ["cut", "empty", "text", "gone"])
def test_a_damaged_file_is_named(trained, tmp_path, name, how):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / name
    data = path.read_bytes()
    ways = {"cut": data[: len(data) // 2], "empty": b"", "text": b"no such file, but some text"}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(ways[how])
    with pytest.raises(ValueError, match=r".+") as refused:
        Engine.from_pretrained(
            str(tmp_path / "run/base"), adapter=tmp_path / "run/out", device="cpu"
        )
    line = str(refused.value)
    assert "\n" not in line
    assert path.parent.name in line or path.name in line


@pytest.mark.parametrize(
    "name", ["model-00002-of-00004.safetensors", "model.safetensors.index.json"]
)
def test_a_damaged_part_of_a_model_is_named(trained, tmp_path, name):
    shutil.copytree(trained / "base", tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(trained / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    load_base(str(tmp_path / "base"), device="cpu")
    path = tmp_path / "base" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        load_base(str(tmp_path / "base"), device="cpu")


def test_an_adapter_that_lacks_weights_or_has_others_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    folder = tmp_path / "run/out"

    def refusal() -> str:
        with pytest.raises(ValueError, match="PEFT cannot load") as refused:
            Engine.from_pretrained(str(tmp_path / "run/base"), adapter=folder, device="cpu")
        return str(refused.value)

    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, options = load_file(path), json.loads(config.read_text())
    gone = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != gone}, path, {"format": "pt"})
    assert "missing adapter keys" in refusal()
    other = gone.replace("layers.0", "layers.9")
    save_file(whole | {other: whole[gone].clone()}, path, {"format": "pt"})
    assert f"no module takes 1 of its weights, such as {other[:-7]}" in refusal()
    save_file(whole, path, {"format": "pt"})
    config.write_text(json.dumps(options | {"r": 2 * options["r"]}))
    assert "size mismatch" in refusal()
