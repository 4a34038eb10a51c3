"""The packages that a study is pinned to, and whether the installed ones are they."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gradnoise.base.errors import InputError

LOCK, PROJECT = "requirements.lock", "pyproject.toml"


def pins(names: Iterable[str]) -> dict[str, str]:
    """The version that each of the named packages is pinned to, in the repository of the working directory.

    They are pinned in requirements.lock; torch, which is installed before it and apart, in the extra `study`
    of pyproject.toml. Raises `InputError` naming a package without a pin, or a file that cannot be read.
    """
    try:
        extras = tomllib.loads(_read(PROJECT))["project"]["optional-dependencies"]["study"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise InputError(PROJECT, "has no extra `study`", "restore it with git checkout") from error
    pinned = _pinned(_read(LOCK).splitlines())
    pinned |= {name: wanted for name, wanted in _pinned(extras).items() if name == "torch"}
    found = {name: pinned.get(_normal(name)) for name in names}
    for name, wanted in found.items():
        if wanted is None:
            raise InputError(name, "is not pinned", f"add {name}==VERSION to {LOCK} (torch: {PROJECT})")
    return {name: wanted for name, wanted in found.items() if wanted is not None}


def check_installed(pinned: Mapping[str, str]) -> None:
    """Raise `InputError` for the first package that is not installed in its pinned version.

    Public versions are compared: 2.13.0+cpu is a 2.13.0.
    """
    for name, wanted in pinned.items():
        found = installed(name)
        if found is None or _public(found) != _public(wanted):
            there = f"{found} installed" if found else "not installed"
            raise InputError(name, there, f"the study needs {wanted}: install {LOCK} (make does it)")


def installed(name: str) -> str | None:
    """The installed version of a package; None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read", "run from the repository root") from error


def _pinned(lines: Iterable[str]) -> dict[str, str]:
    """Versions by normal name, of the lines `name==version`, whatever follows."""
    found = (re.match(r"([\w.-]+)==([^\s;\\]+)", line) for line in lines)
    return {_normal(match[1]): match[2] for match in found if match}


def _normal(name: str) -> str:
    """One spelling of a package's name: ruamel.yaml is ruamel-yaml in the lock."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _public(wanted: str) -> str:
    return wanted.partition("+")[0]
