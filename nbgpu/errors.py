"""Errors that a person may read: what happened, to whom, what to do."""

from __future__ import annotations


class NbgpuError(Exception):
    """An error with a message for people and a code for programs.

    Parameters
    ----------
    message : str
        One or two plain sentences: what happened, and what to do.
    code : str
        Stable word for programs, as in the APIs' ``error.code``.
    status : int
        The HTTP status that an API answers with.
    field : str, optional
        The input that was wrong.
    """

    code = "error"
    status = 500

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None, field: str | None = None):
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.status = status or self.status
        self.field = field

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows (IPython asks for it): the message, no stack."""
        return [self.message]

    def as_json(self) -> dict[str, object]:
        """Return the body of an API's error answer: ``{"error": {code, message, field}}``."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.field:
            error["field"] = self.field
        return {"error": error}


class InvalidValue(NbgpuError):
    """An input outside its range; the message names the input and what is allowed.

    Parameters
    ----------
    field : str
        Name of the input in the API.
    value : object
        What it was.
    allowed : str
        What it must be.
    label : str, optional
        Name of the input on the page where people fill it in; the message then names it so.
    """

    code = "invalid"
    status = 400

    def __init__(self, field: str, value: object, allowed: str, label: str | None = None):
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        super().__init__(f"{label or field} is {shown}; it must be {allowed}.", field=field)
        self.allowed = allowed


class Refused(NbgpuError):
    """The pool says no for good: a quota, or a request that no device could ever hold."""

    code = "refused"
    status = 403


class Unavailable(NbgpuError):
    """A part is away or still starting; trying again later can help."""

    code = "unavailable"
    status = 503
