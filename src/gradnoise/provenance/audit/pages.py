"""Checks of what people see: the page, its numerals, the figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from gradnoise import phases
from gradnoise.base import layout, wording
from gradnoise.figures.draw import draw
from gradnoise.figures.names import SPECS
from gradnoise.provenance.audit.evidence import Evidence, plain
from gradnoise.provenance.audit.findings import Breach, check, settle
from gradnoise.report import render as report

# What a page may say with digits that come from nowhere: names, not numbers.
_NAMES = re.compile(r"SHA-256|[Ff]igures? \d+(?: and \d+)?|\bT[0-4]\b|\bHC3\b|\bCR2\b|\bpne2\b")
_NUMERAL = re.compile(r"\d[\d,.]*\d|\d")
# Words that only a macro may put on a page. A label such as CONFIRMATORY is none of them.
_VERDICT = re.compile(
    r"\b(?:(?:non|in)?significan(?:t|tly|ce)|confirm(?:s|ed|ing|ation|ations)?|corroborat(?:e|es|ed|ing|ion)|"
    r"falsif(?:y|ies|ied|ication)|(?:non)?equivalent(?:ly)?|(?:dis)?prov(?:e|es|ed|en)|demonstrat(?:e|es|ed|ing)|"
    r"inconclusive)\b",
    re.IGNORECASE,
)
_STANDIN = "¤"
_SHOWN = ("alt", "aria-label", "data-label", "title")


@check("A22", "the report is what its template makes of results and figures, byte for byte", "serious")
def rendered(evidence: Evidence) -> str:
    """Rendered again from results.json and the figures."""
    path = layout.report(evidence.name)
    again = report.page(evidence.name).encode()
    there = plain(path).read_bytes()
    if again != there:
        place = next(
            (n for n, (a, b) in enumerate(zip(again, there, strict=False)) if a != b),
            min(len(again), len(there)),
        )
        around = there[max(place - 20, 0) : place + 40].decode(errors="replace")
        raise Breach(f"{path} is another page from byte {place} on: {around!r}")
    return f"{path}: {len(there)} bytes, the same again"


@check("A23", "every numeral and every verdict word of the report comes from results.json", "serious")
def traced(evidence: Evidence) -> str:
    """Two ways: the page with every number taken away holds none, and each numeral is some number rounded.

    For the first, the template is filled in with stand-ins for the functions that write numbers, and with
    texts of results.json free of digits and verdict words. A digit or verdict word that is left was typed by
    hand. For the second, every numeral of the page must be what one of these functions makes of a number of
    results.json or the plan, or stand in one of their texts.
    """
    pictures = [report.picture(evidence.name, spec) for spec in SPECS]
    bare = [
        replace(p, title=_blank(p.title), caption=_blank(p.caption), path=_blank(p.path), uri="")
        for p in pictures
    ]
    emptied = report.fill(_blank(evidence.name), _blanked(evidence.results), bare, _standins())
    faults = [*_typed(visible(emptied)), *_claims(pictures)]
    texts = visible(plain(layout.report(evidence.name)).read_text(encoding="utf-8"))
    sources = _sources(evidence, pictures)
    numerals, words = _numerals(texts), _words(texts)
    for name, found, known in (("numeral", numerals, _numerals(sources)), ("word", words, _words(sources))):
        missing = [item for item in found if item not in set(known)]
        faults += [f"the report says {item!r}, a {name} that results.json does not give" for item in missing]
    return settle(
        faults, f"{len(numerals)} numerals and {len(words)} verdict words traced; none typed by hand"
    )


def _typed(texts: list[str]) -> Iterator[str]:
    """Digits and verdict words that are left in a page that was emptied of both."""
    for text in texts:
        found = re.search(r"\d", _NAMES.sub("", text)) or _VERDICT.search(text)
        if found:
            yield f"the template types {found[0]!r} itself: {text.strip()[:80]!r}"


def _claims(pictures: list[Any]) -> Iterator[str]:
    """Verdict words in captions."""
    for picture in pictures:
        found = _VERDICT.search(picture.caption)
        if found:
            yield f"the caption of figure {picture.number} says {found[0]!r}"


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("style", "script")
        self.found += [value for name, value in attrs if name in _SHOWN and value]

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.found.append(data)


def visible(page: str) -> list[str]:
    """The texts of a page that a reader sees or hears."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return parser.found


def _standins() -> SimpleNamespace:
    """The functions that write numbers, each writing the same sign."""
    names = ("number", "threshold", "percent", "p_value", "counted", "interval")
    return SimpleNamespace(**dict.fromkeys(names, lambda *_, **__: _STANDIN))


def _blank(text: str) -> str:
    """A text without digits (0 is a, 1 is b, ...: different names stay different) and verdict words."""
    return _VERDICT.sub(_STANDIN, text).translate(str.maketrans("0123456789", "abcdefghij"))


def _blanked(value: Any, quoted: bool = False) -> Any:
    """A value with blank texts; `quoted`: without numbers too, because a page quotes deviations whole."""
    if isinstance(value, dict):
        return {key: _blanked(item, quoted or key == "deviations") for key, item in value.items()}
    if isinstance(value, list):
        return [_blanked(item, quoted) for item in value]
    if isinstance(value, str):
        return _blank(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if quoted and number else value


def _numerals(texts: list[str]) -> list[str]:
    return [numeral for text in texts for numeral in _NUMERAL.findall(_NAMES.sub("", text))]


def _words(texts: list[str]) -> list[str]:
    return [word.lower() for text in texts for word in _VERDICT.findall(text)]


def _sources(evidence: Evidence, pictures: list[Any]) -> list[str]:
    """Every text of results, plan, captions and titles, and every number of them as it may be written."""
    alphas = {family.alpha for family in evidence.plan.families}
    said = [evidence.name, *(text for p in pictures for text in (p.title, p.caption, p.path))]
    for value in _leaves([evidence.results, evidence.plan_document]):
        said += [value] if isinstance(value, str) else list(_written(value, alphas))
    return said


def _written(value: float, alphas: set[float]) -> Iterator[str]:
    yield from (wording.number(value), wording.number(value, 2), wording.number(value, 4))
    yield from (wording.threshold(value), wording.percent(value))
    if 0 <= value <= 1:
        yield from (wording.p_value(value, alpha) for alpha in alphas)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


@check("A24", "the figures and their data are what the analysis gives, byte for byte", "serious")
def redrawn(evidence: Evidence) -> str:
    """Drawn again into another folder."""
    wanted = phases.draw_outputs(evidence.name)
    faults = []
    with TemporaryDirectory() as folder:
        draw(evidence.name, folder)
        faults += [
            f"{path} is not what is drawn from the tables of the analysis"
            for path in wanted
            if plain(path).read_bytes() != Path(folder, path).read_bytes()
        ]
    return settle(faults, f"{len(wanted)} files drawn again, the same bytes")
