"""What a client is told when its request can't be answered: JSON in OpenAI's form, and a mend."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from fusionkit import errors
from fusionkit.errors import meant


class RefusedError(Exception):
    """A request is answered by an error.

    Args:
        status: HTTP's.
        message: what was expected, what came, and what to do.
        code: a word for programs.
        param: the request's field that is at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body, as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, _INVALID)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole response."""
        return Response(
            json.dumps(self.content()), self.status, self.headers, media_type="application/json"
        )


_INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SOON = {"Retry-After": "1"}
"""The headers of what is refused for a while only."""


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is no success."""

    error: Error


def failure(error: BaseException, request: str, seconds: float) -> RefusedError:
    """What a client is told of an error.

    Args:
        error: the error; of one that is not foreseen nothing is told.
        request: the request's number in the log.
        seconds: that a request has.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, TimeoutError):
        return RefusedError(
            408,
            f"there was no answer within {seconds:g} s, and none is worked on any more; ask for "
            "less, or ask again later",
            "timeout",
        )
    for kind, status, code in _KINDS:
        if isinstance(error, kind):
            headers = SOON if status in (429, 503) else None
            return RefusedError(status, str(error), code, headers=headers)
    return RefusedError(
        500, f"the server failed; its log says more, of request {request}", "internal_error"
    )


_KINDS: list[tuple[type[errors.FusionKitError], int, str | None]] = [
    (errors.RequestError, 400, None),
    (errors.UnknownTaskError, 404, "model_not_found"),
    (errors.TaskGoneError, 404, "model_not_found"),
    (errors.QueueFullError, 429, "queue_full"),
    (errors.StoppedError, 503, "stopped"),
    (errors.BundleError, 500, "bundle"),
    (errors.CheckpointError, 500, "bundle"),
    (errors.FusionKitError, 400, None),
]


def no_task(name: str, tasks: Sequence[str], field: str) -> RefusedError:
    """That a task is not served, and some that are."""
    some = ", ".join(tasks[:8]) + (f", … ({len(tasks)} in all)" if len(tasks) > 8 else "")
    called = f"'{name}'" if len(name) <= 100 else f"'{name[:100]}…'"
    return RefusedError(
        404,
        f"no task {called} is served; there are {some}{meant(name[:100], tasks)}",
        "model_not_found",
        field,
    )


def malformed(found: Sequence[Mapping[str, Any]], fields: Mapping[str, str]) -> RefusedError:
    """What is wrong with a request's body.

    Args:
        found: as pydantic says.
        fields: of the body: name → what it may be.
    """
    first = found[0]
    place = [each for each in first["loc"] if each != "body"]
    if first["type"] == "json_invalid":
        return RefusedError(400, f"the body is not JSON ({first['ctx']['error']}); {_NO_OBJECT}")
    if not place:
        return RefusedError(400, _NO_OBJECT)
    name, takes = str(place[0])[:100], fields.get(str(place[0]))
    about = f" ({takes})" if takes else ""
    if first["type"] == "missing" and len(place) == 1:
        return RefusedError(400, f"`{name}` is missing{about}", param=name)
    if first["type"] == "extra_forbidden" and len(place) == 1:
        return RefusedError(
            400,
            f"`{name}` is not supported by this server; leave it out: there are "
            f"{', '.join(fields)}{meant(name, fields)}",
            "unsupported",
            name,
        )
    several = len({each["loc"] for each in found if str(each["loc"][1]) == name}) > 1
    if several:  # it may be of several kinds, and is of none
        return RefusedError(400, f"`{name}` is of another kind, or empty{about}", param=name)
    where, wrong = ".".join(map(str, place))[:100], first["msg"]
    return RefusedError(400, f"`{where}`: {wrong[:1].lower()}{wrong[1:]}{about}", param=name)


_NO_OBJECT = "expected a JSON object, with Content-Type: application/json"
