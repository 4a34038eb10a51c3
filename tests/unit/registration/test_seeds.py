"""Seeds and run names follow from the plan alone."""

import hashlib
import hmac
import subprocess
import sys

import pytest

from gradnoise.base.errors import InputError
from gradnoise.registration import derive_seeds, run_id

HASH = "ab" * 32


def test_seeds_are_the_stated_hmac() -> None:
    digest = hmac.new(HASH.encode(), b"seed/1", hashlib.sha256).hexdigest()
    assert derive_seeds(HASH, 2)[1] == int(digest, 16) >> 193


def test_seeds_fit_63_bits_and_shorter_lists_are_prefixes() -> None:
    seeds = derive_seeds(HASH, 50)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 50
    assert derive_seeds(HASH, 7) == seeds[:7]
    assert max(seeds) > 2**62  # the top bit is used


def test_plan_and_beacon_change_every_seed() -> None:
    seeds = set(derive_seeds(HASH, 20))
    assert not seeds & set(derive_seeds("cd" * 32, 20))
    assert not seeds & set(derive_seeds(HASH, 20, beacon="drawn in public"))


def test_negative_count_is_refused() -> None:
    with pytest.raises(InputError, match="count: -1"):
        derive_seeds(HASH, -1)


def test_run_names_differ_by_each_part() -> None:
    names = {
        run_id(HASH, "race", "b016-lr0.002", 0),
        run_id(HASH, "race", "b016-lr0.002", 1),
        run_id(HASH, "race", "b016-lr0.008", 0),
        run_id(HASH, "text", "b016-lr0.002", 0),
        run_id("cd" * 32, "race", "b016-lr0.002", 0),
    }
    assert len(names) == 5
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def test_registration_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, gradnoise.registration; print({'torch', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
