"""Two JSON values side by side: where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Two ways to the same number differ by rounding, and by what an optimiser left.
RELATIVE, ABSOLUTE = 1e-6, 1e-13


class Text:
    """Stands for any text: the reason why a test could not be carried out."""


@dataclass(frozen=True)
class Difference:
    """A place, and what stands there instead of what was expected."""

    path: tuple[str, ...]
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} is {self.found}, should be {self.expected}"


def differences(
    found: Any, expected: Any, path: tuple[str, ...] = (), relative: float = RELATIVE
) -> Iterator[Difference]:
    """Every place where `found` is not `expected`: other values, and what only one of the two has."""
    if isinstance(expected, Text):
        if not isinstance(found, str):
            yield Difference(path, _said(found), "a reason")
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in found or key not in expected:
                there = ("there", "absent") if key in found else ("absent", "there")
                yield Difference((*path, key), *there)
            else:
                yield from differences(found[key], expected[key], (*path, key), relative)
    elif isinstance(expected, list | tuple) and isinstance(found, list):
        if len(found) != len(expected):
            yield Difference(path, f"a list of {len(found)}", f"a list of {len(expected)}")
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            named = one.get("id") if isinstance(one, dict) else None
            yield from differences(one, other, (*path, str(named or number)), relative)
    elif not same(found, expected, relative):
        yield Difference(path, _said(found), _said(expected))


def same(found: Any, expected: Any, relative: float = RELATIVE) -> bool:
    """Equal, or as floating-point numbers equal up to rounding."""
    if isinstance(found, bool) or isinstance(expected, bool) or found is None or expected is None:
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=relative, abs_tol=ABSOLUTE)
    return type(found) is type(expected) and bool(found == expected)


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
