"""Seeds by number: torch's CPU generator looks at the low 32 bits of a seed alone."""

from __future__ import annotations

import hashlib

import torch


def mixed(seed: int, number: int) -> int:
    """A seed for number `number` of a run, hashed: neighbours share no low bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int) -> torch.Generator:
    """A CPU generator as torch seeds it, and for seeds beyond 32 bits one of their own."""
    return torch.Generator().manual_seed(seed if 0 <= seed < 2**32 else mixed(seed, 0))
