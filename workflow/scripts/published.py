"""Facts about the published study, the one that config/config.yaml names, for the Makefile and CI.

python workflow/scripts/published.py name    its name
python workflow/scripts/published.py built   everything that building it wrote, as patterns for a shell
python workflow/scripts/published.py tag     the Git tag that a registered study is frozen at; else nothing

A fault in the settings is one line and status 2, so that nothing is deleted or committed under a wrong name.
"""

import sys

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.base.study import Config, load_study, validated
from gradnoise.provenance.metadata import ignore_pattern
from gradnoise.registration.plan import load_plan


def name() -> str:
    path = "config/config.yaml"
    return validated(Config, strict_yaml.load(path), path).study


def built() -> str:
    study = name()
    folders = [f"{folder}/{study}" for folder in ("results", "scratch", "logs")]
    return " ".join([*folders, ignore_pattern(study).removeprefix("/")])


def tag() -> str:
    registered = load_plan(load_study(name()).plan).study.kind == "registered"
    return f"published-{name()}" if registered else ""


if __name__ == "__main__":
    try:
        print({"name": name, "built": built, "tag": tag}[sys.argv[1]]())
    except InputError as fault:
        print(f"published.py: {fault}", file=sys.stderr)
        sys.exit(2)
