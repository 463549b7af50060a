"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdengine.client import Failed, GenerateError, Rejected, RouterUnavailable
from pdengine.router.admission import CONTEXT_LIMIT, InvalidRequest
from pdengine.router.http.replies import ErrorBody, ErrorReply

RETRY_SECONDS = 1
LOGGED = "pdengine.logged"  # in the scope of a request whose line in the log another one writes
CLIENT_CLOSED_REQUEST = 499  # nginx's number for it; no client ever sees it


class ApiError(HTTPException):
    """What a request ends with instead of an answer. param: the field at fault. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code


class ClientGone(ApiError):
    """The client has closed its connection: nobody waits for the answer."""

    def __init__(self) -> None:
        super().__init__(CLIENT_CLOSED_REQUEST, "the client closed the connection")


def unavailable(message: str) -> ApiError:
    """The same request may be served in a moment, here or elsewhere."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, headers={"Retry-After": str(RETRY_SECONDS)})


def of_outcome(error: GenerateError | InvalidRequest, prompt_field: str) -> ApiError:
    """The error of a request that the router did not finish.

    prompt_field: what the client calls the prompt.
    """
    match error:
        case Rejected(field=None):  # no worker has room
            return unavailable(str(error))
        case Rejected(field=field) | InvalidRequest(field=field):
            params = {"prompt": prompt_field, "prompt_logprobs": "logprobs"}
            param = field and params.get(field, field)
            code = "context_length_exceeded" if CONTEXT_LIMIT in str(error) else None
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), param=param, code=code)
        case RouterUnavailable() | Failed():
            return unavailable(str(error))
    return unavailable(f"the request was not finished: {error}")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a body that does not validate, from pydantic's list of what is wrong with it."""
    first = errors[0]
    location = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not location or not isinstance(location[0], str):
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(HTTPStatus.BAD_REQUEST, f"the body must be a JSON object: {reason}")
    param = location[0]
    same_field = [error for error in errors if param in error["loc"][:2]]
    # Of a union every member says why it is not the one: more than a person wants to read.
    reasons = list(dict.fromkeys(str(error["msg"]) for error in same_field))
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {', or: '.join(reasons[:3])}", param=param)


def error_body(error: HTTPException) -> bytes:
    """The JSON of an error."""
    status = error.status_code
    kind = {
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    }.get(HTTPStatus(status) if status != CLIENT_CLOSED_REQUEST else HTTPStatus.BAD_REQUEST)
    if kind is None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    # What a client has sent may be quoted here, and need not be valid Unicode.
    message = str(error.detail).encode(errors="replace").decode()
    if param is not None:
        param = param.encode(errors="replace").decode()
    return msgspec.json.encode(ErrorReply(ErrorBody(message, kind, param, code)))


def error_response(error: HTTPException) -> Response:
    return Response(
        error_body(error), error.status_code, media_type="application/json", headers=error.headers
    )
