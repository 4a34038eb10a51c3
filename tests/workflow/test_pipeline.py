"""What the DAG, dvc.yaml and the profiles must have in common, and what an edit reruns."""

import re
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec
from tests.workflow.project import JOBS, NAME, ROOT, Project, holds, published_plan, published_study

from gradnoise import phases
from gradnoise.base import layout
from gradnoise.base.closure import code_closure
from gradnoise.figures.names import FIGURE_NAMES
from gradnoise.provenance.metadata import ignore_pattern

METADATA = ".snakemake/metadata"
WORKFLOW = [ROOT / "Snakefile", *sorted((ROOT / "workflow/rules").glob("*.smk"))]


@pytest.fixture(scope="module")
def stages(tiny: Project) -> list:
    """The stages of dvc.yaml as DVC reads them, in their order."""
    from dvc.repo import Repo

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", tiny.env["DVC_SITE_CACHE_DIR"])
        with Repo(str(tiny.path)) as repo:
            return list(repo.index.stages)


def relative(tiny: Project, items: list) -> list[str]:
    return [str(Path(item.fs_path).relative_to(tiny.path)) for item in items]


@pytest.mark.slow
def test_every_output_lies_in_one_dvc_out_and_every_out_holds_outputs(tiny: Project, stages: list) -> None:
    summary = tiny.snakemake("--summary").out.splitlines()
    outputs = [line.split("\t")[0] for line in summary if line.startswith("results/")]
    assert len(outputs) == len(set(outputs)) > 0, summary
    outs = [path for stage in stages for path in relative(tiny, stage.outs)]
    assert [path for path in outputs if sum(holds(out, path) for out in outs) != 1] == []
    assert [out for out in outs if not any(holds(out, path) for path in outputs)] == [METADATA]
    # Nothing else lies in the outs: a file that no rule writes would be published with the study.
    files = {str(path.relative_to(tiny.path)) for path in tiny.path.glob("results/**/*") if path.is_file()}
    assert set(outputs) <= files
    others = {path for path in files - set(outputs) if not path.endswith("/.gitignore")}
    assert {str(Path(path).parent) for path in others} == {layout.attempts(NAME)}
    assert any(holds(out, layout.attempts(NAME)) for out in outs)


@pytest.mark.slow
def test_a_phase_of_the_dag_is_a_stage(stages: list) -> None:
    assert {stage.name for stage in stages} == set(phases.MODULES)
    for stage in stages:
        assert re.fullmatch(r"snakemake --quiet reason host -- \w+", stage.cmd)


@pytest.mark.slow
def test_outs_survive_dvc_repro_and_the_last_stage_keeps_the_metadata(tiny: Project, stages: list) -> None:
    assert [str(out) for stage in stages for out in stage.outs if not out.persist] == []
    by_name = {stage.name: stage for stage in stages}
    assert METADATA in relative(tiny, by_name["provenance"].outs)
    earlier = {
        path for name, stage in by_name.items() if name != "provenance" for path in relative(tiny, stage.outs)
    }
    assert earlier <= set(relative(tiny, by_name["provenance"].deps)), (
        "the metadata is complete only after all"
    )


@pytest.mark.slow
def test_what_people_read_is_in_git_and_the_rest_in_the_store(tiny: Project, stages: list) -> None:
    in_git = {
        str(Path(out.fs_path).relative_to(tiny.path))
        for stage in stages
        for out in stage.outs
        if not out.use_cache
    }
    assert in_git == {f"results/{NAME}/{folder}" for folder in ("figures", "report", "analysis/results.json")}
    tracked = tiny.git("ls-files", "results").out.split()
    assert [path for path in tracked if not any(holds(folder, path) for folder in in_git)] == []
    assert len(tracked) == 2 * len(FIGURE_NAMES) + 2


@pytest.mark.slow
def test_stages_depend_on_the_code_and_the_plan_that_decide_them(tiny: Project, stages: list) -> None:
    for stage in stages:
        deps = relative(tiny, stage.deps)
        files = code_closure(phases.MODULES[stage.name], tiny.path / "src")
        missing = [file for file in files if not any(holds(dep, file) for dep in deps)]
        assert missing == [], f"stage {stage.name} runs code that dvc.yaml does not list"


@pytest.mark.slow
@pytest.mark.parametrize("file", ["src/gradnoise/__init__.py", "src/gradnoise/base/tables.py"])
def test_dvc_sees_an_edit_of_what_every_phase_runs(shared: Project, edited: Callable, file: str) -> None:
    with edited(file, lambda text: f"{text}# A comment.\n"):
        status = shared.dvc("status")
    assert set(re.findall(r"^(\w+):$", status.out, re.MULTILINE)) == set(phases.MODULES), status


def test_dvc_yaml_names_the_plan_of_the_published_study() -> None:
    named = re.findall(r"preregistration/\S+", (ROOT / "dvc.yaml").read_text())
    assert set(named) == {published_plan()}
    assert f"!/results/{published_study()}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_cache_holds_copies_never_links() -> None:
    """Snakemake rewrites its metadata in place: through a link it would rewrite the cache."""
    config = (ROOT / ".dvc/config").read_text()
    assert re.search(r'^\s*type = "reflink,copy"$', config, re.MULTILINE), config


def test_rules_use_nothing_that_checkouts_break() -> None:
    """Folders, scripts and temporary outputs are judged by their times, which no checkout keeps."""
    flags = r"\b(?:directory|temp|temporary|protected|touch|ancient|checkpoint)\s*\("
    banned = rf"{flags}|^\s*(?:script|notebook|wrapper|run)\s*:|\bdvc\b|--touch|--cleanup-metadata"
    code = {path.name: re.sub(r"#.*", "", path.read_text()) for path in WORKFLOW}
    found = {name: re.findall(banned, text, re.MULTILINE) for name, text in code.items()}
    assert {name: hits for name, hits in found.items() if hits} == {}
    commands = {name: len(re.findall(r"^\s*shell:", text, re.MULTILINE)) for name, text in code.items()}
    inputs = {name: len(re.findall(r"^\s*code=code\(", text, re.MULTILINE)) for name, text in code.items()}
    assert commands == inputs, "every rule that runs a command has the command's code as input"
    assert sum(commands.values()) == len(JOBS)


EVERYTHING = list(JOBS)
AFTER = {
    "src/gradnoise/base/tables.py": EVERYTHING,
    "src/gradnoise/training/train.py": EVERYTHING[1:],
    "src/gradnoise/noise/measure.py": EVERYTHING[2:],
    "src/gradnoise/analysis/analyse.py": EVERYTHING[3:],
    "src/gradnoise/figures/draw.py": EVERYTHING[4:],
    "src/gradnoise/report/render.py": EVERYTHING[5:],
    "src/gradnoise/report/report.html.j2": EVERYTHING[5:],
    "src/gradnoise/provenance/manifest.py": EVERYTHING[6:],
}


@pytest.mark.slow
@pytest.mark.parametrize("file", AFTER)
def test_an_edit_of_a_phase_reruns_it_and_what_follows(shared: Project, edited: Callable, file: str) -> None:
    with edited(
        file, lambda text: text + ("{# A comment. #}\n" if file.endswith(".j2") else "# A comment.\n")
    ):
        answer = shared.plan()
    assert answer.jobs == {rule: JOBS[rule] for rule in AFTER[file]}, answer


@pytest.mark.slow
def test_an_edit_of_the_command_line_or_of_documents_reruns_nothing(
    shared: Project, edited: Callable
) -> None:
    files = ["src/gradnoise/cli.py", "README.md", "docs/provenance.md", "workflow/report/workflow.rst"]
    edits = [edited(file, lambda text: text + "\n") for file in [*files, f"config/{NAME}.yaml"]]
    for edit in edits:
        edit.__enter__()
    answer = shared.plan()
    for edit in edits:
        edit.__exit__()
    assert "Nothing to be done" in answer.text, answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "first"), [("scipy", "analyse_plan"), ("jinja2", "render_report"), ("ruff", None)]
)
def test_a_new_pin_reruns_the_phases_that_use_the_package(
    shared: Project, edited: Callable, package: str, first: str | None
) -> None:
    with edited(
        "requirements.lock", lambda text: re.sub(rf"(?m)^{package}==.*? ", f"{package}==99.0 ", text)
    ):
        answer = shared.plan()
    rerun = EVERYTHING[EVERYTHING.index(first) :] if first else []
    assert answer.jobs == {rule: JOBS[rule] for rule in rerun}, answer


@pytest.mark.slow
def test_a_value_of_the_plan_reruns_training_and_a_comment_nothing(shared: Project, edited: Callable) -> None:
    plan = f"preregistration/{NAME}.yaml"
    with edited(plan, lambda text: f"# A comment.\n{text}"):
        assert "Nothing to be done" in shared.plan().text
    # Seeds follow from the plan's hash, so even a word of its title decides all runs.
    with edited(plan, lambda text: text.replace('"title": "', '"title": "Another ')):
        answer = shared.plan()
    assert answer.jobs == {rule: count for rule, count in JOBS.items() if rule != "prepare_corpus"}, answer


@pytest.mark.slow
def test_the_command_that_the_report_gives_rebuilds_everything_where_all_is_built(shared: Project) -> None:
    page = (shared.path / layout.report(NAME)).read_text()
    (command,) = re.findall(r"To rebuild everything from nothing: <code>(.+?)</code>", page)
    answer = shared.run(*command.split(), "--dry-run")
    assert answer.jobs == JOBS, answer


@pytest.mark.slow
def test_the_quick_study_has_few_jobs(shared: Project) -> None:
    answer = shared.plan("--forceall", "--config", "study=quick")
    assert set(answer.jobs) == set(JOBS), answer
    assert sum(answer.jobs.values()) <= 25, answer


@pytest.mark.slow
def test_a_new_cell_trains_alone(shared: Project, edited: Callable) -> None:
    with edited(
        f"config/{NAME}.yaml",
        lambda text: text.replace('"batch": [\n     16,', '"batch": [\n     8,\n     16,', 1),
    ):
        answer = shared.plan()
    assert answer.jobs == {rule: 1 for rule in JOBS if rule != "prepare_corpus"}, answer
    assert "train race/b008" in answer.text, answer


@pytest.mark.slow
def test_a_new_arm_trains_alone(shared: Project, edited: Callable) -> None:
    arm = '{"batch": 32, "learning_rate": 0.002, "noise": {"kind": "reweight", "to_batch": 16}}'
    with edited(
        f"config/{NAME}.yaml",
        lambda text: text.replace('"grid": {', f'"arms": {{"as-b16": {arm}}},\n   "grid": {{', 1),
    ):
        answer = shared.plan()
    assert answer.jobs == {rule: 1 for rule in JOBS if rule != "prepare_corpus"}, answer
    assert "train race/as-b16" in answer.text, answer


def shorten(study: dict) -> None:
    """As little training as the plan allows."""
    for block in study["blocks"].values():
        block["evaluation_sequences"] = 32
        block["branches"]["sequences"] = block["branches"]["sequences"][:1]
    study["blocks"]["race"]["branches"]["updates"] = 2


@pytest.mark.slow
def test_building_another_study_leaves_the_published_one_clean(copy: Project) -> None:
    for file in ("config/{}.yaml", "preregistration/{}.yaml"):
        text = (copy.path / file.format(NAME)).read_text()
        (copy.path / file.format("other")).write_text(text.replace(f'{NAME}.yaml"', 'other.yaml"'))
    copy.settings(shorten, "other")
    ignored = copy.path / ".dvcignore"
    ignored.write_text(f"{ignored.read_text()}{ignore_pattern('other')}\n")
    built = copy.snakemake("--config", "study=other")
    assert built.jobs == JOBS, built
    assert (copy.path / layout.manifest("other")).is_file(), built
    copy.assert_fresh()
    # The line is what does it.
    ignored.write_text(ignored.read_text().replace(ignore_pattern("other"), ""))
    assert METADATA in copy.dvc("status").text


@pytest.mark.parametrize("name", ["o", "ot", "oth", "quick", "quick-2", "laptop-350m"])
def test_the_ignored_line_matches_all_metadata_of_its_study_and_no_other(name: str) -> None:
    line = GitIgnoreSpec.from_lines([ignore_pattern(name)])

    def ignored(path: str) -> bool:
        return line.match_file(f"{METADATA}/{urlsafe_b64encode(path.encode()).decode()}")

    def paths(study: str) -> list[str]:
        cell = ("race", "b016-lr0.002", "s00-04", "scores")
        files = [layout.plays(study), layout.run(study, *cell), layout.manifest(study), layout.scores(study)]
        return [
            *files,
            layout.figure(study, "figure-01-exposure", "svg"),
            f"results/{study}/Zeta",
            f"results/{study}/_",
        ]

    assert all(ignored(path) for path in paths(name))
    others = [f"{name}-2", f"{name}0", name[:-1] or "z", f"x{name}", "tiny"]
    assert not any(ignored(path) for other in others for path in paths(other))


def test_every_unpublished_study_has_its_line() -> None:
    names = {path.stem for path in (ROOT / "config").glob("*.yaml")} - {"config", published_study()}
    lines = (ROOT / ".dvcignore").read_text().splitlines()
    assert [name for name in sorted(names) if ignore_pattern(name) not in lines] == []
    assert ignore_pattern(published_study()) not in lines
