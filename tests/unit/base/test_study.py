from pathlib import Path

import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.study import chunk_seeds, load_study, write_schemas

QUICK = Path("config/quick.yaml").read_text()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "quick.yaml").write_text(QUICK)
    return tmp_path / "config" / "quick.yaml"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "seeds: 5",
            "seed: 5",
            "config/quick.yaml: blocks.race.seed: 5: no such setting: did you mean seeds?",
        ),
        ("labels: 16", "labbels: 16", "blocks.race.task.labbels: 16: no such setting: did you mean labels?"),
        ("seeds: 5", "threads: 5", "blocks.race.threads: 5: no such setting: must be one of ['branches', "),
        ("    grid: {", "    grids: {", "blocks.race.grids: {'batch': [16, 64, 256], "),
        ("seeds: 5", "seeds: 0", "blocks.race.seeds: 0: Input should be greater than or equal to 1"),
        ("seeds: 5", "seeds: .nan", "config/quick.yaml: blocks: race: seeds: nan: must be a finite number"),
        ("seeds: 5", "seeds: 5\n    seeds: 6", "duplicate key"),
        (
            "item_noise: 0.1",
            "item_noise: -1",
            "blocks.race.task.item_noise: -1: Input should be greater",
        ),
        ("heads: 2", "heads: 3", "width must be a multiple of heads"),
        ("batch: [16, 64", "batch: [12, 64", "grid.batch 12 must be a multiple of noise.contributions"),
        ("6144, 16384]", "6144, 16000]", "branches.sequences 16000 must be a multiple of grid.batch 256"),
        ("2048, 6144", "6144, 2048", "branches.sequences must ascend"),
        ("kind: pair", "kind: pear", "Input tag 'pear'"),
        ("labels: 16", "labels: 97", "labels must not exceed classes"),
        (
            "contributions: 8",
            "contributions: 2",
            "noise.contributions: 2: Input should be greater than or equal",
        ),
        ("evaluation_sequences: 4096", "evaluation_sequences: 1", "evaluation_sequences: 1: Input should be"),
        ("[2.0e-3, 8.0e-3]", "[2.0e-3, 0.0020000000001]", "grid gives the same cell twice"),
        (
            "[2.0e-3, 8.0e-3]",
            '["0.002", 8.0e-3]',
            "grid.learning_rate.0: '0.002': Input should be a valid number",
        ),
        ("updates: 64", "updates: 65", "branches.updates 65 is past the cap of batch 256"),
        ("{clip: 1.0}", "{betas: [0.9, 1.0]}", "optimizer.betas.1: 1.0: Input should be less than 1"),
        ("kind: pair", "kind: !!python/name:os.system", "anchor, alias or tag: write the value out"),
        ("device: cpu", "device: tpu", "device"),
    ],
)
def test_a_fault_is_one_line_naming_field_and_value(study: Path, old: str, new: str, said: str) -> None:
    text = QUICK if old in QUICK else QUICK + "device: cpu\n"
    study.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as fault:
        load_study("quick")
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_study_that_does_not_exist_is_named(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study.with_name("config.yaml").write_text("study: quick\n")
    study.with_name("large.yaml").write_text(QUICK)
    with pytest.raises(InputError, match="config/absent.yaml: missing: the studies are large, quick$"):
        load_study("absent")
    with pytest.raises(InputError, match="lower-case letters"):
        load_study("../config/quick")
    monkeypatch.chdir(study.parent)
    with pytest.raises(InputError, match="config/quick.yaml: missing: run from the repository root$"):
        load_study("quick")


def test_jobs_cover_every_cell_and_seed_once(study: Path) -> None:
    study.write_text(QUICK.replace("seeds: 5", "seeds: 7"))
    block = load_study("quick").block("race")
    assert block.chunks() == ["s00-04", "s05-06"]
    assert [seed for chunk in block.chunks() for seed in chunk_seeds(chunk)] == list(range(7))
    assert len(list(load_study("quick").jobs())) == 6 * 2 + 2
    with pytest.raises(InputError, match="must be one of"):
        block.cell("b017-lr0.002")


def test_the_committed_schemas_are_those_of_the_models(tmp_path: Path) -> None:
    write_schemas(tmp_path)
    for schema in tmp_path.iterdir():
        committed = Path("workflow/schemas") / schema.name
        assert committed.read_text() == schema.read_text(), "run python -m gradnoise.base.study"
