"""Talking to the Hub: every call is tried again where that can help, and what cannot be helped is one clear line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..errors import LayerPruneError, first_line

Result = TypeVar("Result")
WAITS = (1.0, 2.0, 4.0)
"""Seconds between attempts, beside those the client itself makes."""
TRANSPORT_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
"""The base error of the HTTP library the client was built on, which is not the same in all its releases."""


def patiently(what: str, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Make one call of the client.

    Args:
        what (`str`): what it is for, to begin the error's line with.
        call (`Callable`): the call; making it twice must do no harm.

    Raises:
        [`LayerPruneError`]: if it fails for good, or more often than there are attempts.
    """
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except LayerPruneError:
            raise
        except OfflineModeIsEnabled as error:
            raise LayerPruneError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is out of reach; unset it") from error
        except HFValidationError as error:
            raise LayerPruneError(f"{what}: {first_line(error)}") from error
        except Exception as error:  # the client raises its own, the HTTP library's, ValueError and RuntimeError
            if wait is None or not _passes(error):
                raise LayerPruneError(f"{what}: {_reason(error)}") from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if the Hub answered at all."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, HfHubHTTPError) and response is not None:
            return response.status_code
    return None


def _passes(error: Exception) -> bool:
    """Whether the same call may work in a moment."""
    status = status_of(error)
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500
    lost = (TRANSPORT_ERROR, ConnectionError, TimeoutError, json.JSONDecodeError)
    return any(isinstance(cause, lost) for cause in _causes(error))


def _reason(error: Exception) -> str:
    status = status_of(error)
    if status == 401:
        return "the Hub refuses the token (401); log in again with `hf auth login` or renew HF_TOKEN"
    if status == 403:
        return "the token has no right to do that (403); use one with write access"
    if status is not None:
        return f"the Hub answered {status}: {_message(error)}" + (
            "; nothing half-made is there, push again to complete it" if status >= 500 else ""
        )
    if _passes(error):
        return f"the connection to the Hub was lost ({_message(error)}); push again to complete it"
    return _message(error)


def _message(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return error.server_message or first_line(error).split(" (Request ID")[0]
    text = " ".join(str(error).split()) or type(error).__name__
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return f"{text} {_message(error.__cause__)}" if wrapped else text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
