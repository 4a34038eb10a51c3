"""The attacks: what a cheat does to a finished study, and the checks that must notice.

Numbers 1 to 40 are the adversarial suite of the specification, some in several variants; from 41 on they are
of our own invention. After changing a result the cheat carries out again what follows from it and forges
records, manifest, dvc.lock and the last commit, so that nothing but what is named can give him away.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pyarrow.parquet as pq
from tests.audit import forge
from tests.audit.fixture_study import CELLS, CHUNK, CONFIG, NAME, PILOT, PLAN, Repository
from tests.audit.forge import (
    LOCK,
    LOG,
    MANIFEST,
    RESULTS,
    Json,
    amend,
    analyse_under,
    cover,
    disguise,
    rewrite,
)

from gradnoise.base import layout
from gradnoise.base.files import read_json, sha256

SMALL, MIDDLE, LARGE = CELLS
FIGURE = layout.figure(NAME, "figure-01-exposure", "svg")
FIGURE_DATA = layout.figure(NAME, "figure-01-exposure", "parquet")
REPORT = layout.report(NAME)
SCORES, EXPOSURE = layout.scores(NAME), layout.exposure(NAME)
EVERYTHING = ("measure", "analyse", "draw", "report")


@dataclass(frozen=True)
class Attack:
    """A way to cheat. `trips`: checks that must find a breach; `spot_runs`: training jobs run again."""

    number: int
    name: str
    trips: tuple[str, ...]
    spot_runs: int
    apply: Callable[[Repository], None]


ATTACKS: list[Attack] = []


def attack(
    number: int, *trips: str, spot_runs: int = 0
) -> Callable[[Callable[[Repository], None]], Callable[[Repository], None]]:
    """Enter a function as a variant of attack `number`."""

    def enter(apply: Callable[[Repository], None]) -> Callable[[Repository], None]:
        ATTACKS.append(Attack(number, apply.__name__, trips, spot_runs, apply))
        return apply

    return enter


def test_of(results: Json, name: str) -> Json:
    """An entry of `tests` in results.json."""
    found: Json = next(entry for entry in results["tests"] if entry["id"] == name)
    return found


def run_of(repository: Repository, cell: str, seed_index: int) -> str:
    """Name of a run of block race."""
    lock: Any = read_json(repository.file(LOCK))
    place = {"block": "race", "cell": cell, "seed_index": seed_index}
    return str(next(run["run_id"] for run in lock["runs"] if place.items() <= run.items()))


def train_record(cell: str, number: int = 1) -> str:
    """Name of the record of a training job of block race."""
    return f"train-race-{cell}-{CHUNK}-{number:04d}"


def results_changed(repository: Repository, change: Callable[[Json], object]) -> None:
    """Change results.json, then draw, report and seal everything accordingly."""
    forge.rewrite_json(repository, RESULTS, change)
    cover(repository, "draw", "report")


def better(frame: pd.DataFrame, where: pd.Series, by: float = 0.05) -> pd.DataFrame:
    """Scores with a higher ICL in some rows."""
    return frame.assign(value=frame["value"].where(~(where & (frame["score"] == "icl")), frame["value"] + by))


def better_run(repository: Repository, cell: str = SMALL, seed_index: int = 0) -> None:
    """Let a run score higher in the very file that its training wrote."""
    path = layout.run(NAME, "race", cell, CHUNK, "scores")
    rewrite(repository, path, lambda frame: better(frame, frame["seed_index"] == seed_index))


def better_everywhere(repository: Repository) -> None:
    """Let every run score higher, so that whichever is trained again gives the cheat away."""
    jobs = [("race", cell, CHUNK) for cell in ("slow", "warm", "hot", *CELLS)]
    for job in (*jobs, ("text", SMALL, "s00-00")):
        rewrite(
            repository,
            layout.run(NAME, *job, "scores"),
            lambda frame: frame.assign(
                value=frame["value"].where(frame["score"] == "validation_loss", frame["value"] * 1.01)
            ),
        )


@contextmanager
def replaced(target: str, value: object) -> Iterator[None]:
    """A piece of the project's code replaced while the cheat computes."""
    with patch(target, value):
        yield


# 1 to 6: the plan is changed after the data.


@attack(1, "A02")
def wider_margin_in_the_plan(repository: Repository) -> None:
    repository.edit(PLAN, "low: -0.05, high: 0.05", "low: -0.08, high: 0.08")
    amend(repository)


@attack(1, "A02")
def comment_in_the_plan(repository: Repository) -> None:
    repository.edit(PLAN, "intervals: {level: 0.95}", "intervals: {level: 0.95}  # as always")
    amend(repository)


def relocked(repository: Repository, *, seeds: bool, **dates: str) -> None:
    """Change the plan and lock it anew after the data, in new commits."""
    repository.edit(PLAN, "low: -0.05, high: 0.05", "low: -0.08, high: 0.08")
    repository.commit("Plan", **dates)
    with repository.inside():
        entries = [json.loads(line) for line in Path(LOG).read_bytes().splitlines()]
        run_commit = str(next(iter(forge.records(repository).values()))["commit"]["sha"])
        forge.relock()
        forge.write_log(entries, commit=repository.git("rev-parse", "HEAD"))
    repository.commit("Lock", **dates)
    forge.claim(repository, repository.git("rev-parse", "HEAD~2^"))
    assert run_commit
    forge.rename(repository, seeds=seeds)
    forge.rerun(repository, *EVERYTHING)
    forge.seal(repository)
    repository.commit("Results", **dates)


@attack(2, "A04", "A06")
def relocked_after_the_data(repository: Repository) -> None:
    relocked(repository, seeds=False)


@attack(3, "A04")
def relocked_with_an_old_date(repository: Repository) -> None:
    date = "2020-01-01T00:00:00Z"
    relocked(repository, seeds=True, GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)


@attack(4, "A04")
def relocked_and_grafted(repository: Repository) -> None:
    before = repository.git("rev-parse", "HEAD~1")
    relocked(repository, seeds=True)
    lock = repository.git("rev-parse", "HEAD~1")
    # The runs' commit is made to come after the new lock.
    repository.git("replace", "--graft", before, lock)


@attack(5, "A03")
def edit_hidden_by_skip_worktree(repository: Repository) -> None:
    repository.edit(PLAN, "low: -0.05, high: 0.05", "low: -0.08, high: 0.08")
    repository.git("update-index", "--skip-worktree", PLAN)
    assert repository.git("status", "--porcelain") == ""


@attack(5, "A03")
def edit_hidden_by_assume_unchanged(repository: Repository) -> None:
    repository.git("update-index", "--assume-unchanged", "dvc.yaml")
    repository.edit("dvc.yaml", "snakemake --quiet", "snakemake --forceall")
    assert repository.git("status", "--porcelain") == ""


@attack(6, "A01")
def key_given_twice(repository: Repository) -> None:
    repository.edit(PLAN, "low: -0.05, high: 0.05", "low: -0.05, high: 0.05, high: 0.08")
    amend(repository)


@attack(6, "A01")
def alpha_is_no_number(repository: Repository) -> None:
    repository.edit(PLAN, "alpha: 0.05", "alpha: .nan")
    amend(repository)


@attack(6, "A01")
def margin_is_a_text(repository: Repository) -> None:
    repository.edit(PLAN, "high: 0.05}", 'high: "0.05"}')
    amend(repository)


@attack(6, "A01")
def misspelt_key(repository: Repository) -> None:
    repository.edit(PLAN, "missing_p: 1.0", "mising_p: 1.0")
    amend(repository)


# 7, 8: other numbers than the registered ones decide.


@attack(7, "A16", "A18")
def margin_changed_in_the_results(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][7].update(low=-0.02, high=0.02))
    cover(repository, "draw", "report")


@attack(7, "A18")
def margin_used_but_not_told(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][7].update(low=-0.02, high=0.02))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(8, "A16")
def larger_alpha(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["families"][0].update(alpha=0.1))
    cover(repository, "draw", "report")


@attack(8, "A16", "A17")
def one_sided(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][0].update(alternative="greater"))
    cover(repository, "draw", "report")


@attack(8, "A17")
def one_sided_but_not_told(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][0].update(alternative="greater"))
    disguise(repository)
    cover(repository, "draw", "report")


def other_mixed_model(repository: Repository, change: Callable[[Json], object]) -> None:
    def results(value: Json) -> None:
        entry = test_of(value, "icl-mixed")
        change(entry)
        entry |= {name: entry["details"]["terms"]["log10_pne2"][name] for name in ("df", "p", "low", "high")}

    results_changed(repository, results)


@attack(8, "A17")
def maximum_likelihood(repository: Repository) -> None:
    from scipy import stats

    def ml(entry: Json) -> None:
        # The estimates of maximum likelihood have smaller variances: theirs divided by n, not n - p.
        shrink = (13 / 15) ** 0.5
        entry["details"]["sigma"] *= shrink
        for term in entry["details"]["terms"].values():
            term["se"] *= shrink
            term["se_unadjusted"] *= shrink
            term["t"] /= shrink
            half = stats.t.ppf(0.975, term["df"]) * term["se"]
            term |= {"low": term["estimate"] - half, "high": term["estimate"] + half}
            term["p"] = float(2 * stats.t.sf(abs(term["t"]), term["df"]))
        entry["stderr"] = entry["details"]["terms"]["log10_pne2"]["se"]

    other_mixed_model(repository, ml)


@attack(8, "A17")
def satterthwaite_at_row_level(repository: Repository) -> None:
    from scipy import stats

    def rows(entry: Json) -> None:
        term = entry["details"]["terms"]["log10_pne2"]
        half = stats.t.ppf(0.975, 13) * term["se"]
        term |= {"df": 13.0, "low": term["estimate"] - half, "high": term["estimate"] + half}
        term["p"] = float(2 * stats.t.sf(abs(term["t"]), 13))

    other_mixed_model(repository, rows)


@attack(8, "A17")
def z_for_t(repository: Repository) -> None:
    from scipy import stats

    def z(entry: Json) -> None:
        term = entry["details"]["terms"]["log10_pne2"]
        half = 1.959963984540054 * term["se_unadjusted"]
        term |= {"low": term["estimate"] - half, "high": term["estimate"] + half}
        term["p"] = float(2 * stats.norm.sf(abs(term["t"])))

    other_mixed_model(repository, z)


# 9 to 15: runs are dropped, repeated, added, exchanged.


@attack(9, "A07")
def seed_dropped_from_the_tables(repository: Repository) -> None:
    gone = run_of(repository, SMALL, 3)
    for path in (SCORES, EXPOSURE):
        rewrite(repository, path, lambda frame: frame[frame["run_id"] != gone])
    cover(repository, "analyse", "draw", "report")


@attack(9, "A07", "A14")
def seed_dropped_and_its_fate_with_it(repository: Repository) -> None:
    gone = run_of(repository, SMALL, 3)
    for path in (SCORES, EXPOSURE):
        rewrite(repository, path, lambda frame: frame[frame["run_id"] != gone])
    forge.rerun(repository, "analyse")
    rewrite(repository, layout.analysis(NAME, "fates"), lambda frame: frame[frame["run_id"] != gone])
    forge.rewrite_json(repository, RESULTS, lambda results: results["fates"].update(missing=0))
    cover(repository, "draw", "report")


@attack(10, "A13")
def seed_dropped_as_an_outlier(repository: Repository) -> None:
    from gradnoise.analysis.exclusions import excluded

    gone = run_of(repository, SMALL, 3)
    with replaced("gradnoise.analysis.gather.excluded", lambda *given: {gone: "X2", **excluded(*given)}):
        forge.rerun(repository, "analyse")
    cover(repository, "draw", "report")


@attack(11, "A13")
def exclusion_threshold_nudged(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["exclusions"][1].update(value=0.03))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(11, "A01")
def exclusion_by_the_outcome(repository: Repository) -> None:
    repository.edit(PLAN, 'id: X2, column: exposure, op: ">"', 'id: X2, column: icl, op: "<"')
    amend(repository)


def again(repository: Repository, cell: str, number: int, status: str = "finished") -> Json:
    """One more attempt at a training job, told by a copy of its first record."""
    record = forge.records(repository)[train_record(cell)]
    record |= {"id": train_record(cell, number), "attempt": number, "status": status}
    forge.write_record(repository, record)
    return record


@attack(12, "A06", "A07")
def run_repeated_with_another_seed(repository: Repository) -> None:
    record = again(repository, SMALL, 2)
    record["runs"][0]["seed"] += 1
    forge.write_record(repository, record)
    better_run(repository)
    cover(repository, *EVERYTHING, keep=[train_record(SMALL)])


@attack(13, "A07")
def same_seed_five_times(repository: Repository) -> None:
    for number in range(2, 6):
        again(repository, SMALL, number)
    better_run(repository)
    cover(repository, *EVERYTHING, keep=[train_record(SMALL, number) for number in range(1, 5)])


@attack(13, "A07")
def same_seed_five_times_and_four_records_gone(repository: Repository) -> None:
    again(repository, SMALL, 5)
    repository.file(f"{layout.attempts(NAME)}/{train_record(SMALL)}.json").unlink()
    better_run(repository)
    cover(repository, *EVERYTHING)


@attack(13, "A27", spot_runs=1)
def same_seed_five_times_and_nothing_told(repository: Repository) -> None:
    better_everywhere(repository)
    cover(repository, *EVERYTHING)


@attack(14, "A07")
def seed_added(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    name = {"id": "train-race-b016-lr0.0015-s05-05-0001", "name": "race/b016-lr0.0015/s05-05"}
    record |= name | {"outputs": []}
    with repository.inside():
        from gradnoise.registration.plan import load_plan
        from gradnoise.registration.seeds import derive_seeds, run_id

        key = load_plan(PLAN).key
        name, seed = run_id(key, "race", SMALL, 5), derive_seeds(key, 6)[5]
    record["runs"] = [{"run_id": name, "block": "race", "cell": SMALL, "seed_index": 5, "seed": seed}]
    record["settings"]["seeds"] = [5]
    forge.write_record(repository, record)
    like = run_of(repository, SMALL, 0)
    for path in (SCORES, EXPOSURE):
        rewrite(
            repository,
            path,
            lambda frame: pd.concat(
                [frame, frame[frame["run_id"] == like].assign(run_id=name, seed_index=5)], ignore_index=True
            ),
        )
    # The analysis refuses a run that is not planned, so the numbers stay; the run is there all the same.
    cover(repository)


def other_configuration(repository: Repository) -> None:
    """The runs of `warm`, which learns faster, stand in the place of those of the middle cell."""
    names = {run_of(repository, "warm", index): run_of(repository, MIDDLE, index) for index in range(5)}
    for table in layout.RUN_TABLES:
        source, target = (layout.run(NAME, "race", cell, CHUNK, table) for cell in ("warm", MIDDLE))
        shutil.copyfile(repository.file(source), repository.file(target))

        def moved(frame: pd.DataFrame) -> pd.DataFrame:
            frame = frame.assign(run_id=frame["run_id"].map(names))
            frame = frame.assign(cell=MIDDLE) if "cell" in frame else frame
            changed = {"learning_rate": 1.5e-3} if "learning_rate" in frame else {}
            return frame.assign(**changed)

        rewrite(repository, target, moved)


@attack(15, "A08")
def other_configuration_in_a_cell(repository: Repository) -> None:
    record = forge.records(repository)[train_record(MIDDLE)]
    record["settings"]["cell"]["learning_rate"] = 2e-3
    forge.write_record(repository, record)
    other_configuration(repository)
    cover(repository, *EVERYTHING)


@attack(15, "A27", spot_runs=7)
def other_configuration_and_nothing_told(repository: Repository) -> None:
    other_configuration(repository)
    cover(repository, *EVERYTHING)


# 16 to 20: files are changed.


def flipped(repository: Repository) -> None:
    """Change one byte of a table's data in place; size and time stay."""
    path = repository.file(layout.run(NAME, "race", SMALL, CHUNK, "scores"))
    before = path.stat()
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(pq.read_schema(path).get_field_index("value"))
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@attack(16, "A09")
def one_float_edited_in_place(repository: Repository) -> None:
    flipped(repository)


@attack(17, "A10", "A11")
def one_float_edited_and_committed(repository: Repository) -> None:
    flipped(repository)
    forge.seal(repository)
    repository.commit("Fix")


@attack(17, "A10", "A11")
def one_float_beyond_the_old_maximum(repository: Repository) -> None:
    path = layout.run(NAME, "race", SMALL, CHUNK, "scores")
    before = pq.read_metadata(repository.file(path)).row_group(0)
    place = pq.read_schema(repository.file(path)).get_field_index("stderr")
    old = before.column(place).statistics.max
    rewrite(
        repository,
        path,
        lambda frame: frame.assign(stderr=frame["stderr"].where(frame["stderr"] < old, 2 * old)),
    )
    content = repository.file(path).read_bytes()
    # The page has a right checksum; the footer still tells the old maximum.
    assert content.count(struct.pack("<d", 2 * old))
    repository.file(path).write_bytes(content.replace(struct.pack("<d", 2 * old), struct.pack("<d", old)))
    forge.rerun(repository, *EVERYTHING)
    forge.seal(repository)
    repository.commit("Fix")


@attack(17, "A27", spot_runs=1)
def one_float_edited_and_the_past_with_it(repository: Repository) -> None:
    for cell in ("slow", "warm", "hot", *CELLS):
        better_run(repository, cell, 2)
    path = layout.run(NAME, "text", SMALL, "s00-00", "scores")
    rewrite(repository, path, lambda frame: frame.assign(value=frame["value"] * 0.99))
    cover(repository, *EVERYTHING)


@attack(18, "A09")
def rows_in_another_order(repository: Repository) -> None:
    path = layout.run(NAME, "race", SMALL, CHUNK, "scores")
    rewrite(repository, path, lambda frame: frame.iloc[::-1])


@attack(19, "A11")
def rows_twice(repository: Repository) -> None:
    path = layout.run(NAME, "race", SMALL, CHUNK, "scores")
    rewrite(repository, path, lambda frame: pd.concat([frame, frame[:3]]))
    cover(repository)


@attack(19, "A11")
def score_dropped(repository: Repository) -> None:
    gone = run_of(repository, SMALL, 3)
    for path in (layout.run(NAME, "race", SMALL, CHUNK, "scores"), SCORES):
        rewrite(repository, path, lambda frame: frame[(frame["run_id"] != gone) | (frame["score"] != "iwl")])
    cover(repository)


@attack(19, "A11")
def null_for_a_bad_score(repository: Repository) -> None:
    gone = run_of(repository, SMALL, 3)

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        bad = (frame["run_id"] == gone) & (frame["score"] == "iwl") & (frame["branch"] == 1)
        return frame.assign(value=frame["value"].mask(bad), stderr=frame["stderr"].mask(bad))

    for path in (layout.run(NAME, "race", SMALL, CHUNK, "scores"), SCORES):
        rewrite(repository, path, change)
    cover(repository)


@attack(20, "A12")
def evaluation_data_swapped(repository: Repository) -> None:
    import hashlib

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        text = frame["text"].where(frame["split"] != "validation", frame["text"].str.lower())
        digests = [hashlib.sha256(each.encode()).hexdigest() for each in text]
        return frame.assign(text=text, sha256=digests)

    rewrite(repository, layout.plays(NAME), change)
    cover(repository)


@attack(20, "A12")
def pilot_swapped(repository: Repository) -> None:
    repository.edit(PILOT, "0.012", "0.003")
    amend(repository)


# 21 to 27: another analysis than the registered one.


@attack(21, "A16")
def loss_window_widened(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["sensitivity"][0].update(windows=[0.02, 0.2]))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(21, "A16")
def interpolation_turned_off(repository: Repository) -> None:
    import numpy as np

    def nearest(values: Any, target: float) -> Any:

        weights = original(values, target)
        return None if weights is None else np.where(weights == weights.max(), 1.0, 0.0)

    from gradnoise.analysis.matching import _weights as original

    with replaced("gradnoise.analysis.matching._weights", nearest):
        forge.rerun(repository, "analyse")
    cover(repository, "draw", "report")


@attack(21, "A16")
def reliability_bar_lowered(repository: Repository) -> None:
    results_changed(repository, lambda results: results["thresholds"].update(reliability=0.5))


@attack(22, "A16")
def covariate_removed(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][4].update(fixed=["log10_pne2"]))
    cover(repository, "draw", "report")


@attack(22, "A17")
def covariate_removed_but_not_told(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][4].update(fixed=["log10_pne2"]))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(23, "A16")
def random_slope_removed(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][1]["random"].update(seed=["1"]))
    cover(repository, "draw", "report")


@attack(23, "A17")
def random_slope_removed_but_not_told(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][1]["random"].update(seed=["1"]))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(24, "A15", "A16")
def outcomes_swapped(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][0].update(outcome="iwl"))
    cover(repository, "draw", "report")


@attack(24, "A17")
def outcomes_swapped_but_not_told(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][0].update(outcome="iwl"))
    disguise(repository)
    cover(repository, "draw", "report")


@attack(25, "A19")
def hypothesis_left_out_of_the_family(repository: Repository) -> None:
    from gradnoise.analysis.statistics.families import holm

    def change(results: Json) -> None:
        family = results["families"][0]
        left = [member for member in family["members"] if member["hypothesis"] != "H2"]
        for member, p in zip(left, holm([member["p"] for member in left]), strict=True):
            member["p_adjusted"] = p
        adjusted = {member["hypothesis"]: member["p_adjusted"] for member in family["members"]}
        for hypothesis in results["hypotheses"]:
            hypothesis["p_adjusted"] = adjusted[hypothesis["id"]]

    results_changed(repository, change)


@attack(25, "A19")
def missing_p_shrinks_the_family(repository: Repository) -> None:
    from gradnoise.analysis.statistics.families import holm

    def change(results: Json) -> None:
        members = results["families"][0]["members"]
        members[1] |= {"p": None, "p_adjusted": None}
        results["hypotheses"][1] |= {"p": None, "p_adjusted": None}
        left = [members[0], *members[2:]]
        for member, p in zip(left, holm([member["p"] for member in left]), strict=True):
            member["p_adjusted"] = p
            next(h for h in results["hypotheses"] if h["id"] == member["hypothesis"])["p_adjusted"] = p

    results_changed(repository, change)


@attack(26, "A18")
def smaller_p_of_two(repository: Repository) -> None:
    from gradnoise.analysis.verdicts import read_hypotheses
    from gradnoise.registration.plan import load_plan

    def change(results: Json) -> None:
        entry = test_of(results, "icl-batch")
        entry["p"] = min(entry["details"]["p_low"], entry["details"]["p_high"])
        families, hypotheses = read_hypotheses(load_plan(PLAN), results["tests"])
        labels = [entry["label"] for entry in results["hypotheses"]]
        results["families"] = families
        results["hypotheses"] = [h | {"label": label} for h, label in zip(hypotheses, labels, strict=True)]

    with repository.inside():
        results_changed(repository, change)


@attack(26, "A18")
def interval_of_another_level(repository: Repository) -> None:
    from scipy import stats

    def change(results: Json) -> None:
        entry = test_of(results, "icl-batch")
        half = stats.t.ppf(0.975, entry["df"]) * entry["stderr"]
        entry |= {"low": entry["estimate"] - half, "high": entry["estimate"] + half}

    results_changed(repository, change)


@attack(27, "A16")
def correlation_of_rows(repository: Repository) -> None:
    from gradnoise.analysis.statistics.correlation import spearman_intervals

    def change(results: Json) -> None:
        entry = next(entry for entry in results["exploratory"] if entry["kind"] == "correlation")
        # Each run's four tasks as if they were four runs.
        pooled, runs = entry["details"]["pooled"], 4 * entry["runs"]
        low, high = next(iter(spearman_intervals(pooled["estimate"], runs).values()))
        entry["runs"] = runs
        pooled |= {"low": low, "high": high}

    results_changed(repository, change)


# 28 to 30: what people see.


@attack(28, "A24")
def figure_swapped(repository: Repository) -> None:
    other = layout.figure(NAME, "figure-12-flow", "svg")
    shutil.copyfile(repository.file(other), repository.file(FIGURE))
    cover(repository, "report")


@attack(28, "A24")
def axis_cut(repository: Repository) -> None:
    from gradnoise.figures.figure_01_exposure import plot

    def cut(*given: Any) -> Any:
        figure = plot(*given)
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(low + (high - low) / 2, high)
        return figure

    with replaced("gradnoise.figures.figure_01_exposure.plot", cut):
        forge.rerun(repository, "draw")
    changed = repository.git("status", "--porcelain")
    assert FIGURE in changed, "no axis was cut"
    cover(repository, "report")


@attack(28, "A24")
def points_removed(repository: Repository) -> None:
    path = layout.analysis(NAME, "matched")
    original = repository.file(path).read_bytes()
    gone = run_of(repository, SMALL, 3)
    rewrite(repository, path, lambda frame: frame[frame["run_id"] != gone])
    forge.rerun(repository, "draw")
    repository.file(path).write_bytes(original)
    cover(repository, "report")


def page_edited(repository: Repository, old: str, new: str) -> None:
    repository.edit(REPORT, old, new)
    cover(repository)


@attack(29, "A22", "A23")
def number_typed_by_hand(repository: Repository) -> None:
    page_edited(repository, "</h1>", "</h1><p>In 97.31 percent of all cases.</p>")


@attack(29, "A22")
def p_rounded_down(repository: Repository) -> None:
    results: Any = read_json(repository.file(RESULTS))
    from gradnoise.base import wording

    p = wording.p_value(test_of(results, "iwl-slope")["p"], 0.05)
    page_edited(repository, p, "0.049")


@attack(30, "A15")
def exploratory_called_confirmatory(repository: Repository) -> None:
    results_changed(repository, lambda results: results["sensitivity"][0].update(label="CONFIRMATORY"))


@attack(30, "A22")
def verdict_word_in_prose(repository: Repository) -> None:
    page_edited(repository, "</h1>", "</h1><p>This confirms our hypothesis.</p>")


# 31 to 37: deviations, draws, looks, code, pilot.


def log_without_the_entry(repository: Repository) -> None:
    repository.file(LOG).unlink()


@attack(31, "A25")
def deviation_deleted(repository: Repository) -> None:
    log_without_the_entry(repository)
    forge.rerun(repository, "analyse", "draw", "report")
    forge.seal(repository)
    repository.commit("Tidy up")


@attack(31, "A25")
def deviation_omitted(repository: Repository) -> None:
    analyse_under(repository, lambda plan: plan["tests"][3].update(alternative="less"))
    cover(repository, "draw", "report")


@attack(31, "A25")
def deviation_dated_before_the_outcome(repository: Repository) -> None:
    with repository.inside():
        entries = [json.loads(line) for line in Path(LOG).read_bytes().splitlines()]
        # Logged now, told as if it had been logged with the first one.
        entries.append(entries[0] | {"pointer": "/tests/7/high", "registered": 0.05, "actual": 0.08})
        entries[1] |= {"tests": ["icl-batch"], "beside": "tests.icl-batch"}
        forge.write_log(entries)
    forge.rerun(repository, "analyse", "draw", "report")
    forge.seal(repository)
    repository.commit("Deviation")


@attack(31, "A25")
def deviation_reworded(repository: Repository) -> None:
    with repository.inside():
        entries = [json.loads(line) for line in Path(LOG).read_bytes().splitlines()]
        entries[0]["effect"] = "None at all."
        forge.write_log(entries)
    forge.rerun(repository, "analyse", "draw", "report")
    forge.seal(repository)
    repository.commit("Wording")


@attack(32, "A21")
def other_draws_of_the_bootstrap(repository: Repository) -> None:
    from gradnoise.analysis.decisions import permutation_seed

    with (
        replaced("gradnoise.analysis.beside.permutation_seed", lambda *it: permutation_seed(*it) + 1),
        replaced("gradnoise.analysis.decisions.permutation_seed", lambda *it: permutation_seed(*it) + 1),
    ):
        forge.rerun(repository, "analyse")
    before: Any = json.loads(repository.git("show", f"HEAD:{RESULTS}"))

    def told(results: Json) -> None:
        for section in ("tests", "sensitivity", "exploratory"):
            for entry, old in zip(results[section], before[section], strict=True):
                if "seed" in old["details"]:
                    entry["details"]["seed"] = old["details"]["seed"]

    results_changed(repository, told)


@attack(33, "A07")
def stopped_after_a_look(repository: Repository) -> None:
    for record in forge.records(repository).values():
        if record["phase"] == "train" and record["runs"][0]["block"] == "race":
            record["runs"] = record["runs"][:3]
            forge.write_record(repository, record)
    for job in ("slow", "warm", "hot", *CELLS):
        late = {run_of(repository, job, index) for index in (3, 4)}
        for table in layout.RUN_TABLES:
            path = layout.run(NAME, "race", job, CHUNK, table)
            rewrite(repository, path, lambda frame, late=late: frame[~frame["run_id"].isin(late)])
    cover(repository, *EVERYTHING)


@attack(34, "A14")
def unmatched_runs_hidden(repository: Repository) -> None:
    for table in ("fates", "flow"):
        rewrite(repository, layout.analysis(NAME, table), lambda frame: frame[frame["cell"] != "slow"])

    def change(results: Json) -> None:
        results["missing"] = [entry for entry in results["missing"] if entry["cell"] != "slow"]
        results["fates"]["unmatched"] -= 5
        for stage in ("planned", "started", "finished"):
            results["flow"][stage] -= 5

    results_changed(repository, change)


@attack(35, "A05")
def analysis_code_edited_afterwards(repository: Repository) -> None:
    path = "src/gradnoise/analysis/statistics/families.py"
    repository.file(path).write_text(repository.file(path).read_text() + "\n# tidied\n")
    amend(repository)


@attack(35, "A05", "A17")
def edited_analysis_code_used(repository: Repository) -> None:
    path = "src/gradnoise/analysis/statistics/student.py"
    repository.file(path).write_text(repository.file(path).read_text() + "\n# p halved\n")
    for record in forge.records(repository).values():
        if path in record["code"]["files"]:
            record["code"]["files"][path] = sha256(repository.file(path))
            from gradnoise.base.files import sha256_of

            record["code"]["sha256"] = sha256_of(record["code"]["files"])
            forge.write_record(repository, record)

    def halved(results: Json) -> None:
        test_of(results, "icl-slope-updates")["p"] /= 2

    results_changed(repository, halved)


@attack(36, "A05")
def audit_code_edited(repository: Repository) -> None:
    repository.edit("src/gradnoise/provenance/audit/trees.py", "1e-6", "1e+6")
    amend(repository)


@attack(37, "A06")
def pilot_runs_used(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    for run in record["runs"]:
        run["seed"] = 1000 + run["seed_index"]
    forge.write_record(repository, record)
    better_run(repository)
    cover(repository, *EVERYTHING)


# 38 to 40: links, two versions of the truth, a history cut short.


@attack(38, "A09")
def table_is_a_link(repository: Repository) -> None:
    path = repository.file(SCORES)
    outside = repository.path.parent / f"{repository.path.name}-scores.parquet"
    shutil.move(path, outside)
    path.symlink_to(outside)


@attack(38, "A09")
def folder_is_a_link(repository: Repository) -> None:
    path = repository.file(f"results/{NAME}/scores")
    outside = repository.path.parent / f"{repository.path.name}-scores"
    shutil.move(path, outside)
    path.symlink_to(outside)


@attack(38, "A09")
def table_is_a_pointer(repository: Repository) -> None:
    path = repository.file(layout.exposure_parts(NAME))
    about = f"oid sha256:{sha256(path)}\nsize {path.stat().st_size}\n"
    pointer = f"version https://git-lfs.github.com/spec/v1\n{about}"
    path.write_text(pointer)


@attack(38, "A09")
def store_serves_another_table(repository: Repository) -> None:
    # As after `dvc pull` from a remote that was exchanged: dvc.lock stays, the files do not.
    better_run(repository)
    forge.rerun(repository, *EVERYTHING)
    lock = repository.file("dvc.lock").read_bytes()
    forge.seal(repository)
    repository.file("dvc.lock").write_bytes(lock)
    amend(repository)


@attack(38, "A09")
def path_out_of_the_repository(repository: Repository) -> None:
    outside = repository.path.parent / f"{repository.path.name}.parquet"
    shutil.copyfile(repository.file(SCORES), outside)

    def change(manifest: Json) -> None:
        entry = next(entry for entry in manifest["files"] if entry["path"] == SCORES)
        entry["path"] = f"results/{NAME}/../../../{outside.name}"

    forge.rewrite_json(repository, MANIFEST, change)
    with repository.inside():
        forge.seal_dvc()
    amend(repository)


@attack(39, "A15", "A22")
def report_of_other_results(repository: Repository) -> None:
    honest = repository.file(RESULTS).read_bytes()
    other = repository.file(RESULTS).with_name("results-final.json")

    def change(results: Json) -> None:
        results["hypotheses"][0] |= {"outcome": "corroborated"}

    forge.rewrite_json(repository, RESULTS, change)
    forge.rerun(repository, "report")
    told = repository.file(RESULTS).read_bytes()
    repository.file(RESULTS).write_bytes(honest)
    cover(repository)
    other.write_bytes(told)
    amend(repository)


def shallow(repository: Repository, depth: int) -> None:
    """Cut the history as `git clone --depth` does."""
    cut = repository.git("rev-parse", f"HEAD~{depth - 1}")
    repository.file(".git/shallow").write_text(f"{cut}\n")


@attack(4, "A04")
def object_replaced(repository: Repository) -> None:
    # Nothing depends on the commit that is passed over; another one could be.
    repository.git("replace", "--graft", "HEAD", "HEAD~2")


@attack(40, "A04")
def shallow_clone(repository: Repository) -> None:
    shallow(repository, 1)


@attack(40, "A04")
def history_deleted(repository: Repository) -> None:
    repository.git("checkout", "--quiet", "--orphan", "fresh")
    repository.commit("Everything")
    repository.git("branch", "--quiet", "--delete", "--force", "main")
    repository.git("branch", "--move", "main")


# 41 and on: of our own invention.


@attack(41, "A27", "A28", spot_runs=1)
def registered_anew_with_a_wider_margin(repository: Repository) -> None:
    # History, names and seeds in the records follow from the new plan; only the training does not.
    forge.rewrite_history(repository, plan=lambda plan: plan["tests"][7].update(low=-0.08, high=0.08))


@attack(42, "A07")
def worse_attempts_emptied(repository: Repository) -> None:
    # A record of no bytes reads as an attempt that was killed before it could say anything.
    for number in (2, 3, 4, 5):
        again(repository, SMALL, number)
    for number in (1, 2, 3, 4):
        repository.file(f"{layout.attempts(NAME)}/{train_record(SMALL, number)}.json").write_bytes(b"")
    better_run(repository)
    cover(repository, *EVERYTHING)


@attack(43, "A07")
def worse_attempt_called_failed(repository: Repository) -> None:
    # It ran to its end and wrote its tables; only the word is another one.
    again(repository, SMALL, 2)
    worse = forge.records(repository)[train_record(SMALL)]
    forge.write_record(repository, worse | {"status": "failed"})
    better_run(repository)
    cover(repository, *EVERYTHING, keep=[train_record(SMALL)])


@attack(43, "A07")
def worse_attempt_called_killed(repository: Repository) -> None:
    again(repository, SMALL, 2)
    worse = forge.records(repository)[train_record(SMALL)]
    forge.write_record(repository, worse | {"status": "started"})
    better_run(repository)
    cover(repository, *EVERYTHING, keep=[train_record(SMALL)])


def with_metadata(repository: Repository, path: str, key: bytes, value: bytes) -> None:
    """Change what a Parquet file says of itself, not its rows."""
    import pyarrow as pa

    table: pa.Table = pq.read_table(repository.file(path))
    table = table.replace_schema_metadata({**table.schema.metadata, key: value})
    pq.write_table(table, repository.file(path), write_page_checksum=True, compression="zstd")


@attack(44, "A11")
def label_of_a_table_changed(repository: Repository) -> None:
    with_metadata(repository, layout.exposure_parts(NAME), b"label", b"REHEARSAL")
    cover(repository)


@attack(45, "A15")
def results_with_a_key_twice(repository: Repository) -> None:
    # Readers that keep the last value see the honest one, readers of the text the other.
    text = repository.file(RESULTS).read_text()
    repository.file(RESULTS).write_text(text.replace("{", '{\n  "label": "CONFIRMED",', 1))
    cover(repository)


@attack(46, "A15")
def results_with_nan(repository: Repository) -> None:
    text = repository.file(RESULTS).read_text()
    assert '"sd": null' in text
    repository.file(RESULTS).write_text(text.replace('"sd": null', '"sd": NaN', 1))
    forge.seal(repository)
    amend(repository)


@attack(47, "A11")
def column_added(repository: Repository) -> None:
    import pyarrow as pa

    path = repository.file(layout.exposure_parts(NAME))
    table = pq.read_table(path)
    pq.write_table(table.append_column("note", pa.array(["x"] * len(table))), path, write_page_checksum=True)
    cover(repository)


@attack(48, "A09")
def hidden_file(repository: Repository) -> None:
    repository.file(f"results/{NAME}/runs/.better.parquet").write_bytes(b"x")
    with repository.inside():
        forge.seal_dvc()
    amend(repository)


@attack(48, "A09")
def file_called_gitignore(repository: Repository) -> None:
    shutil.copyfile(repository.file(SCORES), repository.file(f"results/{NAME}/runs/race/.gitignore"))
    with repository.inside():
        forge.seal_dvc()
    amend(repository)


@attack(49, "A02")
def locked_runs_edited(repository: Repository) -> None:
    forge.rewrite_history(repository, lock=lambda lock: lock["runs"][0].update(seed=1))


@attack(49, "A02")
def lock_of_other_bytes(repository: Repository) -> None:
    forge.rewrite_history(repository, lock=lambda lock: lock["plan"].update(sha256="0" * 64))


@attack(50, "A15")
def look_alike_key(repository: Repository) -> None:
    # A Cyrillic letter: for a reader there are two sections of tests, for a program one.
    results_changed(repository, lambda results: results.update({"t\u0435sts": results["tests"]}))


@attack(51, "A15")
def look_alike_label(repository: Repository) -> None:
    results_changed(repository, lambda results: results["exploratory"][0].update(label="\u0421ONFIRMATORY"))


@attack(52, "A25")
def log_cut_at_its_end(repository: Repository) -> None:
    with repository.inside():
        entries = [json.loads(line) for line in Path(LOG).read_bytes().splitlines()]
        entries.append(entries[0] | {"pointer": "/tests/4/description", "registered": "", "actual": "x"})
        forge.write_log(entries)
    repository.commit("Deviation")
    repository.git("checkout", "--quiet", "HEAD~1", "--", LOG)
    repository.commit("Tidy up")


@attack(53, "A24")
def caption_edited(repository: Repository) -> None:
    notes = pq.read_schema(repository.file(FIGURE_DATA)).metadata
    with_metadata(repository, FIGURE_DATA, b"caption", notes[b"caption"].replace(b".", b", as predicted.", 1))
    cover(repository, "report")


@attack(54, "A22")
def white_on_white(repository: Repository) -> None:
    page_edited(repository, "</h1>", '</h1><p style="color:white">The margin was chosen afterwards.</p>')


@attack(54, "A22")
def another_page_by_script(repository: Repository) -> None:
    page_edited(repository, "</body>", "<script>document.body.textContent = 'corroborated'</script></body>")


@attack(55, "A27", spot_runs=2)
def arms_exchanged(repository: Repository) -> None:
    for first, second in ((SMALL, LARGE), (MIDDLE, "warm"), ("slow", "hot")):
        exchange(repository, [layout.run(NAME, "race", cell, CHUNK, "scores") for cell in (first, second)])
    cover(repository, *EVERYTHING)


def exchange(repository: Repository, paths: list[str]) -> None:
    """Exchange the ICL of the runs of two jobs."""
    values = []
    for path in paths:
        frame = pq.read_table(repository.file(path)).to_pandas()
        values.append(frame[frame["score"] == "icl"].set_index(["seed_index", "branch"])["value"])

    def exchanged(frame: pd.DataFrame, other: pd.Series) -> pd.DataFrame:
        at = pd.MultiIndex.from_frame(frame[["seed_index", "branch"]])
        new = pd.Series(other.reindex(at).to_numpy(), index=frame.index)
        return frame.assign(value=frame["value"].where(frame["score"] != "icl", new))

    for path, other in zip(paths, reversed(values), strict=True):
        rewrite(repository, path, lambda frame, other=other: exchanged(frame, other))


@attack(56, "A13")
def parts_of_exposure_edited(repository: Repository) -> None:
    path = layout.exposure_parts(NAME)
    rewrite(repository, path, lambda frame: frame.assign(value=frame["value"] * 2))
    cover(repository)


@attack(57, "A13")
def exposure_edited(repository: Repository) -> None:
    rewrite(repository, EXPOSURE, lambda frame: frame.assign(value=frame["value"] * 1.5))
    cover(repository, "analyse", "draw", "report")


@attack(57, "A13")
def unit_of_exposure_edited(repository: Repository) -> None:
    rewrite(repository, EXPOSURE, lambda frame: frame.assign(unit="furlong"))
    cover(repository, "analyse", "draw", "report")


@attack(58, "A13", "A14")
def exclusion_forged(repository: Repository) -> None:
    name = run_of(repository, "warm", 1)

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        where = frame["run_id"] == name
        return frame.assign(fate=frame["fate"].mask(where, "excluded"), rule=frame["rule"].mask(where, "X1"))

    rewrite(repository, layout.analysis(NAME, "fates"), change)
    cover(repository)


@attack(59, "A15")
def unknown_section(repository: Repository) -> None:
    results_changed(repository, lambda results: results.update(conclusion="All hypotheses hold."))


@attack(60, "A09")
def file_beside_the_study(repository: Repository) -> None:
    repository.file("results/summary.md").write_text("All hypotheses hold.\n")
    repository.git("add", "--force", "results/summary.md")
    amend(repository)


@attack(61, "A09")
def second_out_for_a_path(repository: Repository) -> None:
    text = repository.file("dvc.lock").read_text()
    out = "    - path: {path}\n      hash: md5\n      md5: {md5}\n      size: 1\n"
    stage = f"\n  elsewhere:\n    cmd: x\n    outs:\n{out}"
    repository.file("dvc.lock").write_text(text + stage.format(path=SCORES, md5="0" * 32).lstrip("\n"))
    amend(repository)


@attack(62, "A29")
def other_packages_pinned(repository: Repository) -> None:
    repository.edit("requirements.lock", "pingouin==0.7.0", "pingouin==0.7.1")
    for record in forge.records(repository).values():
        record["environment"]["lock_sha256"] = sha256(repository.file("requirements.lock"))
        if "pingouin" in record["pins"]:
            record["pins"]["pingouin"] = "0.7.1"
        forge.write_record(repository, record)
    cover(repository)


@attack(63, "A29")
def ran_with_other_packages(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    record["environment"]["packages"]["torch"] = "1.0.0"
    forge.write_record(repository, record)
    cover(repository)


@attack(64, "A04")
def attempt_older_than_the_lock(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    record |= {"start": "2020-01-01T00:00:00.000+00:00", "end": "2020-01-01T00:01:00.000+00:00"}
    forge.write_record(repository, record)
    cover(repository)


@attack(64, "A08")
def attempt_without_a_commit(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    forge.write_record(repository, record | {"commit": None})
    cover(repository)


@attack(65, "A06")
def seed_of_a_record_edited(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    record["runs"][0]["seed"] += 1
    forge.write_record(repository, record)
    cover(repository)


@attack(66, "A08")
def ran_in_a_dirty_tree(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    record["commit"]["dirty"] = True
    forge.write_record(repository, record)
    cover(repository)


@attack(66, "A08")
def ran_under_another_lock(repository: Repository) -> None:
    record = forge.records(repository)[train_record(SMALL)]
    record["lock"]["sha256"] = "0" * 64
    forge.write_record(repository, record)
    cover(repository)


@attack(66, "A08")
def measured_under_no_lock(repository: Repository) -> None:
    # The noise log still tells the learning rate at which it was measured.
    path = layout.run(NAME, "race", SMALL, CHUNK, "noise_events")
    rewrite(repository, path, lambda frame: frame.assign(learning_rate=frame["learning_rate"] * 2))
    cover(repository)


@attack(67, "A10")
def table_packed_anew(repository: Repository) -> None:
    path = repository.file(layout.exposure_parts(NAME))
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="snappy")
    forge.seal(repository)
    repository.commit("Smaller files")


@attack(68, "A17")
def mean_of_a_cell_edited(repository: Repository) -> None:
    results_changed(repository, lambda results: results["cells"][0].update(mean=0.5))


@attack(69, "A20")
def verdict_edited(repository: Repository) -> None:
    results_changed(repository, lambda results: results["hypotheses"][1].update(outcome="corroborated"))


@attack(70, "A21")
def band_edited(repository: Repository) -> None:
    def change(results: Json) -> None:
        results["sensitivity"][0]["p"] = 0.01

    results_changed(repository, change)


@attack(71, "A26")
def rates_of_the_dry_run_edited(repository: Repository) -> None:
    forge.rewrite_history(
        repository, lock=lambda lock: lock["dry_run"]["rates"][0].update(rate=0.0, stderr=0.0)
    )


@attack(71, "A26")
def verdicts_of_the_dry_run_edited(repository: Repository) -> None:
    def change(lock: Json) -> None:
        stored = lock["dry_run"]["verdicts"]["rise"]["H1"]
        told = stored.translate(str.maketrans("mnu", "umm"))
        lock["dry_run"]["verdicts"]["rise"]["H1"] = told
        for rate in lock["dry_run"]["rates"]:
            if (rate["truth"], rate["hypothesis"]) == ("rise", "H1"):
                share = told.count({"met": "m", "not_met": "n"}[rate["verdict"]]) / len(told)
                rate |= {"rate": share, "stderr": (share * (1 - share) / len(told)) ** 0.5}

    forge.rewrite_history(repository, lock=change)


@attack(72, "A28", spot_runs=1)
def losses_edited(repository: Repository) -> None:
    for cell in ("slow", "warm", "hot", *CELLS):
        path = layout.run(NAME, "race", cell, CHUNK, "trajectory")
        rewrite(repository, path, lambda frame: frame.assign(loss_hash=frame["loss_hash"].str[::-1]))
    path = layout.run(NAME, "text", SMALL, "s00-00", "trajectory")
    rewrite(repository, path, lambda frame: frame.assign(loss_hash=frame["loss_hash"].str[::-1]))
    cover(repository)


@attack(73, "A30")
def time_stamp_of_nobody(repository: Repository) -> None:
    repository.file("preregistration/plan.lock.tsr").write_bytes(b"trust me")
    amend(repository)


@attack(74, "A12")
def data_not_locked(repository: Repository) -> None:
    forge.rewrite_history(repository, lock=lambda lock: lock.update(data={}))


@attack(75, "A05")
def code_not_locked(repository: Repository) -> None:
    def change(lock: Json) -> None:
        del lock["code"]["audit"]["src/gradnoise/provenance/audit/trees.py"]

    forge.rewrite_history(repository, lock=change)


@attack(77, "A08")
def schedule_of_a_run_edited(repository: Repository) -> None:
    # The runs of the small batch are said to have seen more sequences than they did.
    path = layout.run(NAME, "race", SMALL, CHUNK, "scores")
    rewrite(repository, path, lambda frame: frame.assign(updates=frame["updates"] + 4))
    cover(repository, *EVERYTHING)


@attack(78, "A05")
def template_of_the_report_edited(repository: Repository) -> None:
    repository.edit("src/gradnoise/report/report.html.j2", "</h1>", "</h1><p>All hypotheses hold.</p>")
    amend(repository)


@attack(79, "A01")
def settings_with_a_key_twice(repository: Repository) -> None:
    repository.edit(CONFIG, "seeds: 5", "seeds: 5\n    seeds: 6")
    amend(repository)


def called_diverged(repository: Repository, cells: tuple[str, ...], *, nulls: bool) -> None:
    """Let runs that are not wanted drop out of every comparison."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        where = frame["seed_index"] == 3
        frame = frame.assign(status=frame["status"].mask(where, "diverged"))
        if not nulls:
            return frame
        return frame.assign(value=frame["value"].mask(where), stderr=frame["stderr"].mask(where))

    for cell in cells:
        rewrite(repository, layout.run(NAME, "race", cell, CHUNK, "scores"), change)
    cover(repository, *EVERYTHING)


@attack(80, "A11")
def finished_run_called_diverged(repository: Repository) -> None:
    called_diverged(repository, (SMALL,), nulls=False)


@attack(80, "A27", spot_runs=2)
def finished_run_called_diverged_and_its_scores_gone(repository: Repository) -> None:
    called_diverged(repository, ("slow", "warm", "hot", *CELLS), nulls=True)
