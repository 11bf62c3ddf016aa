"""A trained adapter, and results of it."""

import pytest
from hub.support import write_results
from training.runs import make_trainer


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """A folder with a base, and an adapter with links trained on it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, num_links=2)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def adapter(run, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (run / "out").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def results(run, tmp_path):
    """A results.json as `blocktune eval` writes it of the adapter."""
    return write_results(tmp_path / "results.json", run / "out")
