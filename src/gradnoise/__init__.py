"""Does the gradient noise of training shape in-context learning?

The public names are loaded on first use, so that importing one room does not import the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradnoise.noise.exposure import exposure as exposure
    from gradnoise.noise.injection.inject import inject as inject
    from gradnoise.noise.injection.reweighting import reweight as reweight
    from gradnoise.noise.injection.sources import gaussian as gaussian
    from gradnoise.noise.injection.sources import low_rank as low_rank
    from gradnoise.noise.injection.sources import student_t as student_t
    from gradnoise.optim.nap import NAP as NAP
    from gradnoise.optim.nap import align_noise as align_noise

__version__ = "0.1.0"

_HOMES = {
    "exposure": "gradnoise.noise.exposure",
    "inject": "gradnoise.noise.injection.inject",
    "gaussian": "gradnoise.noise.injection.sources",
    "student_t": "gradnoise.noise.injection.sources",
    "low_rank": "gradnoise.noise.injection.sources",
    "reweight": "gradnoise.noise.injection.reweighting",
    "align_noise": "gradnoise.optim.nap",
    "NAP": "gradnoise.optim.nap",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradnoise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
