"""Why a request got no images: one exception for each reason, with a short code that servers and metrics use."""

from __future__ import annotations


class RequestFailed(RuntimeError):
    """A valid request that got no images; the message says why.

    Attributes:
        reason: a word for the kind of failure.
    """

    reason = "failed"


class Overloaded(RequestFailed):
    """As much work is already waiting as the engine accepts.

    Attributes:
        retry_after: seconds after which it is worth trying again, at least 1.
    """

    reason = "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1.0, retry_after)


class Cancelled(RequestFailed):
    """The caller cancelled the request."""

    reason = "cancelled"


class Expired(RequestFailed):
    """The request's time ran out before its images were done."""

    reason = "expired"


class StepFailed(RequestFailed):
    """A step with this request in its batch raised an error."""

    reason = "step_failed"


class OutOfMemory(StepFailed):
    """Memory ran out in a step with this request, or the request needs more places than batches have since then."""

    reason = "out_of_memory"


class Diverged(RequestFailed):
    """The images hold infinities or NaN: the model's weights have diverged, or the guidance scale is too large."""

    reason = "diverged"


class EngineClosed(RequestFailed):
    """The engine is closing or closed."""

    reason = "closed"
