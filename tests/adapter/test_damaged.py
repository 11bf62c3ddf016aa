"""Files of a model or an adapter that are cut off: one line that names the file."""

import shutil

import pytest
from training.runs import write_run

from blocktune import Engine
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
