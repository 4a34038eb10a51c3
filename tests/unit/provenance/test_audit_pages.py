"""Numbers and verdict words that a page may not have of itself, and pages that are not what they must be."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.figures.synthetic_results import write_study

from gradnoise.base import layout
from gradnoise.figures.draw import draw
from gradnoise.provenance.audit import pages
from gradnoise.provenance.audit.findings import Breach
from gradnoise.report import render

REPORT = layout.report("quick")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up study with its figures and its page, for reading."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_study()
        draw("quick")
        render.render("quick")
    return folder


@pytest.fixture
def evidence(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of the evidence as the checks of pages ask for."""
    monkeypatch.chdir(drawn)
    results = render.read_json(layout.results("quick"))
    plan = SimpleNamespace(families=[SimpleNamespace(alpha=0.05)])
    return SimpleNamespace(name="quick", results=results, plan=plan, plan_document={})


@pytest.fixture
def edited(evidence: Any) -> Any:
    """The page with text replaced, put back at the end."""
    before = Path(REPORT).read_text()

    def edit(old: str, new: str) -> Any:
        assert old in before
        Path(REPORT).write_text(before.replace(old, new, 1))
        return evidence

    yield edit
    Path(REPORT).write_text(before)


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Add to the text that the template makes."""

    def add(text: str) -> None:
        fill = render.fill
        monkeypatch.setattr(render, "fill", lambda *given: fill(*given).replace("</main>", f"{text}</main>"))

    return add


def test_clean_page_passes(evidence: Any) -> None:
    assert "the same again" in pages.rendered(evidence)
    assert "none typed by hand" in pages.traced(evidence)
    assert "the same bytes" in pages.redrawn(evidence)


@pytest.mark.parametrize(
    "text", ["<p>In 30 of our runs.</p>", '<p aria-label="7">x</p>', "<p>ICL rose by .05</p>"]
)
def test_numeral_that_the_template_types(evidence: Any, template: Callable[[str], None], text: str) -> None:
    template(text)
    with pytest.raises(Breach, match="the template types '[370]' itself"):
        pages.traced(evidence)


@pytest.mark.parametrize(
    "text",
    ["ICL rises significantly.", "This confirms the claim.", "The arms are equivalent.", "It proves H."],
)
def test_verdict_word_that_the_template_types(
    evidence: Any, template: Callable[[str], None], text: str
) -> None:
    template(f"<p>{text}</p>")
    with pytest.raises(
        Breach, match="the template types '(significantly|confirms|equivalent|proves)' itself"
    ):
        pages.traced(evidence)


def test_names_and_hidden_texts_are_no_numerals(evidence: Any, template: Callable[[str], None]) -> None:
    template("<style>p { margin: 17px }</style><p>Figure 7 and figures 1 and 12, SHA-256, HC3, level T3.</p>")
    pages.traced(evidence)


def test_number_that_skips_the_rounding_functions(evidence: Any, template: Callable[[str], None]) -> None:
    template(f"<p>{evidence.results['flow']['planned']}</p>")
    with pytest.raises(Breach, match="the template types"):
        pages.traced(evidence)


def test_number_typed_into_the_page(edited: Any) -> None:
    evidence = edited("<h2", "<p>Only 0.0417 of the runs failed.</p><h2")
    with pytest.raises(Breach, match="numeral that results.json does not give"):
        pages.traced(evidence)
    with pytest.raises(Breach, match="is another page from byte"):
        pages.rendered(evidence)


def test_verdict_word_typed_into_the_page(edited: Any) -> None:
    with pytest.raises(Breach, match="'falsified', a word that results.json does not give"):
        pages.traced(edited("<h2", "<p>H1 is falsified.</p><h2"))


@pytest.mark.parametrize("suffix", ["svg", "parquet"])
def test_figure_that_was_touched(evidence: Any, suffix: str) -> None:
    path = Path(layout.figure("quick", "figure-12-flow", suffix))
    before = path.read_bytes()
    path.write_bytes(before.replace(b"planned", b"Planned", 1))
    try:
        with pytest.raises(Breach, match=f"figure-12-flow.{suffix} is not what is drawn"):
            pages.redrawn(evidence)
    finally:
        path.write_bytes(before)
