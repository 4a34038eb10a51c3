"""Registration: the plan that decides, and the seeds that follow from it."""

from gradnoise.registration.plan import Plan, load_plan
from gradnoise.registration.seeds import derive_seeds, run_id

__all__ = ["Plan", "derive_seeds", "load_plan", "run_id"]
