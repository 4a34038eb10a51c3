"""How numbers and words reach a reader: rounding happens here and nowhere else.

Files keep full precision; captions, tables and the report print through these functions.
"""

import re

from gradnoise.base.errors import InputError

ABSENT = "–"  # an absent number, as a table prints it

# Words that would make a rehearsal read like the registered study. Stricter than need be: whoever trips over
# them can say what was computed instead.
_CLAIM = r"(?:H\d|(?:an?|the|our|this|these)\s+(?:[\w-]+\s+)?(?:hypothes[ie]s|claim|theory|prediction))"
BANNED_IN_REHEARSAL = re.compile(
    r"\w*confirm\w*"
    r"|\w*significan(?:t|ce)\w*"
    r"|\w*corroborat\w*"
    r"|\w*falsif\w*"
    r"|\w*demonstrat\w*"
    r"|\bestablish\w*"
    r"|\brefut\w*"
    r"|\bevidence\b"
    r"|\b(?:non)?equivalent(?:ly)?\b"
    r"|\b(?:non)?equivalence\b(?!\s+(?:margin|bound|test)s?\b)"
    r"|\b(?:dis|un)?pro(?:ve|ven|ves|ved)\b"
    r"|\b(?:in)?validat(?:e|es|ed|ing)\b"
    r"|\breject(?:s|ed|ing)?\b"
    r"|\baccept(?:s|ed|ing)?\b"
    r"|\b(?:un)?supported\b"
    rf"|\bsupport(?:s|ing|ive)?\s+(?:for\s+|of\s+)?{_CLAIM}",
    re.IGNORECASE,
)


def check_rehearsal(text: str, where: str) -> None:
    """Raise `InputError` naming the first banned word of `text`; `where` says what is being written."""
    found = BANNED_IN_REHEARSAL.search(text)
    if found is not None:
        mend = (
            "a rehearsal decides nothing; say what was computed (condition met, condition not met, undecided)"
        )
        raise InputError(where, repr(found.group()), mend)


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, trailing zeros kept: 0.0500, −1.20, 4.1 × 10⁻⁶.

    Integers are printed whole with thousands separated (9,216); None as a dash.
    """
    if value is None:
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded value: 0.9996 is 1.00
    if not -4 <= exponent < 6:
        mantissa = f"{value:.{digits - 1}e}".split("e")[0]
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa} × 10{power}".replace("-", "−")
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")


def threshold(value: float | None) -> str:
    """A number of the plan as the plan writes it, never rounded: 0.05, 9,216."""
    if value is None:
        return ABSENT
    return ("−" if value < 0 else "") + f"{abs(value):,.15g}"


def interval(low: float | None, high: float | None) -> str:
    """`[low, high]`, both by `number`; a dash when either end is absent."""
    return ABSENT if low is None or high is None else f"[{number(low)}, {number(high)}]"


def percent(share: float) -> str:
    """A level as a percentage: 0.95 is 95%."""
    return f"{100 * share:.15g}%"


def p_value(p: float | None, alpha: float = 0.05) -> str:
    """`= .036` or `< .001`, to follow the letter p; a dash when absent.

    Three decimals, and more where rounding would print alpha itself: .0504 stays .0504.
    """
    if p is None:
        return ABSENT
    if p < 0.001:
        return "< .001"
    digits = next(d for d in range(3, 18) if p == alpha or float(f"{p:.{d}f}") != alpha)
    return "= " + f"{p:.{digits}f}".removeprefix("0")


def counted(count: int, noun: str) -> str:
    """`1 run`, `30 runs`."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"
