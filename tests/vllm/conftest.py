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


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")
