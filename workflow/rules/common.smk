# What all rules share: the study, its plan, and the code that each phase runs.
from snakemake.exceptions import WorkflowError

from gradnoise import phases
from gradnoise.base import layout
from gradnoise.base.environment import pins
from gradnoise.base.errors import InputError
from gradnoise.figures.names import SPECS
from gradnoise.base.files import canonical_json
from gradnoise.base.closure import code_closure
from gradnoise.registration.plan import load_plan
from gradnoise.base.study import Config, load_study, validated
from gradnoise.training.settings import job_settings

try:
    NAME = validated(Config, config, "config/config.yaml").study
    STUDY = load_study(NAME)
    PLAN = load_plan(STUDY.plan)
except InputError as fault:
    raise WorkflowError(str(fault))
config["label"] = PLAN.study.label  # for report/workflow.rst

JOBS = list(STUDY.jobs())


wildcard_constraints:
    study="[a-z0-9-]+",
    block="|".join(STUDY.blocks),
    cell="|".join(sorted({cell for _, cell, _ in JOBS})).replace(".", "[.]"),
    chunk="s[0-9]+-[0-9]+",


def code(phase):
    """The sources that a phase runs: an edit of any of them reruns it, a touch does not."""
    return code_closure(phases.MODULES[phase])


def settings_text(settings):
    """Settings as one parameter: Snakemake reruns a job when they change, whatever else the file holds."""
    return canonical_json(settings).decode()


def packages(phase):
    """The pinned versions of a phase's packages: another pin reruns it."""
    try:
        return settings_text(pins(phases.PACKAGES[phase]))
    except InputError as fault:
        raise WorkflowError(str(fault))


def corpus_of(wildcards):
    """Text blocks read the prepared corpus, the others nothing."""
    return phases.corpus(wildcards.study, STUDY, wildcards.block)


def settings_of(wildcards):
    """What decides this training job, and no other one."""
    return settings_text(
        job_settings(STUDY, wildcards.block, wildcards.cell, wildcards.chunk)
    )


def captioned(spec):
    """A figure with its caption for Snakemake's own report."""
    return report(
        layout.figure(NAME, spec.name, "svg"),
        caption=f"../report/{spec.name}.rst",
        category="Figures",
        labels={"figure": str(spec.number), "title": spec.title},
    )
