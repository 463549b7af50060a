"""Requests that schemathesis makes up from the OpenAPI document: any answer to them is documented."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_cluster import FakeWorker
from http_service import MODEL, http_config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from router_thread import RouterThread
from schemathesis import GenerationMode, checks
from schemathesis.core.result import Ok

from pdengine.router.http.requests import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pdengine.router.http.server import HttpServer
from pdengine.transport.messages import PrefillAndDecode

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
ENDPOINTS = (
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /version",
    "GET /live",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)


BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


class TerseRouter(RouterThread):
    """Its worker ends every answer with the first token."""

    async def _echo(self, worker: FakeWorker) -> None:
        while True:
            work = (await worker.wait_for(PrefillAndDecode)).work
            if work.sampling.prompt_logprobs is not None:
                worker.send_scored(work)
            for choice in work.choices:
                worker.send_tokens(work, 300, choice=choice.index, finish_reason="length")


@pytest.fixture(scope="module")
def document() -> Iterator[schemathesis.BaseSchema]:
    with TerseRouter() as router, HttpServer(http_config(router.address)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def ask(document: schemathesis.BaseSchema, endpoint: str, num_examples: int, *, derandomized: bool) -> None:
    """Send requests that fit the document, and some that do not."""
    method, path = endpoint.split()
    operation = document[path][method]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=derandomized,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, is_tame=st.booleans())
    def check(case: schemathesis.Case[Any], is_tame: bool) -> None:
        if is_tame and isinstance(case.body, dict):
            # A name that nobody has heard of is refused: without such, more is seen of what comes after.
            names = BODIES[path].model_fields
            case.body = {name: value for name, value in case.body.items() if name in names} | {"model": MODEL}
        case.call_and_validate(checks=CHECKS)

    check()


def test_the_document_is_complete(document: schemathesis.BaseSchema) -> None:
    operations = [operation.ok() for operation in document.get_all_operations() if isinstance(operation, Ok)]
    assert {f"{operation.method.upper()} {operation.path}" for operation in operations} == set(ENDPOINTS)


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 2, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_as_documented(
    document: schemathesis.BaseSchema, path: str, prompt: dict[str, Any], stream: bool
) -> None:
    """Chance asks for streams with log probabilities too rarely."""
    body = {**prompt, "model": MODEL, "max_tokens": 1, "stream": stream}
    response = document[path]["POST"].Case(body=body).call_and_validate(checks=CHECKS)
    assert response.status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_request_meets_an_answer_that_is_not_documented(
    document: schemathesis.BaseSchema, endpoint: str
) -> None:
    ask(document, endpoint, 30 if endpoint.startswith("POST") else 10, derandomized=True)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_request_of_many_meets_an_answer_that_is_not_documented(
    document: schemathesis.BaseSchema, endpoint: str
) -> None:
    """About five minutes in all."""
    ask(document, endpoint, 2000 if endpoint.startswith("POST") else 300, derandomized=False)
