"""The report: everything from the results, nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment, StrictUndefined
from tests.unit.figures.synthetic_results import make_results, write_study

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.files import write_json
from gradnoise.base.wording import check_rehearsal
from gradnoise.figures.draw import draw
from gradnoise.figures.names import SPECS
from gradnoise.report.render import comparisons, render

CAPTIONS = Path(__file__).parents[3] / "workflow/report"


class _Page(HTMLParser):
    """Text of a page, and every attribute value that may load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.tags = "", [], set[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "  # text of neighbouring cells does not run together
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> _Page:
    return _Page(Path(layout.report("quick")).read_text(encoding="utf-8"))


def plain(text: str) -> str:
    return " ".join(text.split())


def test_same_results_same_bytes(rendered: Path) -> None:
    before = Path(layout.report("quick")).read_bytes()
    render("quick")
    assert Path(layout.report("quick")).read_bytes() == before


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(rendered: Path) -> None:
    found = page()
    assert "script" not in found.tags
    assert all(link.startswith(("data:", "#")) for link in found.links)
    css = re.search(r"<style>(.*?)</style>", Path(layout.report("quick")).read_text(), re.DOTALL)
    assert css
    assert not re.search(r"url\(|@import", css[1])


def test_every_result_is_on_the_page(rendered: Path) -> None:
    text = plain(page().text)
    results = make_results([], "REHEARSAL")
    assert results["plan"]["sha256"] in text
    for hypothesis in results["hypotheses"]:
        assert hypothesis["text"] in text
    assert "p = .0504 p = .101 undecided REHEARSAL" in text
    assert "p < .001 p = .001 condition met" in text
    assert "p = .230 p = .230 condition not met" in text
    assert "0.0912 (s.e. 0.0123) 95% [0.0571, 0.125] p = .0504, df 4 30 runs, 5 seeds" in text
    assert "0.0917 (s.e. 0.0119) p = .002, df 3.86 (greater) singular fit" in text
    assert "batch: F 12.3, p = .002 (HC3 p = .003)" in text
    assert "batch × learning rate: F 0.456, p = .710 30 runs" in text
    assert "undecided runs: 0.5 of them missing 30 runs" in text
    assert "icl-slope-loss sign flip REHEARSAL 0.0777 – p = .031 30" in text
    assert "Exposure to IWL to ICL mediation REHEARSAL 0.0777" in text
    assert "icl-slope-loss, sign flip: seed: 1 slopes: give at least 2 seeds" in text
    assert "covered a level's true mean in 0.838 (s.e. 0.012) of the cases" in text
    assert "2 0.550 [0.450, 0.660] [0.520, 0.580]" in text
    assert "b256-lr0.008 4 of 5 [0.320, 0.520] –" in text
    assert "analysed 28, excluded 0, unmatched 1, diverged 1" in text
    assert "Trust level T0, as far as these files tell." in text
    assert "Deviations" not in text
    assert "seeds: 2: the plan tests on 3 or more" in text
    assert "bits per character bits" in text
    assert "0.712 (0.012) 0.0151 (0.012) 5" in text
    assert "2.05 (s.e. 0.0041) 2.96 (s.e. 0.0041) 1" in text
    assert "validation loss across runs: 0.9713" in text
    assert "Noise arms, descriptive" in text
    assert "after-x4 0.424 (0.021) 0.812 (0.0034) 2 of 2" in text
    assert "reweight-b16 – – 0 of 2" in text
    assert "after-x4 kind inject, scale 4, where post" in text
    for spec in SPECS:
        assert f"Figure {spec.number}. {spec.title}." in text
        assert f"gradnoise trace results/quick/figures/{spec.name}.svg" in text
    assert "To rebuild everything from nothing: snakemake --config study=quick --forceall." in text


def test_a_study_without_noise_arms_has_no_table_of_them(rendered: Path, study: Path) -> None:
    results = _copy(rendered, study)
    write_json(layout.results("quick"), results | {"arms": []})
    render("quick")
    assert "noise arms, descriptive" not in page().text.lower()
    assert "#arms" not in page().links


def test_all_outcomes_look_alike(rendered: Path) -> None:
    cells = re.findall(
        r"<td([^>]*)>(undecided|condition (?:not )?met)<br>", Path(layout.report("quick")).read_text()
    )
    assert {outcome for _, outcome in cells} == {"undecided", "condition met", "condition not met"}
    assert len({attributes for attributes, _ in cells}) == 1


def test_matchings_stand_beside_each_other() -> None:
    rows = comparisons(make_results([], "REHEARSAL")["tests"])
    assert [(row.kind, list(row.tests)) for row in rows] == [
        ("slope", ["loss", "updates", "tokens"]),
        ("mixed", ["loss"]),
        ("anova", ["loss", "updates"]),
        ("tost", ["loss"]),
    ]
    assert rows[3].description == "difference in ICL between two batches"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, for tests that change a study's files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_registered_study_has_no_banner_and_may_use_its_words(rendered: Path, study: Path) -> None:
    results = _copy(rendered, study)
    register(results)
    results["hypotheses"][0]["outcome"] = "corroborated"
    write_json(layout.results("quick"), results)
    render("quick")
    text = plain(page().text)
    assert "corroborated CONFIRMATORY" in text
    assert "REHEARSAL" not in text
    assert "Trust level T3, as far as these files tell." in text
    assert f"Its lock preregistration/plan.lock.json, SHA-256 {'ab' * 32}" in text


def register(results: dict[str, Any]) -> None:
    """Make a rehearsal's results those of a registered study."""
    results["label"] = "REGISTERED"
    results["plan"] |= {
        "kind": "registered",
        "lock": {"path": "preregistration/plan.lock.json", "sha256": "ab" * 32},
    }
    for entry in [*results["tests"], *results["hypotheses"]]:
        entry["label"] = "CONFIRMATORY"
    for entry in [*results["sensitivity"], *results["exploratory"]]:
        entry["label"] = "EXPLORATORY"


def test_a_deviation_is_told_and_both_results_are_shown(rendered: Path, study: Path) -> None:
    results = _copy(rendered, study)
    register(results)
    results["tests"][0]["label"] = results["hypotheses"][0]["label"] = "CONFIRMATORY-DEVIATED"
    changed = results["tests"][0] | {"outcome": "above zero", "estimate": 0.0888, "p": 0.0404}
    results["deviated"] = {
        "tests": [changed, *results["tests"][1:]],
        "families": [],
        "hypotheses": [results["hypotheses"][0] | {"outcome": "corroborated"}, *results["hypotheses"][1:]],
    }
    results["deviations"] = [
        {
            **{"id": "D1", "document": "plan", "pointer": "/matching/target", "registered": 0.05},
            **{"actual": 0.06, "reason": "error-in-plan", "discovered": "after", "effect": "Less strict."},
            "evidence": "docs/why.md",
        }
    ]
    write_json(layout.results("quick"), results)
    render("quick")
    text = plain(page().text)
    assert "D1, after the outcome was seen plan /matching/target: registered 0.05, done 0.06" in text
    assert "error in plan. Less strict. Evidence: docs/why.md." in text
    assert "H1 undecided, adjusted p = .101 corroborated, adjusted p = .101" in text
    assert "icl-slope-loss undecided: 0.0912" in text
    assert "above zero: 0.0888 [0.0571, 0.125], p = .040" in text


def test_a_rehearsal_may_not(rendered: Path, study: Path) -> None:
    results = _copy(rendered, study)
    results["hypotheses"][0]["text"] = "ICL rises, as was proven."
    write_json(layout.results("quick"), results)
    with pytest.raises(InputError, match=r"report\.html: 'proven'"):
        render("quick")
    assert not Path(layout.report("quick")).exists()


def test_text_of_the_plan_is_shown_and_not_run(rendered: Path, study: Path) -> None:
    results = _copy(rendered, study)
    results["hypotheses"][0]["text"] = "ICL <script>alert(1)</script> rises & stays"
    write_json(layout.results("quick"), results)
    render("quick")
    found = page()
    assert "script" not in found.tags
    assert "ICL <script>alert(1)</script> rises & stays" in found.text


def test_a_missing_or_foreign_figure_is_named(rendered: Path, study: Path) -> None:
    _copy(rendered, study)
    data = Path(layout.figure("quick", "figure-12-flow", "parquet"))
    data.write_bytes(Path(layout.figure("quick", "figure-01-exposure", "parquet")).read_bytes())
    with pytest.raises(InputError, match=r"figure-12-flow\.parquet: carries no caption of this figure"):
        render("quick")
    data.unlink()
    with pytest.raises(InputError, match=r"figure-12-flow\.parquet: missing"):
        render("quick")


def test_a_study_without_matched_runs_still_has_a_report(study: Path) -> None:
    write_study(seeds=0)
    draw("quick")
    render("quick")
    assert "at matched loss (0.05 nats; no run)" in plain(page().text)


def _copy(rendered: Path, study: Path) -> dict[str, Any]:
    """Copy results and figures, without the report, to `study`; returns the results, to be changed."""
    for path in (rendered / "results").rglob("*"):
        if path.is_file() and path.name != "report.html":
            target = study / path.relative_to(rendered)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return make_results([], "REHEARSAL")


@pytest.mark.parametrize("name", ["workflow", *(spec.name for spec in SPECS)])
def test_snakemakes_captions_are_labelled_and_print_the_plans_threshold(name: str) -> None:
    template = Environment(undefined=StrictUndefined).from_string((CAPTIONS / f"{name}.rst").read_text())  # noqa: S701
    described = {"outcome": "iwl", "predictor": "log10_ne", "rivals": "log10_updates, log10_sum_lr"}
    params = SimpleNamespace(label="REHEARSAL", target_loss=0.0725, **described)
    text = template.render(
        snakemake=SimpleNamespace(params=params, config={"study": "quick", "label": "REHEARSAL"})
    )
    check_rehearsal(text, name)
    assert text.startswith("**REHEARSAL**")
    if name != "workflow":
        assert "0.0725 nats" in text
