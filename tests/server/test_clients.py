"""Clients of others, unchanged, against a server process.

The openai client of Python is always run, the others where they are: `BLOCKTUNE_CLIENTS` names a
folder with a Python environment and ``node_modules``; by default it is this Python's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from server.support import DOCUMENTS, ROOT, process

FOLDER = Path(os.environ.get("BLOCKTUNE_CLIENTS", sys.prefix))
PYTHON, MODULES = FOLDER / "bin" / "python", FOLDER / "node_modules"
EXAMPLES = ROOT / "examples" / "clients"


def installed() -> dict[str, list]:
    """How each example is started, before the server's address."""
    found = {"openai": [sys.executable, ROOT / "examples/serve_rag.py", ROOT / "docs", "Why?"]}
    packages = {
        "langchain_chat": "langchain_openai",
        "llama_index_chat": "llama_index/llms/openai_like",
    }
    for name, package in packages.items():
        if list(FOLDER.glob(f"lib/python*/site-packages/{package}")):
            found[name] = [PYTHON, EXAMPLES / f"{name}.py"]
    if shutil.which("node") and (MODULES / "openai").is_dir():
        found["openai_node"] = ["node", EXAMPLES / "openai_node.mjs"]
    return found


@pytest.fixture(scope="module")
def server():
    with process() as (client, _, _):
        yield client


@pytest.mark.parametrize("name", installed())
def test_a_client_works_unchanged(server, name, tmp_path):
    """An answer twice, the second time from cached chunks."""
    command = installed()[name]
    if name == "openai_node":  # modules are searched from the script's folder upwards
        (tmp_path / "node_modules").symlink_to(MODULES)
        command = ["node", shutil.copy(command[1], tmp_path)]
    cached, answers = [], []
    for _ in range(2):
        whole = [*map(str, command), f"{str(server.base_url).rstrip('/')}/v1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT) if name == "openai" else ""}
        made = subprocess.run(whole, capture_output=True, text=True, timeout=120, env=environment)
        assert made.returncode == 0, made.stderr
        answer, _, last = made.stdout.strip().rpartition("\n")
        answers.append(answer)
        cached.append(int(re.fullmatch(r"(\d+) prompt tokens were cached", last)[1]))
    assert answers[0] == answers[1] != ""
    assert cached[1] > 0


def test_what_open_webui_asks_is_answered(server):
    """Its list of models, its check of a connection, and its chat requests, as its backend sends.

    See backend/open_webui/routers/openai.py in its repository.
    """
    headers = {"authorization": "Bearer sk-none"}
    listed = server.get("/v1/models", headers=headers).json()
    assert listed["object"] == "list"
    for model in listed["data"]:
        assert isinstance(model["id"], str)
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)
    body = {
        "model": listed["data"][0]["id"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Where is Anna Belt?"}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 16,
        "user": "someone",
        "documents": DOCUMENTS,
    }
    with server.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    title = body | {"stream": False, "max_completion_tokens": 50}
    title.pop("max_tokens"), title.pop("stream_options")
    made = server.post("/v1/chat/completions", json=title, headers=headers).json()
    assert made["choices"][0]["message"]["content"]
