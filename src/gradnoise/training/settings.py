"""What a training job is: decided by settings and plan alone, known before torch is loaded."""

from typing import Any

from gradnoise.base.study import Block, Cell, Study, chunk_seeds
from gradnoise.registration.plan import load_plan
from gradnoise.registration.seeds import derive_seeds, run_id


def job_settings(study: Study, block: str, cell: str, chunk: str) -> dict[str, Any]:
    """Everything in the study's settings that decides this job: what Snakemake and the record watch."""
    chosen = study.block(block)
    settings = chosen.model_dump(mode="json", exclude={"grid", "arms", "seeds", "seeds_per_job"})
    cell_settings = chosen.cell(cell).model_dump(mode="json")
    return {**settings, "cell": cell_settings, "seeds": list(chunk_seeds(chunk)), "device": study.device}


def job_runs(study: Study, block: str, cell: str, chunk: str) -> list[dict[str, Any]]:
    """The runs of a job: run_id, block, cell, seed_index and seed of each."""
    plan = load_plan(study.plan)
    indices = chunk_seeds(chunk)
    seeds = derive_seeds(plan.key, indices.stop)
    return [
        {
            "run_id": run_id(plan.key, block, cell, index),
            "block": block,
            "cell": cell,
            "seed_index": index,
            "seed": seeds[index],
        }
        for index in indices
    ]


def job_sequences(study: Study, block: str, cell: str, chunk: str) -> int:
    """Sequences of a job whose runs use their whole budgets: for a progress bar."""
    chosen = study.block(block)
    return len(chunk_seeds(chunk)) * run_sequences(chosen, chosen.cell(cell))


def run_sequences(block: Block, cell: Cell) -> int:
    """Sequences of a run that uses its whole budget, branches included."""
    points = [step for step, _ in branch_points(block, cell)]
    return cell.batch * (points[-1] + sum(anneal_updates(block, step) for step in points))


def branch_points(block: Block, cell: Cell) -> list[tuple[int, str]]:
    """(trunk updates, what placed the branch) in order; a budget in sequences wins where both coincide."""
    points = {} if block.branches.updates is None else {block.branches.updates: "updates"}
    points |= {sequences // cell.batch: "sequences" for sequences in block.branches.sequences}
    return sorted((step, at) for step, at in points.items() if step <= block.cap(cell))


def anneal_updates(block: Block, trunk_updates: int) -> int:
    """Length of the branch that leaves the trunk there."""
    return max(1, round(block.branches.anneal * trunk_updates))
