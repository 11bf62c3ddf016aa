"""The wheel: builds, installs elsewhere, and its command starts without heavy imports."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import blocktune

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "datasets", "huggingface_hub")


# Not the checkout that the tests may be pointed to.
ENV = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command, **kwargs) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENV, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """A fresh environment's bin folder: the wheel, and this environment's dependencies."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
    )
    # A plain path entry: the folder's own .pth files, the editable install among them, stay unread.
    [site] = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(p.relative_to(ROOT)) for p in (ROOT / "blocktune").rglob("*.py")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"blocktune"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata_states_version_licence_and_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == blocktune.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"train", "serve", "eval", "data", "remote", "gguf", "gpu", "recycle", "fast", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_installed_package_is_the_wheels(elsewhere, tmp_path):
    where = run(
        elsewhere / "python", "-c", "import blocktune as b; print(b.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(elsewhere.parent)


@pytest.mark.parametrize("command", ["--help", "methods"])
def test_what_needs_no_model_imports_no_heavy_package(elsewhere, tmp_path, command):
    timings = subprocess.run(
        [elsewhere / "blocktune", command],
        cwd=tmp_path,
        env=ENV | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    loaded = {line.rsplit("|", 1)[1].strip() for line in timings.splitlines() if "|" in line}
    assert "blocktune.cli" in loaded
    assert not loaded & set(HEAVY)


def test_version_is_on_the_command_line(elsewhere, tmp_path):
    assert blocktune.__version__ in run(elsewhere / "blocktune", "--version", cwd=tmp_path)


def test_every_public_name_is_there():
    assert [name for name in blocktune.__all__ if getattr(blocktune, name, None) is None] == []


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = blocktune.Motor


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"].replace(".", "").isdigit(), "no local suffix: it must resolve anywhere"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["eval"], *extras["data"]]
    wanted += extras["gpu"] + extras["serve"] + extras["remote"] + extras["gguf"]
    wanted += extras["recycle"] + extras["fast"]
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert [r for r in wanted if r.split(">=")[0].lower().replace("_", "-") not in pinned] == []


def test_the_readmes_tree_is_the_repositorys():
    """Every place that it names is there, and every part of the package is named."""
    tree = (ROOT / "README.md").read_text().split("## Structure")[1].split("```")[1]
    top, named = ROOT, set()
    for line in tree.removeprefix("text\n").splitlines():
        words = line.split()
        if not line.startswith(" "):
            top = ROOT / words.pop(0)
            assert top.is_dir(), line
        if top.name == "blocktune":
            named.add(words[0])
    package = ROOT / "blocktune"
    assert [name for name in sorted(named) if not (package / name).exists()] == []
    parts = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert parts <= named
