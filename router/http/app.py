"""The endpoints, and the OpenAPI document that describes them."""

from collections.abc import Iterable
from http import HTTPMethod, HTTPStatus
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pdengine.router.admission import InvalidRequest
from pdengine.router.http import replies
from pdengine.router.http.body import BodyLimits
from pdengine.router.http.completions import complete, complete_chat
from pdengine.router.http.door import OWN_ID, Door
from pdengine.router.http.errors import ApiError, error_response, of_outcome, of_validation
from pdengine.router.http.fields import check_unknown
from pdengine.router.http.prompts import conversation_of, encode
from pdengine.router.http.replies import Model, ModelList, State, Text, Tokens, Version
from pdengine.router.http.requests import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    extras,
)
from pdengine.router.http.service import Service
from pdengine.transport.messages import TextPrompt

BODY_ERRORS = (400, 404, 408, 413, 503)
Responses = dict[int | str, dict[str, Any]]


def make_app(service: Service) -> ASGIApp:
    """The whole server, as an ASGI application."""
    app = FastAPI(title="pdengine", version=_version(), docs_url=None, redoc_url=None, lifespan=None)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    _add_errors(app)
    app.openapi = lambda: _openapi(app, has_keys=bool(service.config.api_keys))  # type: ignore[method-assign]
    config = service.config
    return Door(
        app,
        api_keys=config.api_keys,
        limits=BodyLimits(
            max_bytes=config.max_body_bytes,
            max_arriving_bytes=config.max_arriving_bytes,
            seconds=config.body_seconds,
            rest_seconds=config.rest_seconds,
        ),
        metrics=service.metrics,
        endpoints={route.path for route in app.routes if hasattr(route, "path")},
    )


def _add_generation(app: FastAPI, service: Service) -> None:
    errors = (*BODY_ERRORS, 429)

    @app.post("/v1/completions", responses=_responses(replies.Completion, errors, streams=True))
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue one or several prompts."""
        return complete(service, body, _id_of(request))

    @app.post("/v1/chat/completions", responses=_responses(replies.ChatCompletion, errors, streams=True))
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Write the assistant's next message."""
        return complete_chat(service, body, _id_of(request))


def _id_of(request: Request) -> str:
    """The client's own id for it, or a new one."""
    own: bytes | None = request.scope[OWN_ID]
    return uuid4().hex if own is None else own.decode()


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_responses(Tokens, BODY_ERRORS))
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a text, or of messages."""
        service.check_model(body.model or None)
        check_unknown(extras(body), {})
        content = await service.on_thread(lambda: _tokens(service, body))
        return Response(content, media_type="application/json")

    @app.post("/detokenize", responses=_responses(Text, BODY_ERRORS))
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of tokens, special ones included."""
        service.check_model(body.model or None)
        check_unknown(extras(body), {})
        text = await service.on_thread(
            lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return _json(Text(text))


def _tokens(service: Service, body: TokenizeBody) -> bytes:
    """The answer to `/tokenize`, encoded. Takes long for long text."""
    token_ids = _token_ids(service, body)
    spellings = None
    if body.return_token_strs:
        spellings = [service.tokenizer.spelling(token_id) for token_id in token_ids]
    return msgspec.json.encode(Tokens(len(token_ids), service.max_model_len, token_ids, spellings))


def _token_ids(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(HTTPStatus.BAD_REQUEST, "give either prompt or messages", param="prompt")
    if body.prompt == "":
        return service.tokenizer.encode("", add_special_tokens=body.add_special_tokens is not False)
    prompt = TextPrompt(body.prompt or "") if body.messages is None else conversation_of(body.messages, body)
    try:
        return encode(prompt, service.tokenizer, add_special_tokens=body.add_special_tokens)
    except InvalidRequest as error:
        raise of_outcome(error, "prompt" if body.messages is None else "messages") from error


def _add_models(app: FastAPI, service: Service) -> None:
    model = Model(service.model, service.created, service.max_model_len)

    @app.get("/v1/models", responses=_responses(ModelList))
    async def models() -> Response:
        """The one model that is served."""
        return _json(ModelList([model]))

    @app.get("/v1/models/{name:path}", responses=_responses(Model, (404,)))
    async def model_of_name(name: str) -> Response:
        """The model of this name. There are slashes in names."""
        service.check_model(name)
        return _json(model)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/version", responses=_responses(Version))
    async def version_() -> Response:
        return _json(Version(_version()))

    @app.get("/live", responses=_responses(State))
    async def live() -> Response:
        """This process answers."""
        return _json(State("live"))

    @app.get("/health", responses=_responses(State, (503,)))
    async def health() -> Response:
        """The router answers."""
        return _json(State("healthy", len((await service.status()).workers)))

    @app.get("/ready", responses=_responses(State, (503,)))
    async def ready() -> Response:
        """The router answers, and there is a worker behind it."""
        return _json(State("ready", len((await service.ready_status()).workers)))

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses=text)
    async def metrics() -> Response:
        """In Prometheus' text format."""
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(error)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        # The server logs the error with its traceback; what it says may be nobody else's business.
        return error_response(HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of the server"))


def _responses(
    answer: type[msgspec.Struct], errors: Iterable[int] = (), *, streams: bool = False
) -> Responses:
    """What an endpoint answers, as OpenAPI documents it."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(answer)}}
    if streams:
        content["text/event-stream"] = {}  # readers differ on whether a schema is of one event or of all
    responses: Responses = {200: {"description": "OK", "content": content}}
    return responses | {status: _error(status) for status in sorted(errors)}


def _error(status: int) -> dict[str, Any]:
    return {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": _reference(replies.ErrorReply)}},
    }


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def _openapi(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = msgspec.json.schema_components(
        replies.DOCUMENTED, ref_template="#/components/schemas/{name}"
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # such errors are 400 here, as OpenAI's clients expect
            if has_keys and path not in ("/live", "/ready") and method.upper() in HTTPMethod.__members__:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _error(401)
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    app.openapi_schema = document
    return document


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _version() -> str:
    return version("pdengine")
