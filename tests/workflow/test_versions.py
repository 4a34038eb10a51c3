"""Snakemake and DVC as one: what is there is not built again, whatever version, wherever it was fetched."""

import os
from pathlib import Path

import pytest
from tests.workflow.project import JOBS, NAME, ROOT, TEXT, Project
from tests.workflow.test_examples import blocks

from gradnoise.base import layout
from gradnoise.figures.names import FIGURE_NAMES

pytestmark = pytest.mark.slow


def test_a_second_run_has_nothing_to_do_even_after_touching_every_file(copy: Project) -> None:
    again = copy.snakemake()
    assert "Nothing to be done" in again.text, again
    for path in copy.path.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path)
    copy.assert_fresh()


def test_versions_can_be_checked_out_back_and_forth_without_a_rerun(copy: Project, tmp_path: Path) -> None:
    first = copy.science()
    copy.settings(lambda study: study["blocks"]["text"]["branches"].update(anneal=0.5))
    built = copy.snakemake()
    assert built.jobs == {rule: 1 for rule in JOBS if rule != "prepare_corpus"}, built
    assert f"train text/{TEXT}, seeds s00-00" in built.text, built
    assert "train race/" not in built.text, built
    second = copy.science()
    copy.commit("Version 2")
    copy.assert_fresh()

    assert set(first) == set(second)
    race = [path for path in first if path.startswith(f"results/{NAME}/runs/race/")]
    assert all(first[path] == second[path] for path in race)
    assert any(first[path] != second[path] for path in first), "the change of settings changed no result"
    for revision, science in (("v1", first), ("main", second)):
        copy.git("checkout", "--quiet", revision)
        copy.dvc("checkout", "--quiet")
        assert copy.science() == science
        copy.assert_fresh()

    older = copy.clone(tmp_path / "older", "v1")
    older.dvc("pull", "--quiet")
    assert older.science() == first
    older.assert_fresh()


def test_the_readme_brings_any_version_over_what_was_built_here(copy: Project) -> None:
    """A build on another kind of machine: other bytes in Git's files and in DVC's, all of them unsaved."""
    first = copy.science()
    copy.edit("src/gradnoise/report/report.html.j2", lambda text: f"{text}<!-- Another end. -->\n")
    copy.snakemake()
    copy.commit("Version 2")
    attempt = copy.path / layout.attempts(NAME) / "draw-draw-0002.json"
    metadata = next(path for path in (copy.path / ".snakemake/metadata").iterdir() if path.is_file())
    for path in (layout.report(NAME), layout.figure(NAME, FIGURE_NAMES[0], "svg"), layout.scores(NAME)):
        (copy.path / path).write_bytes((copy.path / path).read_bytes() + b" ")
    metadata.write_bytes(metadata.read_bytes() + b" ")
    attempt.write_text("{}")
    (commands,) = (block for block in blocks(ROOT / "README.md", "sh") if "git checkout TAG" in block)
    done = copy.run("bash", "-euc", commands.replace("TAG", "v1"))
    assert "Nothing to be done" in done.text, done
    assert copy.science() == first
    copy.assert_fresh()


def test_a_fresh_clone_is_complete_offline(tiny: Project, tmp_path: Path) -> None:
    clone = tiny.clone(tmp_path / "clone").offline()
    clone.dvc("pull")
    clone.assert_fresh()
    assert clone.science() == tiny.science()
    for figure in FIGURE_NAMES:
        traced = clone.run("gradnoise", "trace", layout.figure(NAME, figure, "svg"))
        assert "every hash is the recorded one" in traced.text, traced
    assert not (clone.path / "logs").exists()
    report = clone.make(f"QUICK={NAME}", "results")
    assert report.status == 0, report
    assert "Nothing to be done" in report.text, report
    assert "missing" not in report.text.lower(), report
    page = (clone.path / f"logs/{NAME}-report.html").read_text()
    assert all(figure in page for figure in FIGURE_NAMES)
    assert clone.git("status", "--porcelain").out == ""


def test_a_forced_rebuild_gives_the_same_bytes(copy: Project) -> None:
    before = copy.science()
    rebuilt = copy.snakemake("--forceall")
    assert rebuilt.jobs == JOBS, rebuilt
    after = copy.science()
    assert [path for path in before if before[path] != after.get(path)] == []
    assert set(after) == set(before)
    changed = [line.split()[1] for line in copy.dvc("status").out.splitlines() if "modified:" in line]
    assert sorted(changed) == [".snakemake/metadata", f"results/{NAME}/provenance"], copy.dvc("status")
    assert copy.git("status", "--porcelain").out == ""


def test_dvc_repro_drives_the_same_jobs(copy: Project) -> None:
    figure = copy.path / layout.figure(NAME, FIGURE_NAMES[0], "svg")
    before = copy.science()
    times = {path: os.stat(copy.path / path).st_mtime_ns for path in before if "/figures/" not in path}
    figure.unlink()
    repro = copy.dvc("repro")
    assert "Stage 'train' didn't change, skipping" in repro.text, repro
    assert "Running stage 'draw'" in repro.text, repro
    assert copy.science() == before, repro
    assert {path: os.stat(copy.path / path).st_mtime_ns for path in times} == times, repro
    copy.assert_fresh()

    copy.edit("src/gradnoise/report/report.html.j2", lambda text: f"{text}<!-- Another end. -->\n")
    repro = copy.dvc("repro")
    assert "Stage 'draw' didn't change, skipping" in repro.text, repro
    assert "Running stage 'report'" in repro.text, repro
    assert "Another end" in (copy.path / layout.report(NAME)).read_text()
    copy.assert_fresh()
