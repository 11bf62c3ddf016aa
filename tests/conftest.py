"""What holds for every test: no network, and no skip but a `gpu` test where there is no GPU."""

import functools
import gc
import os
import sys

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "2")

NO_GPU = "gpu: no CUDA device here"


@functools.cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser):
    help = "device of tests/gpu; default: cuda where there is one, else cpu, in small sizes"
    parser.addoption("--gpu-tests-on", choices=["cuda", "cpu"], help=help)


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE tokenizer with a chat template; copy it before you change it."""
    from tiny_tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="module")
def small_benches():
    """What a machine can do takes seconds to measure well; not where the numbers are not asked."""
    from blocktune.bench import reuse, store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "PRODUCT", 64)
        patch.setattr(reuse, "COPIED", 1 << 16)
        patch.setattr(store, "_lookups", functools.partial(store._lookups, timed=50))
        patch.setattr(store, "_matches", functools.partial(store._matches, length=256, timed=50))
        yield


@pytest.fixture
def clean(monkeypatch):
    """Tables and plug-ins are afterwards as they were."""
    from blocktune import plugins
    from blocktune.methods.base import METHODS
    from blocktune.methods.reshape import RESHAPES
    from blocktune.methods.select import SELECTORS

    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(plugins, "_loaded", set())
    for table in (METHODS, SELECTORS, RESHAPES):
        monkeypatch.setattr(table, "_entries", dict(table.table()))


def pytest_collection_modifyitems(items):
    """The longest tests first: one process works through them while the others take the rest."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)


frozen = 0


def freeze_what_is_imported():
    """Modules stay: Python's collector, which training and benches ask for, leaves them out."""
    global frozen
    if len(sys.modules) > frozen + 100:
        gc.collect()
        gc.freeze()
        frozen = len(sys.modules)


def pytest_collection_finish():
    freeze_what_is_imported()


def pytest_runtest_setup(item):
    freeze_what_is_imported()
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip(NO_GPU)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fails whatever skips itself for another reason than the one this file gives."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and NO_GPU not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"only the marker `gpu` may skip a test, not {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Fails a file that skips itself as a whole, by `importorskip` for one."""
    report = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"a test file must not skip itself: {report.longrepr}"
    return report
