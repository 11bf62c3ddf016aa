"""Clients of others, unchanged, against a server process.

The openai client of Python is always run, the others where they are: `BLOCKTUNE_CLIENTS` names a
folder with a Python environment and ``node_modules``; by default it is this Python's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from server.support import ROOT, process

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
    with process() as (client, _):
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
        made = (
            forked.run(whole[1:])
            if name == "openai"
            else subprocess.run(
                whole,
                capture_output=True,
                text=True,
                timeout=120,
                env=os.environ | {"PYTHONPATH": ""},
            )
        )
        assert made.returncode == 0, made.stderr
        answer, _, last = made.stdout.strip().rpartition("\n")
        answers.append(answer)
        cached.append(int(re.fullmatch(r"(\d+) prompt tokens were cached", last)[1]))
    assert answers[0] == answers[1] != ""
    assert cached[1] > 0


WEBUI = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": 'Be brief.\n<context><source id="1">Anna</source></context>'},
        {"role": "user", "content": "Who is she?"},
        {"role": "assistant", "content": "A chemist.", "id": "m-2", "timestamp": 1790000000},
        {"role": "assistant", "content": None, "tool_calls": []},
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "Where is Anna Belt?",
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
    ],
    "max_tokens": 16,
    "temperature": 0.0,
    "user": "someone",
}
"""What Open WebUI always sends: its documents stand in the messages."""
WEBUI_MORE = {
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "chat": {
        "stream": True,
        "metadata": {"user_id": "u", "chat_id": "c", "message_id": "m", "files": [{"id": "f"}]},
        "features": {"web_search": False, "image_generation": False, "memory": False},
        "files": [{"type": "file", "id": "f", "name": "a.md", "collection_name": "file-f"}],
        "params": {},
        "tool_ids": [],
        "tool_servers": [],
        "filter_ids": [],
        "variables": {"{{USER_NAME}}": "Anna"},
        "session_id": "s",
        "chat_id": "c",
        "id": "m",
        "background_tasks": {"title_generation": True, "tags_generation": True},
        "stream_options": None,
    },
    "tuned": {
        "stream": False,
        "top_p": 0.9,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "seed": 7,
        "stop": ["\n\n\n"],
        "logit_bias": {},
        "tools": [],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "response_format": {"type": "text"},
    },
    "title": {"stream": False, "max_tokens": None, "max_completion_tokens": 50},
}


def test_open_webui_reads_the_list_of_models(client):
    """Ids with which it asks, after its check of the connection, with any key."""
    headers = {"authorization": "Bearer sk-none", "x-openwebui-user-name": "Anna%20Belt"}
    listed = client.get("/v1/models", headers=headers).json()
    assert listed["object"] == "list"
    for model in listed["data"]:
        assert (model["object"], type(model["id"]), type(model["created"])) == ("model", str, int)
        assert isinstance(model["owned_by"], str)


@pytest.mark.parametrize("kind", WEBUI_MORE)
def test_bodies_as_open_webui_sends_them_are_answered(client, kind):
    """Fields of its own pass; see ``backend/open_webui`` (routers, utils) in its repository."""
    body = WEBUI | WEBUI_MORE[kind]
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        assert response.json()["choices"][0]["message"]["content"]
        return
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line[0] != ":"]
    assert "".join(c["delta"].get("content", "") for part in parts for c in part["choices"])
    assert ("usage" in parts[-1]) == bool(body["stream_options"])
