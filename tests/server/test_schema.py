"""Requests made from the OpenAPI schema, bounded; `eval/server/hostile.py` is the long run."""

from contextlib import suppress

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from server.support import chat, refused


def test_the_schema_describes_every_route(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/chunks"} <= set(paths)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("ChatRequest")


def test_no_generated_request_fails_the_server(client):
    import schemathesis  # takes seconds, for this test alone
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    quick = settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    tried = []

    def send(case) -> None:
        arguments = case.as_transport_kwargs(base_url="http://localhost")
        left_out = ("url", "cookies")
        arguments = {k: v for k, v in arguments.items() if k not in left_out}
        response = client.request(url=case.formatted_path, **arguments)
        tried.append(response.status_code)
        assert response.status_code < 500, (case, response.text)

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            with suppress(Unsatisfiable):  # a route without parameters has no wrong ones
                quick(given(case=operation.as_strategy(generation_mode=mode))(send))()
    assert len(tried) > 50
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_models_are_listed_as_clients_expect(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model
    refused(client.get("/v1/models/other"), 404, "tiny")
