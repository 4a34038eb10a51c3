from pathlib import Path
from typing import get_args

import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.study import Inject, Phased, Reweight, chunk_seeds, load_study, write_schemas
from gradnoise.noise.injection.followed import Shape
from gradnoise.noise.injection.inject import Where
from gradnoise.noise.injection.reweighting import Law

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
        (
            "seeds: 5",
            "threads: 5",
            "blocks.race.threads: 5: no such setting: must be one of ['arms', 'branches', ",
        ),
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
        ("[2.0e-3, 8.0e-3]", "[2.0e-3, 0.0020000000001]", "grid and arms give the same cell twice"),
        (
            "[2.0e-3, 8.0e-3]",
            '["0.002", 8.0e-3]',
            "grid.learning_rate.0: '0.002': Input should be a valid number",
        ),
        ("updates: 64", "updates: 65", "branches.updates 65 is past the cap of batch 256"),
        ("{clip: 1.0}", "{betas: [0.9, 1.0]}", "optimizer.betas.1: 1.0: Input should be less than 1"),
        ("kind: pair", "kind: !!python/name:os.system", "anchor, alias or tag: write the value out"),
        ("device: cpu", "device: tpu", "device"),
        ("    arms:\n", "    arm:\n", "blocks.race_noise.arm: {'plain': {'batch': 64, "),
        ("before-x4: {batch: 64", "before-x4: {batch: 12", "arms.before-x4.batch 12 must be a multiple of"),
        ("before-x4: {batch: 64", "before-x4: {batch: 4096", "sequences 2048 must be a multiple of arms.bef"),
        ("      before-x4:", "      Before_x4:", "blocks.race_noise.arms.Before_x4"),
        (
            "kind: reweight,",
            "kind: reweigh,",
            "arms.reweight-b16.noise: these settings do not fit together: ",
        ),
        ("scale: 4, where: pre", "scale: 0, where: pre", "arms.before-x4.noise.scale: 0: Input should be gr"),
        ("scale: 4, where: pre", "where: pre", "arms.before-x4.noise.scale: missing: Field required"),
        ("scale: 4, where: pre", "scale: 4, where: in", "arms.before-x4.noise.where: 'in': Input should be"),
        ("scale: 4, where: pre", "scales: 4, where: pre", "noise.scales: 4: no such setting: did you mean s"),
        (
            "source: gaussian,",
            "source: gaussian, rank: 3,",
            "before-x4.noise: these settings do not fit together: rank is no setting of source gaussian",
        ),
        ("source: gaussian,", "source: low_rank, shape: tensor,", "shape is no setting of source low_rank"),
        ("source: gaussian,", "source: student_t, degrees: 2,", "noise.degrees: 2: Input should be greater"),
        ("to_batch: 16", "to_batch: 16, degrees: 3", "degrees is no setting of law gaussian"),
        ("to_batch: 16", "to_batch: 128", "noise.to_batch 128 must be at most batch 64"),
        ("to_batch: 16", "to_batch: 12, law: subset", "law subset draws 1.5 of a micro-batch of 8: must be"),
        (
            "{batch: 64, learning_rate: 2.0e-3, noise: {kind: reweight, to_batch: 16}",
            "{batch: 8, learning_rate: 2.0e-3, noise: {kind: reweight, to_batch: 4}",
            "arms.reweight-b16.batch 8 must be at least twice noise.contributions",
        ),
        ("temperature: 4, alignment: 1", "temperature: -1, alignment: 1", "noise.temperature: -1: Input sho"),
        ("temperature: 4, alignment: 1", "temperature: 4, alignment: 2", "noise.alignment: 2: Input should"),
        (
            "to_batch: 16",
            "to_batch: 16, phase: [0.5, 0.5]",
            "noise.phase holds none of the trunk's 64 updates",
        ),
        ("to_batch: 16", "to_batch: 16, phase: [0.5, 1.5]", "noise.phase.1: 1.5: Input should be less"),
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
    assert len(list(load_study("quick").jobs())) == 6 * 2 + 7 + 2
    with pytest.raises(InputError, match="must be one of"):
        block.cell("b017-lr0.002")


def test_arms_are_cells_under_their_own_names_after_those_of_the_grid(study: Path) -> None:
    block = load_study("quick").block("race_noise")
    assert [cell.name for cell in block.cells()] == list(block.arms)
    assert block.cell("before-x4").noise == block.arms["before-x4"].noise
    grid = "    grid: {batch: [64], learning_rate: [2.0e-3]}\n"
    study.write_text(QUICK.replace("    arms:\n", f"{grid}    arms:\n"))
    block = load_study("quick").block("race_noise")
    assert [cell.name for cell in block.cells()] == ["b064-lr0.002", *block.arms]
    assert block.cell("b064-lr0.002").noise is None


def test_a_block_needs_cells_and_their_names_do_not_clash(study: Path) -> None:
    text = QUICK.replace("    grid: {batch: [32, 128], learning_rate: [3.0e-3]}\n", "")
    study.write_text(text)
    with pytest.raises(InputError, match="blocks.text: .*: needs a grid, or arms, or both"):
        load_study("quick")
    both = (
        "    grid: {batch: [32], learning_rate: [1]}\n    arms: {b032-lr1: {batch: 32, learning_rate: 1}}\n"
    )
    study.write_text(text + both)
    with pytest.raises(InputError, match="grid and arms give the same cell twice"):
        load_study("quick")


@pytest.mark.parametrize("cap", [1, 2, 64, 100, 1023])
def test_adjacent_phases_share_no_update_and_leave_none_out(cap: int) -> None:
    thirds = [(0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0)]
    spans = [Phased(phase=third).updates(cap) for third in thirds]
    assert [n for first, last in spans for n in range(first, last + 1)] == list(range(1, cap + 1))
    assert Phased().updates(cap) == (1, cap)


def test_a_condition_may_say_what_the_library_knows() -> None:
    """The settings' words are written out because they are known before torch is loaded."""
    for model, field, known in ((Inject, "where", Where), (Inject, "shape", Shape), (Reweight, "law", Law)):
        assert get_args(model.model_fields[field].annotation) == get_args(known)


def test_the_committed_schemas_are_those_of_the_models(tmp_path: Path) -> None:
    write_schemas(tmp_path)
    for schema in tmp_path.iterdir():
        committed = Path("workflow/schemas") / schema.name
        assert committed.read_text() == schema.read_text(), "run python -m gradnoise.base.study"
