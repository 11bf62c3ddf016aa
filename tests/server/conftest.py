"""One server over data/tiny for all tests of a process."""

import pytest
from server.support import TINY
from starlette.testclient import TestClient

from blocktune.engine import Engine
from blocktune.server import Limits, ServerConfig, Service, create_app


@pytest.fixture(scope="session")
def engine():
    return Engine.from_pretrained(str(TINY))


@pytest.fixture(scope="session")
def serve(engine):
    """Starts servers in this process: `serve(limits={}, **config)` is a client."""
    clients = []

    def start(engines=None, method=None, checked=False, limits=None, **config) -> TestClient:
        config = ServerConfig(limits=Limits(**(limits or {})), **config)
        service = Service(engines or {"tiny": engine}, config, method, checked)
        client = TestClient(create_app(service), "http://localhost", raise_server_exceptions=False)
        client.__enter__()
        client.service = service
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="session")
def client(serve):
    return serve()
