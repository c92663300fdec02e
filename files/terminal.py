"""Text of others on a terminal: shown, never obeyed."""

import re
import sys

from rich.console import Console
from rich.markup import escape

# What a terminal may obey: C0 and C1 controls, but for tab and line feed; what turns the direction
# of writing; other line ends; and half a character, which no stream can write.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: object) -> str:
    r"""A value as text whose control characters are spelled out.

    >>> visible("Chad\x1b[2J\r\ud800")
    'Chad\\x1b[2J\\x0d\\ud800'
    """
    return OBEYED.sub(spelled, str(text))


def spelled(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def data(text: object) -> str:
    """The same for rich, whose markup in it stays text, too."""
    return escape(visible(text))


def console(width: int | None = None, highlight: bool = False) -> Console:
    """A console on which `data` is safe: ":dog:" in it stays text."""
    return Console(width=width, highlight=highlight, emoji=False)


def fail(error: object):
    """End the program with one sentence, said at once. Errors quote files and servers."""
    print(f"error: {visible(error)}", file=sys.stderr, flush=True)
    sys.exit(1)
