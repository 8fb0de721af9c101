"""A seed is a value: every random draw is a function of (seed, name, step), never of a global generator."""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every part, so that a resumed run and a recomputed block draw the same numbers."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A fresh CPU generator for this (seed, names); the same arguments always give the same draws, on any device."""
    return torch.Generator().manual_seed(derive(seed, *names))
