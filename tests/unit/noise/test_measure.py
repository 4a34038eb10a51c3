import math
from pathlib import Path

import pandas as pd
import pytest
from tests.unit.conftest import SMALL

from gradnoise.base import layout
from gradnoise.base.study import Study, load_study
from gradnoise.base.tables import EXPOSURE, EXPOSURE_PARTS, NOISE_EVENTS, read_table
from gradnoise.noise.integrals import DEFINITIONS
from gradnoise.noise.measure import measure
from gradnoise.training.train import train


def measured(study: Study, name: str = "small") -> tuple[pd.DataFrame, pd.DataFrame]:
    for job in study.jobs():
        train(name, *job, code="x")
    measure(name)
    return (
        read_table(layout.exposure(name), EXPOSURE).to_pandas(),
        read_table(layout.exposure_parts(name), EXPOSURE_PARTS).to_pandas(),
    )


def test_every_branch_has_every_number_with_its_error(study: Study) -> None:
    exposure, _ = measured(study)
    names = {*DEFINITIONS, "gns", "gns_preconditioned", "t_eff", "effective_ratio", "effective_rank"}
    for _, rows in exposure.groupby(["run_id", "branch"]):
        assert names <= set(rows.definition)
        known = rows.set_index("definition").loc[["pne", "pne2", "ne", "retained", "pne_star", "t_eff"]]
        assert (known.value > 0).all()
        assert (known.stderr > 0).all()
    # No clipping here.
    ratio = exposure[exposure.definition == "effective_ratio"].value
    assert ratio.tolist() == pytest.approx([1.0] * len(ratio))


def test_exposure_is_the_sum_over_trunk_and_branch(study: Study) -> None:
    """By hand, from the raw log of the last branch of one run."""
    exposure, parts = measured(study)
    job = next(iter(study.jobs()))
    events = read_table(layout.run("small", *job, "noise_events"), NOISE_EVENTS).to_pandas()
    run = events[events.run_id == events.run_id.iloc[0]]
    covered = run[run.segment.isin([0, 3])]
    chosen = (exposure.run_id == run.run_id.iloc[0]) & (exposure.branch == 3)
    value = exposure[chosen].set_index("definition").value
    assert value["pne2"] == pytest.approx((covered.sum_lr2 * covered.trace_pcp).sum())
    assert value["ne"] == pytest.approx((covered.sum_lr2 * covered.trace_c).sum())
    assert value["pne_star"] == pytest.approx((covered.sum_lr * covered.trace_pcp / covered.curvature).sum())
    own = parts[(parts.run_id == run.run_id.iloc[0]) & (parts.branch == 3)]
    for kind in ("layer", "class"):
        rows = own[(own.kind == kind) & (own.definition == "pne2")]
        assert rows.value.sum() == pytest.approx(value["pne2"])
        assert not rows.stderr.isna().any()
        assert math.sqrt((rows.stderr**2).sum()) > 0


ARM = """    arms:
      after: {batch: 16, learning_rate: 2e-3, noise: {kind: inject, source: gaussian, scale: 4, where: post}}
"""


def test_injected_noise_is_part_of_the_exposure_and_told_apart(study: Study) -> None:
    Path("config/arms.yaml").write_text(
        SMALL.replace("    grid: {batch: [16, 64]", f"{ARM}    grid: {{batch: [16]")
    )
    exposure, parts = measured(load_study("arms"), "arms")
    total = exposure.set_index(["cell", "seed_index", "branch", "definition"]).value
    path = layout.run("arms", "race", "after", "s00-01", "noise_events")
    events = read_table(path, NOISE_EVENTS).to_pandas()
    own = events[(events.seed_index == 1) & events.segment.isin([0, 3])]
    assert total["after", 1, 3, "pne2_injected"] == pytest.approx(own.injected_pne2.sum())
    for definition, name in (("pne", "injected_pne"), ("pne2", "injected_pne2"), ("ne", "injected_ne")):
        trace, eta = (
            ("trace_c", "sum_lr2_c") if definition == "ne" else ("trace_pcp", f"sum_lr{definition[3:]}")
        )
        found = total["after", 1, 3, definition]
        assert found == pytest.approx((own[eta] * own[trace] + own[name]).sum())
        rows = parts[(parts.cell == "after") & (parts.seed_index == 1) & (parts.branch == 3)]
        layers = rows[(rows.kind == "layer") & (rows.definition == definition)]
        assert layers.value.sum() == pytest.approx(found)
    assert (total.xs("pne2_injected", level="definition")["b016-lr0.002"] == 0).all()
