"""Words that several rooms share, each list once."""

from typing import Literal, get_args

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.study import Study

# Kind of a plan, and the label that every file of its study carries.
LABELS = {"rehearsal": "REHEARSAL", "registered": "REGISTERED"}

# What a hypothesis is called whose rule was met, not met, or neither. Only a registered study has verdicts.
VERDICTS = {
    "rehearsal": ("condition met", "condition not met", "undecided"),
    "registered": ("corroborated", "falsified", "inconclusive"),
}

# What a test or a hypothesis may be called, the strongest word first.
CONFIRMATORY, DEVIATED, EXPLORATORY = "CONFIRMATORY", "CONFIRMATORY-DEVIATED", "EXPLORATORY"
STANDING = (CONFIRMATORY, DEVIATED, EXPLORATORY, LABELS["rehearsal"])

# Where runs are compared; the first one decides.
Matching = Literal["loss", "updates", "tokens"]
MATCHINGS: tuple[Matching, ...] = get_args(Matching)

# Stages of the flow of runs.
STAGES = ("planned", "started", "finished", "matched", "excluded", "analysed")

# What becomes of a planned run.
FATES = ("analysed", "excluded", "unmatched", "diverged", "missing", "not compared")


def study_label(study: Study) -> str:
    """`REHEARSAL` or `REGISTERED`, by `study.kind` of the study's plan; nothing else of the plan is read.

    Raises `InputError` for a plan that is missing or of another kind.
    """
    about = strict_yaml.load(study.plan).get("study")
    kind = about.get("kind") if isinstance(about, dict) else None
    if kind not in LABELS:
        raise InputError(f"{study.plan}: study.kind", kind, f"must be one of {list(LABELS)}")
    return LABELS[str(kind)]
