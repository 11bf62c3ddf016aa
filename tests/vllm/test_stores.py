"""Chunks in remotes, and with fewer bits: the answers are those of the engine over them."""

import os
import subprocess
import sys

import pytest
import valkey_server
from vllm import SamplingParams
from vllm_cases import SMALL, TINY, close, first_logprobs, forget, questions, worst

from blocktune import Engine
from blocktune.cache.store import remote
from blocktune.cache.store.config import CODECS
from blocktune.vllm import ChunkLLM

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=20)
PLACES = ["memory", "s3", *(["valkey"] if valkey_server.PROGRAM else [])]


class Server:
    """A remote in a process of its own; ``memory`` has none."""

    def __init__(self, place: str):
        self.port, self.process = valkey_server.free_port(), None
        if place == "valkey":
            self.process = valkey_server.start(self.port)
            self.url = f"redis://127.0.0.1:{self.port}/0"
        elif place == "s3":
            address = f"http://127.0.0.1:{self.port}"
            os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "x")
            os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address}
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1"]
            self.process = subprocess.Popen(
                [*command, "-p", str(self.port)], stderr=subprocess.DEVNULL
            )
            valkey_server.wait_for(self.port, self.process)
            import s3fs

            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            self.url = "s3://bucket/chunks"
        else:
            self.url = "memory://chunks"

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", autouse=True)
def patience():
    """A busy machine answers late; a server that is dead refuses at once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(remote, "TIMEOUT_S", 30.0)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=PLACES)
def served(request):
    """A remote alone, and vLLM over it."""
    server = Server(request.param)
    engine = Engine.from_pretrained(TINY, store=server.url, dtype="float32", device="cpu")
    engine.encode(questions(40, 1)[0].chunks)
    engine.store.flush()
    llm = ChunkLLM(TINY, store=server.url, **SMALL)
    yield server, llm
    close(llm)
    server.kill()


def require_same(llm, engine, examples):
    wanted = engine.answer(examples, max_new_tokens=8)
    engine.store.flush()
    made = llm.generate([llm.client.read(one) for one in examples], GREEDY)
    for one, answer, example in zip(made, wanted, examples, strict=True):
        assert one.token_ids == answer.token_ids
        assert worst(one, first_logprobs(engine, example, "naive")) < 1e-4
        assert one.cached_tokens > 0.8 * one.prompt_tokens


@pytest.mark.parametrize("codec", CODECS)
def test_answers_are_the_engines(served, codec):
    server, llm = served
    examples = questions(41 + CODECS.index(codec), 2)
    options = {"dtype": "float32", "device": "cpu"}
    engine = Engine.from_pretrained(TINY, store=f"{server.url},codec={codec}", **options)
    require_same(llm, engine, examples)


def test_what_a_remote_alone_lacks_fails_and_can_be_encoded(served):
    _, llm = served
    [example] = questions(49, 1)
    made = llm.client.read(example)
    with pytest.raises(ValueError, match="could not be loaded"):
        llm.generate([made], GREEDY)
    assert llm.answer([example], sampling=GREEDY)[0].cached_tokens


def test_without_its_remote_vllm_answers_from_memory_or_not_at_all(served):
    server, llm = served
    if server.process is None:
        return
    [example] = questions(50, 1)
    engine = Engine.from_pretrained(TINY, store=server.url, dtype="float32", device="cpu")
    require_same(llm, engine, [example])
    made = llm.client.read(example)
    wanted = llm.generate([made], GREEDY)[0]
    server.kill()
    # vLLM's own cache has it all.
    assert llm.generate([made], GREEDY)[0].token_ids == wanted.token_ids
    plain = made._replace(plan=None)
    full = engine.answer([example], "full-prefill", max_new_tokens=8)[0]
    for _ in range(2):
        forget(llm)
        with pytest.raises(ValueError, match="could not be loaded"):
            llm.generate([made], GREEDY)
        # The failure is the request's alone, and leaves nothing.
        assert llm.generate([plain], GREEDY)[0].token_ids == full.token_ids
