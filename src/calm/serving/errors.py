"""Errors as OpenAI's clients expect them: one document, one line, no traces."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from calm.serving.engine import EngineError, QueueFullError

log = logging.getLogger(__name__)
_RETRY_AFTER = "1"  # seconds
_FAILED = "the server failed at this request"


def error_document(status: int, message: str, code: str, param: str | None = None) -> dict:
    """An error as OpenAI's clients expect it; what of a request is quoted in it may be no text."""
    message, param = _as_text(message), None if param is None else _as_text(param)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_text(text: str) -> str:
    """Write halves of surrogate pairs, which JSON allows and UTF-8 does not, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def add_error_handlers(app: FastAPI) -> None:
    """Every way a request can fail ends in a document and the status that fits."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body" and not str(part).startswith("function-"))
        message = first["msg"].removeprefix("Value error, ")
        if place.startswith("prompt."):  # one of the kinds it might have been
            place, message = "prompt", "a text, token ids (0 and above), or a list of either is needed"
        if first["type"] == "extra_forbidden":
            message = "this parameter is not known"
        if first["type"] == "json_invalid":
            place, message = "", "the body is not valid JSON"
        elif first["type"] in ("model_attributes_type", "missing") and not place:
            message = "the body must be a JSON object, sent as application/json"
        text = f"{place}: {message}" if place else message
        return JSONResponse(error_document(400, text, "invalid_value", place or None), 400)

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(error_document(400, str(error), "invalid_value"), 400)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        document = error_document(503, f"too many requests for now: {error}", "queue_full")
        return JSONResponse(document, 503, {"Retry-After": _RETRY_AFTER})

    @app.exception_handler(EngineError)
    async def struck(request: Request, error: EngineError) -> JSONResponse:
        return JSONResponse(error_document(500, _FAILED, "internal_error"), 500)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        document = error_document(error.status_code, str(error.detail), code)
        return JSONResponse(document, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(error_document(500, _FAILED, "internal_error"), 500)
