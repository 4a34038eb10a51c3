"""Does the gradient noise of training shape in-context learning?

The public names are loaded on first use, so that importing one room does not import the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradnoise.noise.exposure import exposure as exposure
    from gradnoise.noise.injection import inject as inject
    from gradnoise.noise.reweighting import reweight as reweight
    from gradnoise.noise.sources import gaussian as gaussian
    from gradnoise.noise.sources import low_rank as low_rank
    from gradnoise.noise.sources import student_t as student_t
    from gradnoise.optim.nap import NAP as NAP
    from gradnoise.optim.nap import align_noise as align_noise

__version__ = "0.1.0"

_HOMES = {
    "exposure": "gradnoise.noise.exposure",
    "inject": "gradnoise.noise.injection",
    "gaussian": "gradnoise.noise.sources",
    "student_t": "gradnoise.noise.sources",
    "low_rank": "gradnoise.noise.sources",
    "reweight": "gradnoise.noise.reweighting",
    "align_noise": "gradnoise.optim.nap",
    "NAP": "gradnoise.optim.nap",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradnoise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
