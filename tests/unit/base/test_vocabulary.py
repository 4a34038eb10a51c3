from pathlib import Path

import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.study import load_study
from gradnoise.base.vocabulary import study_label


@pytest.mark.parametrize("plan", ["study: {id: x}", "study: {kind: rehersal}", "kind: rehearsal"])
def test_a_study_without_a_known_kind_has_no_label(plan: str, tmp_path: Path) -> None:
    study = load_study("quick")
    path = tmp_path / "plan.yaml"
    path.write_text(plan)
    with pytest.raises(
        InputError, match=r"plan.yaml: study.kind: .*: must be one of \['rehearsal', 'registered'\]"
    ):
        study_label(study.model_copy(update={"plan": str(path)}))
