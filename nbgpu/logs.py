"""Logs of one line per event, whatever is in the names that they carry."""

from __future__ import annotations

import logging


def one_line(text: str) -> str:
    """Return `text` with everything escaped that could begin another line, move a terminal's cursor or turn the writing round."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class OneLine(logging.Formatter):
    """Escapes the message; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = one_line(record.message)
        return super().formatMessage(record)


def set_up(level: str, form: str) -> None:
    """Log to stderr from `level` on, in `form` as `logging.Formatter` takes it."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])
