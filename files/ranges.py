"""Settings and the values they may have, declared beside each: `steps: Count = 60`."""

import math
from typing import Annotated, NamedTuple, get_type_hints


class Range(NamedTuple):
    """From `low`, itself allowed unless `above`, to `high`, itself allowed."""

    low: float
    high: float = math.inf
    above: bool = False


Count = Annotated[int, Range(1)]
Amount = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, above=True)]
Observed = Annotated[int, Range(32)]  # the tags, and something between them


def check_ranges(settings):
    """Raises ValueError, naming the flag, where a field of a dataclass is out of its range.

    >>> from dataclasses import dataclass
    >>> Cfg = dataclass(type("Cfg", (), {"__annotations__": {"top_p": Share}}))
    >>> check_ranges(Cfg(1.0))
    >>> check_ranges(Cfg(0.0))
    Traceback (most recent call last):
        ...
    ValueError: --top-p 0.0: it must be above 0 and at most 1
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        for found in getattr(hint, "__metadata__", ()):
            if isinstance(found, Range) and not inside(getattr(settings, name), found):
                flag = f"--{name.replace('_', '-')} {getattr(settings, name)}"
                raise ValueError(f"{flag}: it must be {words(found)}")


def inside(value: float, allowed: Range) -> bool:
    """Infinite and not-a-number are in no range."""
    low = value > allowed.low if allowed.above else value >= allowed.low
    return math.isfinite(value) and low and value <= allowed.high


def words(allowed: Range) -> str:
    low = f"above {allowed.low}" if allowed.above else f"at least {allowed.low}"
    return low if allowed.high == math.inf else f"{low} and at most {allowed.high}"
