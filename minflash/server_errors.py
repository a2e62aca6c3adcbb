"""Answers other than success, in OpenAI's form, and what they say of a request's fields."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ArgumentError, ContextError, MinflashError, TokenizerError

Body = dict[str, Any]


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.type, self.param, self.code = type, param, code

    def body(self) -> Body:
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a failure of the model's side is to a client; a bug of ours is told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, (ArgumentError, TokenizerError)):
        return ApiError(400, str(error), param=param, code="invalid_value")
    known = isinstance(error, MinflashError)
    message = str(error) if known else f"unexpected {type(error).__name__}; the log tells more"
    return ApiError(500, message, type="server_error", code="internal_error")


@contextlib.contextmanager
def blaming(param: str | None) -> Iterator[None]:
    """What is raised inside is the fault of this field."""
    try:
        yield
    except MinflashError as error:
        raise api_error(error, param) from error


def invalid(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def wrong(param: str, rule: str, value: Any) -> ApiError:
    """``param`` must be what ``rule`` says, and is ``value``."""
    found = json.dumps(value, ensure_ascii=False, default=repr)
    found = found if len(found) <= 60 else found[:57] + "..."
    return invalid(param, f"{param} must be {rule}; found {found}")


def unsupported(param: str, reason: str) -> ApiError:
    message = f"{param} is not supported here; {reason}"
    return ApiError(400, message, param=param, code="unsupported_parameter")
