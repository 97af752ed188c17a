"""Everything that goes wrong with a request, in the form in which OpenAI's clients read it."""

import contextlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What transformers raises for fields of a wrong type or size, and for lack of `messages`.
OF_BAD_FIELDS = (TypeError, AttributeError, LookupError, OverflowError, RecursionError)


def error_response(message: str, status: int) -> JSONResponse:
    """An answer in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    # A lone surrogate, which JSON can hold and UTF-8 cannot.
    message = message.encode("utf-8", "replace").decode()
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)


def install(app: FastAPI) -> None:
    """Answers with `error_response` for whatever is raised; 400 if the request is at fault."""
    for kind in (ValueError, *OF_BAD_FIELDS, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, HTTPException):
        # transformers says 422 of fields, where OpenAI says 400.
        return error_response(str(error.detail), 400 if error.status_code == 422 else error.status_code)
    if isinstance(error, RequestValidationError):
        return error_response(f"The body is not a JSON object ({_reason(error)}): send one as application/json.", 400)
    if isinstance(error, ValueError):
        return error_response(str(error), 400)
    # No sentence for users, and perhaps a defect of the server.
    logger.error("A request could not be answered.", exc_info=error)
    message = f"The request could not be answered ({type(error).__name__}: {error})"
    if isinstance(error, OF_BAD_FIELDS):
        return error_response(f"{message}: check its fields.", 400)
    return error_response(f"{message}: see the server's log.", 500)


def _reason(error: RequestValidationError) -> str:
    with contextlib.suppress(LookupError):
        return str(error.errors()[0]["msg"])
    return "it cannot be read"
