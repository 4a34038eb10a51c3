"""R's answers and the data sets that they belong to (tests/oracle/data)."""

import json
from pathlib import Path

import pandas as pd

_FOLDER = Path("tests/oracle/data")

R = json.loads((_FOLDER / "r_reference.json").read_text())
D1, D2, D3, D5, D8, D10 = (
    pd.read_csv(_FOLDER / f"{name}.csv")
    for name in (
        "d1_balanced_ri",
        "d2_unbalanced_ri",
        "d3_random_slope",
        "d5_null_between",
        "d8_twofactor",
        "d10_mediation",
    )
)
# R's fits take the loss relative to this value (`lossc`), so their intercepts are there.
R_CENTRE = 2.303
# `keep` marks the unbalanced subset of d8.
D8_UNBALANCED = D8[D8["keep"] == 1].reset_index(drop=True)
# The runs of d5: its rows are tasks.
D5_RUNS = D5.groupby(["run", "seed", "level", "pne"], as_index=False)["icl"].mean()
