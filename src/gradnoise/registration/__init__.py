"""Registration: the plan that decides, the seeds that follow from it, its lock, and deviations from it.

What only a command needs is loaded on first use, so that no phase depends on it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gradnoise.registration.plan import Plan, load_plan
from gradnoise.registration.seeds import derive_seeds, run_id

if TYPE_CHECKING:
    from gradnoise.registration.deviations import deviate as deviate
    from gradnoise.registration.deviations import read_deviations as read_deviations
    from gradnoise.registration.lockfile import read_lock as read_lock
    from gradnoise.registration.locking import lock as lock
    from gradnoise.registration.timestamp import verify_timestamp as verify_timestamp

_HOMES = {
    "deviate": "gradnoise.registration.deviations",
    "lock": "gradnoise.registration.locking",
    "read_deviations": "gradnoise.registration.deviations",
    "read_lock": "gradnoise.registration.lockfile",
    "verify_timestamp": "gradnoise.registration.timestamp",
}
__all__ = ["Plan", "derive_seeds", "load_plan", "run_id", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradnoise.registration' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
