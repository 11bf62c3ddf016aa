"""What needs vLLM runs by `make test-vllm` in an environment of its own; elsewhere only the rest.

vLLM runs in the process of the tests: its scheduler and its worker can be looked into.
"""

import os
from importlib.util import find_spec

import pytest

collect_ignore = [] if find_spec("vllm.config") else ["test_engine.py", "test_models.py"]
collect_ignore += [] if find_spec("vllm.config") else ["test_http.py", "test_stores.py"]
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture(scope="session", autouse=True)
def inspected_here():
    """vLLM asks what a model class can do in a process of its own, which imports all of it."""
    if find_spec("vllm.config"):
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda inspect: inspect()


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session", autouse=True)
def serving(request, tmp_path_factory):
    """The server of test_http.py, which takes long to start: from the first test on."""
    if not any(item.path.name == "test_http.py" for item in request.session.items):
        yield None
        return
    from vllm_server import Serving

    started = Serving(tmp_path_factory.mktemp("serving"))
    yield started
    started.close()
