"""Words that several rooms share, each list once."""

from typing import Literal, get_args

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.study import Study

# Kind of a plan, and the label that every file of its study carries.
LABELS = {"rehearsal": "REHEARSAL", "registered": "REGISTERED"}

# Where runs are compared; the first one decides.
Matching = Literal["loss", "updates", "tokens"]
MATCHINGS: tuple[Matching, ...] = get_args(Matching)

# Stages of the flow of runs.
STAGES = ("planned", "started", "finished", "matched", "excluded", "analysed")


def study_label(study: Study) -> str:
    """`REHEARSAL` or `REGISTERED`, by `study.kind` of the study's plan; nothing else of the plan is read.

    Raises `InputError` for a plan that is missing or of another kind.
    """
    about = strict_yaml.load(study.plan).get("study")
    kind = about.get("kind") if isinstance(about, dict) else None
    if kind not in LABELS:
        raise InputError(f"{study.plan}: study.kind", kind, f"must be one of {list(LABELS)}")
    return LABELS[str(kind)]
