"""Attempt records: complete, append-only, one file an attempt, and honest about what did not end well."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from gradnoise.base.closure import closure_sha256
from gradnoise.base.environment import pins
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256
from gradnoise.base.tables import FLOW, write_table
from gradnoise.provenance.records import Decided, Job, attempt, read_records

ATTEMPTS = Path("results/fake/provenance/attempts")
Maker = Callable[..., Job]
Performer = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("repository")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_finished_attempt_says_what_went_in_what_ran_and_what_came_out(make_job: Maker) -> None:
    table = "results/fake/analysis/flow.parquet"
    job = make_job(name="race/b016/s00-00", inputs=("config/fake.yaml",), outputs=(table,))
    with attempt(job) as path:
        started = read(path)
        columns = {"block": ["race"] * 2, "cell": ["b"] * 2, "stage": ["planned", "started"], "runs": [5, 5]}
        write_table(table, FLOW, columns, "REHEARSAL")
    record = read(path)
    assert path == ATTEMPTS / "train-race-b016-s00-00-0001.json"
    assert started["status"] == "started"
    assert started["outputs"] == []
    assert record["status"] == "finished"
    assert record["inputs"][0]["sha256"] == sha256("config/fake.yaml")
    output = {"path": table, "sha256": sha256(table), "size": os.path.getsize(table), "rows": 2}
    assert record["outputs"] == [output]
    assert record["settings"] == {"width": 8}
    run = {"run_id": "r0", "block": "race", "cell": "b016", "seed_index": 0, "seed": 100}
    assert record["runs"] == [run]
    assert record["pins"] == pins(("torch", "pyarrow"))
    assert record["code"]["files"]["src/gradnoise/base/layout.py"] == sha256("src/gradnoise/base/layout.py")
    assert record["environment"]["lock_sha256"] == sha256("requirements.lock")
    assert record["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["code"]["sha256"] == closure_sha256("gradnoise.base.layout")
    assert "pandas" in record["environment"]["packages"]
    assert record["start"] <= record["end"]
    assert record["start"].endswith("+00:00")
    assert record["cpu_seconds"] >= 0
    assert record["peak_memory_bytes"] > 1e6
    assert {k: v for k, v in record.items() if k in ("code", "environment", "start", "commit")} == {
        k: started[k] for k in ("code", "environment", "start", "commit")
    }


class Torch:
    """What a record asks of torch, on a machine with a GPU."""

    class backends:
        class cpu:
            get_cpu_capability = staticmethod(lambda: "AVX512")

    class cuda:
        is_available = staticmethod(lambda: True)
        get_device_name = staticmethod(lambda: "Fast GPU")


@pytest.mark.parametrize(
    ("torch", "device", "expected"),
    [
        (None, "cpu", (None, None)),
        (Torch, "cpu", ("AVX512", None)),
        (Torch, "cuda", ("AVX512", "Fast GPU")),
    ],
)
def test_the_kind_of_machine_is_recorded(
    torch: object, device: str, expected: tuple, make_job: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    with attempt(make_job(outputs=(), decided=Decided({"device": device}, (), {}))) as path:
        pass
    environment = read(path)["environment"]
    assert (environment["cpu_capability"], environment["gpu"]) == expected
    assert environment["processor"], "no model of the processor"


def test_a_comment_in_the_plan_does_not_change_its_hash(perform: Performer) -> None:
    first = read(perform())
    Path("preregistration/plan.yaml").write_text("# the same\nfirst_seed:   100\n")
    second = read(perform())
    Path("preregistration/plan.yaml").write_text("first_seed: 200\n")
    assert first["plan"] == second["plan"] != read(perform())["plan"]


@pytest.mark.parametrize(
    ("pinned", "said"),
    [
        ({"pandas": "0.0.1"}, rf"^pandas: {version('pandas')} installed: the study needs 0.0.1: "),
        ({"no-such-package": "1.0"}, "^no-such-package: not installed: the study needs 1.0: "),
    ],
)
def test_another_version_than_the_pinned_one_does_no_work(
    pinned: dict[str, str], said: str, make_job: Maker
) -> None:
    job = make_job(decided=Decided(settings={}, runs=(), pins=pinned))
    with pytest.raises(InputError, match=said), attempt(job):
        raise AssertionError("the work was begun")
    assert not ATTEMPTS.exists()


def test_builds_of_the_pinned_version_are_that_version(
    make_job: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradnoise.base.environment.version", lambda name: "2.13.0+cpu")
    with attempt(make_job(outputs=(), decided=Decided({}, (), {"torch": "2.13.0"}))) as path:
        pass
    assert read(path)["status"] == "finished"


def test_attempts_are_append_only(perform: Performer) -> None:
    first = perform()
    before = first.read_bytes()
    second, other = perform(), perform(name="race/b064/s00-04")
    assert [path.name[-9:] for path in (second, other)] == ["0002.json", "0001.json"]
    assert first.read_bytes() == before
    assert len(list(ATTEMPTS.iterdir())) == 3


def test_a_deleted_record_does_not_free_the_numbers_below_the_newest(perform: Performer) -> None:
    perform().unlink()
    assert perform().name.endswith("0001.json")
    perform()
    (ATTEMPTS / "train-race-b016-s00-04-0001.json").unlink()
    assert perform().name.endswith("0003.json")


def test_jobs_that_start_together_never_share_a_record(make_job: Maker) -> None:
    def run(number: int) -> str:
        decided = Decided(settings={"number": number}, runs=(), pins={})
        with attempt(make_job(outputs=(), decided=decided)) as path:
            return path.name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(run, range(24)))
    assert sorted(names) == [f"train-race-b016-s00-04-{number:04d}.json" for number in range(1, 25)]
    records = read_records("fake")
    assert sorted(str(record.settings["number"]) for record in records) == sorted(map(str, range(24)))
    assert {record.status for record in records} == {"finished"}


def test_a_failure_is_recorded_in_one_line(make_job: Maker) -> None:
    def fail() -> None:
        with attempt(make_job()):
            raise RuntimeError("loss is\n  not finite")

    with pytest.raises(RuntimeError):
        fail()
    (record,) = read_records("fake")
    assert (record.status, record.error) == ("failed", "RuntimeError: loss is not finite")
    assert record.end is not None
    assert record.outputs == ()


def test_a_job_that_forgets_an_output_has_failed(make_job: Maker) -> None:
    with pytest.raises(InputError, match=r"s00-04.scores.txt: missing"), attempt(make_job()):
        pass
    assert [record.status for record in read_records("fake")] == ["failed"]


def test_a_missing_input_is_named_before_anything_is_recorded(make_job: Maker) -> None:
    with (
        pytest.raises(InputError, match=r"^data/none.txt: missing"),
        attempt(make_job(inputs=("data/none.txt",))),
    ):
        pass
    assert not ATTEMPTS.exists()


def test_a_killed_job_leaves_the_record_of_its_start(make_job: Maker) -> None:
    script = (
        "import sys, time\n"
        "from gradnoise.provenance.records import Decided, Job, Run, attempt\n"
        f"with attempt({make_job()!r}):\n"
        "    print('running', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGKILL)
    (record,) = read_records("fake")
    assert (record.status, record.end, record.outputs) == ("started", None, ())


def test_a_job_killed_between_reserving_and_writing_accounts_for_nothing(perform: Performer) -> None:
    ATTEMPTS.mkdir(parents=True)
    (ATTEMPTS / "train-race-b016-s00-04-0001.json").touch()
    assert perform().name.endswith("0002.json")
    assert [record.attempt for record in read_records("fake")] == [2]


@pytest.mark.parametrize("text", ['{"id": ', "{}", '{"format": 2}'])
def test_a_damaged_record_is_named(perform: Performer, text: str) -> None:
    path = perform()
    path.write_text(text)
    with pytest.raises(InputError, match=path.name):
        read_records("fake")


def test_a_copied_record_is_named(perform: Performer) -> None:
    path = perform()
    (ATTEMPTS / "train-race-b016-s00-04-0002.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"0002.json: is the record train-race-b016-s00-04-0001"):
        read_records("fake")


def test_a_full_disk_is_one_line_and_leaves_no_half_record(make_job: Maker) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # writing past it fails as on a full disk
    try:
        with pytest.raises(InputError, match="no space left: free some disk space"), attempt(make_job()):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(ATTEMPTS.iterdir()) == []


def test_the_commit_is_recorded_and_dirty_means_anything_but_results(perform: Performer) -> None:
    assert read(perform())["commit"] is None
    git("init", "-q")
    assert read(perform())["commit"] is None  # no commit yet
    git("add", "-A")
    git("commit", "-qm", "all")
    head = git("rev-parse", "HEAD")
    Path("results/fake/figure.svg").write_text("new")
    assert read(perform())["commit"] == {"sha": head, "dirty": False}
    with Path("requirements.lock").open("a") as handle:
        handle.write("# another\n")
    assert read(perform())["commit"] == {"sha": head, "dirty": True}


def test_a_repository_around_this_one_is_not_taken_for_it(
    perform: Performer, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.parent)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    monkeypatch.chdir(repository)
    assert read(perform())["commit"] is None


def test_recording_without_git_works(perform: Performer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read(perform())["commit"] is None


def test_recording_costs_next_to_nothing(make_job: Maker) -> None:
    def once() -> float:
        start = time.perf_counter()
        with attempt(make_job(outputs=())):
            pass
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.15
