"""Seeds as values: every random draw is a function of (seed, name, step), never of a global
generator.
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

# 2^32 / golden ratio, as a signed number: neighbours in the order of elements become far apart
GOLDEN_32 = -1640531527
GOLDEN_64 = 0x9E3779B97F4A7C15 - 2**64  # of 2^64
MIX_32 = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of the hash "lowbias32" (Wellons 2018)
# of splitmix64 (Steele et al. 2014)
MIX_64 = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def derive(seed: int, *names: str | int) -> int:
    """63-bit seed that depends on every part, so that a resumed run and a recomputed block draw
    the same numbers.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# A compiled step takes a seed as a number, for its hash can't be traced. This is all that
# torch.compiler.assume_constant_result does, but for the import of torch's compiler.
setattr(derive, "_dynamo_marked_constant", True)  # noqa: B010


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Fresh CPU generator for this (seed, names); the same arguments always give the same draws,
    on any device.
    """
    return torch.Generator().manual_seed(derive(seed, *names))


def mixed(numbers: Int[Tensor, "*shape"], seed: int) -> Int[Tensor, "*shape"]:
    """Numbers of 64 bits that look unrelated, from integers and a seed: splitmix64."""
    z = (numbers + 1) * GOLDEN_64 + seed
    z = (z ^ ((z >> 30) & (2**34 - 1))) * MIX_64[0]
    z = (z ^ ((z >> 27) & (2**37 - 1))) * MIX_64[1]
    return z ^ ((z >> 31) & (2**33 - 1))


def hashed(places: Int[Tensor, "*places"], keys: Int[Tensor, "*keys"]) -> Int[Tensor, "*both"]:
    """32 bits for every place, counted from 0, under a key of 64 bits: the same on every device."""
    first, second = ((half & 0x7FFFFFFF).to(torch.int32) for half in (keys, keys >> 32))
    return scrambled(places * GOLDEN_32 + first, second)


def scrambled(x: Int[Tensor, "*shape"], key: Int[Tensor, "*key"]) -> Int[Tensor, "*both"]:
    """Rounds of lowbias32 on integers of 32 bits, between which the key is added."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_32[0] + key
    x = (x ^ ((x >> 15) & 0x1FFFF)) * MIX_32[1]
    return x ^ ((x >> 16) & 0xFFFF)
