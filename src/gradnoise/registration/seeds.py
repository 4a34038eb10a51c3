"""Seeds and run names that follow from the plan, so that nobody can choose them."""

import hashlib
import hmac

from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256_of


def derive_seeds(plan_sha256: str, count: int, beacon: str = "") -> list[int]:
    """The study's list of seeds: seed_i = HMAC-SHA256(key = hash || beacon, message = "seed/i") >> 193.

    Each is a whole number of 63 bits. Changing the plan changes every seed, and the first n of a longer
    list are the list of n. `beacon` is a public value that was unknown when the plan was written (none by
    default). Raises `InputError` for a negative count.
    """
    if count < 0:
        raise InputError("count", count, "must be 0 or more")
    key = (plan_sha256 + beacon).encode()
    digests = (hmac.digest(key, f"seed/{index}".encode(), hashlib.sha256) for index in range(count))
    return [int.from_bytes(digest, "big") >> 193 for digest in digests]


def run_id(plan_sha256: str, block: str, cell: str, seed_index: int) -> str:
    """Name of a run: first 16 hex digits of SHA-256 of the canonical JSON of [hash, block, cell, index]."""
    return sha256_of([plan_sha256, block, cell, seed_index])[:16]
