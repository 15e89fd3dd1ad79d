"""Talking to the Hub: every call is tried again where that can help, and what cannot be helped is one clear line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import LayerPruneError, first_line

Result = TypeVar("Result")
WAITS = (1.0, 2.0, 4.0)
"""Seconds between attempts, beside those the client itself makes."""
TRANSPORT_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
"""The base error of the HTTP library the client was built on, which is not the same in all its releases."""


@dataclass(frozen=True)
class Purpose:
    """What a call is for, as far as its error's line depends on it.

    Attributes:
        again (`str`): what to do when the Hub could not be reached or did not work.
        forbidden (`str`): what a token without the right needs.
    """

    again: str
    forbidden: str


PUSHING = Purpose("nothing half-made is there, push again to complete it", "use one with write access")
READING = Purpose("try again in a moment", "use one that may read there")


def patiently(what: str, call: Callable[..., Result], *args: Any, purpose: Purpose = PUSHING, **kwargs: Any) -> Result:
    """Make one call of the client.

    Args:
        what (`str`): what it is for, to begin the error's line with.
        call (`Callable`): the call; making it twice must do no harm.
        args, kwargs: passed to it.
        purpose ([`Purpose`], *optional*, defaults to `PUSHING`): what to do, to end the error's line with.

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
                raise LayerPruneError(f"{what}: {_reason(error, purpose)}") from error
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
    if _is_offline(error):
        return False
    lost = (TRANSPORT_ERROR, ConnectionError, TimeoutError, json.JSONDecodeError)
    return any(isinstance(cause, lost) for cause in _causes(error))


def _reason(error: Exception, purpose: Purpose) -> str:
    if isinstance(error, GatedRepoError):
        return "access to it is granted by its owners; ask for it on its page, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and the token in use may not see it; check the name, or "
            "log in with `hf auth login`"
        )
    status = status_of(error)
    if isinstance(error, LocalEntryNotFoundError) and status is None:
        if _is_offline(error):
            return "HF_HUB_OFFLINE is set and the file was not read before; unset it"
        return f"the Hub is out of reach and the file was not read before; {purpose.again}"
    if status == 401:
        return "the Hub refuses the token (401); log in again with `hf auth login` or renew HF_TOKEN"
    if status == 403:
        return f"the token has no right to do that (403); {purpose.forbidden}"
    if status is not None:
        return f"the Hub answered {status}: {_message(error)}" + (f"; {purpose.again}" if status >= 500 else "")
    if _passes(error):
        return f"the connection to the Hub was lost ({_message(error)}); {purpose.again}"
    return _message(error)


def _is_offline(error: Exception) -> bool:
    return any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error))


def _message(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return " ".join((error.server_message or first_line(error).split(" (Request ID")[0]).split())
    text = " ".join(str(error).split()) or type(error).__name__
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return f"{text} {_message(error.__cause__)}" if wrapped else text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
