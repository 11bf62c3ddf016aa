"""Two servers over one Valkey, which is killed and started again while they serve."""

import functools
import shutil
import threading
import time

import pytest
import valkey_server
from server.support import CHAT, chat

from blocktune.cache import ChunkStore
from blocktune.cache.store import remote, tiers
from blocktune.engine import Engine

METHODS = ("naive", "cacheblend", "epic")
ASKED = [
    chat(
        f"Where is number {n}?",
        [f"The number {n + step} is in Upper Kirby {'or Lorne ' * step}." for step in range(4)],
        blocktune={"method": METHODS[n % 3]},
    )
    for n in range(12)
]


@pytest.fixture
def remote_store(tmp_path):
    """Its URL, and a function that kills it and one that starts it again, empty.

    A folder stands for it on a machine without Valkey.
    """
    if not valkey_server.PROGRAM:
        folder = tmp_path / "remote"
        kill = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        # A server that writes a chunk makes the folder again by itself.
        yield f"file://{folder}", kill, functools.partial(folder.mkdir, exist_ok=True)
        return
    port = valkey_server.free_port()
    running = [valkey_server.start(port)]

    def kill() -> None:
        running[-1].kill()
        running[-1].wait()

    yield f"valkey://127.0.0.1:{port}/0", kill, lambda: running.append(valkey_server.start(port))
    kill()


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def tiers_of(response) -> set[str]:
    return {chunk["cached"] for chunk in response.json()["blocktune"]["chunks"]}


def test_answers_stay_right_while_the_store_dies_and_comes_back(
    serve, engine, tmp_path, remote_store, monkeypatch
):
    url, kill, start = remote_store
    monkeypatch.setattr(tiers, "RETRY_S", 0.2)
    monkeypatch.setattr(remote, "TIMEOUT_S", 30.0)  # a busy machine answers late

    def replica(name: str):
        store = ChunkStore.open(f"{tmp_path / name},memory=200KB,remote={url}")
        return serve({"tiny": Engine(engine.model, engine.tokenizer, store=store)}), store

    (first, store), (second, other) = replica("first"), replica("second")
    right = [text_of(serve().post(CHAT, json=body)) for body in ASKED]
    assert [text_of(first.post(CHAT, json=body)) for body in ASKED] == right
    store.flush()
    assert tiers_of(second.post(CHAT, json=ASKED[0])) == {"remote"}

    stop, wrong, count = threading.Event(), [], [0, 0]

    def ask(index: int, client) -> None:
        while not stop.is_set():
            number = count[index] % len(ASKED)
            if (said := text_of(client.post(CHAT, json=ASKED[number]))) != right[number]:
                wrong.append((number, said))
            count[index] += 1

    asking = [threading.Thread(target=ask, args=pair) for pair in enumerate((first, second))]
    for thread in asking:
        thread.start()
    try:
        for act in (kill, start, kill, start):
            before = list(count)
            act()
            deadline = time.monotonic() + 60
            while any(now < then + 6 for now, then in zip(count, before, strict=True)):
                assert time.monotonic() < deadline, "no more answers"
                time.sleep(0.02)
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    assert not wrong
    kill()
    key = first.post(CHAT, json=ASKED[0]).json()["blocktune"]["chunks"][0]["key"]
    assert first.get(f"/v1/chunks/{key}").json()["cached"] == "stored"
    deleted = first.delete(f"/v1/chunks/{key}").status_code
    assert deleted == (503 if valkey_server.PROGRAM else 200)  # it may still be in the remote
    assert first.get(f"/v1/chunks/{key}").json()["cached"] == "none"
    start()
    time.sleep(0.3)
    new = chat(documents=["The harbour of Selby is new."])
    assert tiers_of(first.post(CHAT, json=new)) == {"none"}
    store.flush()
    assert tiers_of(second.post(CHAT, json=new)) == {"remote"}
    failures = [one.stats().tiers["remote"].failures for one in (store, other)]
    assert any(failures) == bool(valkey_server.PROGRAM)  # a folder that is gone is an empty one
