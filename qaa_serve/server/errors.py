"""Refusals, in the form that OpenAI's clients read."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    405: "MethodNotAllowedError", 408: "RequestTimeoutError", 409: "ConflictError",
    412: "PreconditionFailedError", 413: "RequestTooLargeError",
    415: "BadRequestError", 422: "UnprocessableEntityError", 429: "RateLimitError",
}  # fmt: skip


class RefusedError(Exception):
    """A request that is not let through.

    Attributes:
        status: the HTTP status.
        message: why, and what to do.
        param: the field of the request that is at fault, if it is one.
        headers: of the response.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """In the form that OpenAI's clients read."""
        return error_response(self.status, self.message, param=self.param, headers=self.headers)


def error_response(
    status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kind = _TYPES.get(status, "ServiceUnavailableError" if status >= 500 else "BadRequestError")
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JSONResponse(body, status, headers)


def answer_errors(app: FastAPI) -> None:
    """Have an app answer refusals, unknown routes and methods in OpenAI's form; vLLM sees to other errors."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RefusedError)
        return error.response()

    async def not_there(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: unknown_route, 405: unknown_method}.get(error.status_code)
        message = known(request.method, request.url.path) if known else str(error.detail)
        return error_response(error.status_code, message, headers=dict(error.headers or {}))

    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(HTTPException, not_there)


def unknown_route(method: str, path: str) -> str:
    """What is said of a route that there is not."""
    return f"there is no route {method} {path} here: /openapi.json lists those there are"


def unknown_method(method: str, path: str) -> str:
    """What is said of a method that a route does not take."""
    return f"{path} does not take {method}"
