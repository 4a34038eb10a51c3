"""Named random streams: every draw of the study is a function of (seed, name, counters) alone."""

import hashlib

import torch


def generator(seed: int, name: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for stream `name` of `seed` at the given counters.

    `name` is one of the study's streams (`init`, `data`, `noise`, `evaluation`, `world`). The key is
    SHA-256 of the tuple, so streams never overlap by accident and a run resumes at any counter without
    stored generator state. Draws are made on the CPU and moved, so a device does not change the data.
    """
    key = "/".join([str(seed), name, *map(str, counters)]).encode()
    # manual_seed takes 64 bits; the sign bit is left clear.
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
