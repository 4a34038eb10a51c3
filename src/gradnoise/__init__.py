"""Does the gradient noise of training shape in-context learning?

The public names are loaded on first use, so that importing one room does not import the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradnoise.noise.exposure import exposure as exposure

__version__ = "0.1.0"

_HOMES = {"exposure": "gradnoise.noise.exposure"}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradnoise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
