"""Named random streams: every draw of the study is a function of (seed, name, counters) alone."""

import hashlib

import torch


def key(seed: int, name: str, *counters: int | str) -> int:
    """63 bits for stream `name` of `seed` at the given counters: from SHA-256, so no two overlap by plan.

    A CPU generator uses 32 of them: two draws of a run coincide with chance 2^-32 a pair, which adds nothing
    that a covariance could show.
    """
    text = "/".join([str(seed), name, *map(str, counters)]).encode()
    # manual_seed takes 64 bits; the sign bit is left clear.
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(
    seed: int, name: str, *counters: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator for stream `name` of `seed` at the given counters.

    `name` is one of the study's streams (`init`, `data`, `noise`, `evaluation`, `world`). A run resumes at
    any counter without stored generator state. Data are drawn on the CPU and moved, so a device does not
    change them; noise of a model's size is drawn where it is used.
    """
    return torch.Generator(device).manual_seed(key(seed, name, *counters))
