"""Words fit for a log: text from elsewhere, which can neither forge nor hide a line, and numbers of things."""

import logging
import traceback

LOGGERS = "fedlora", "fedlora.gate"


def escaped(text: str, also: str = "") -> str:
    r"""The text with line breaks, escape sequences and marks that turn the writing around as Python writes them.

    `also` names characters that stay though they are not printable.

    >>> escaped("a\x1b[2J\nround 3")
    'a\\x1b[2J\\nround 3'
    """
    return "".join(c if c.isprintable() or c in also else c.encode("unicode_escape").decode() for c in text)


class EscapingFilter(logging.Filter):
    """Escapes each record before a handler writes it: it is one line, and a traceback under it is plain text."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True, as every record is written."""
        record.msg, record.args = escaped(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = escaped("".join(traceback.format_exception(*record.exc_info)).rstrip(), "\n")
        return True


def escape_logs() -> None:
    """Have this program's own logs escaped, whoever writes them, from now on."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, EscapingFilter) for known in logger.filters):
            logger.addFilter(EscapingFilter())


def counted(number: int, noun: str) -> str:
    """A number of things: `1 row`, `1,200 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
