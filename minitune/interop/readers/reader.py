"""Interface of an independent reader: a program of others that opens what minitune wrote."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Reader(NamedTuple):
    """Model as another program runs it."""

    packages: tuple[str, ...]  # that read it
    # logits that every token of a text gives of the next
    logits: Callable[[Sequence[int]], Float[Tensor, "T V"]]
    # (ids of a prompt, n): the likeliest next tokens, n of them, with the reader's own cache
    greedy: Callable[[Sequence[int], int], list[int]]

    @property
    def described(self) -> str:
        """Packages with their versions."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages)


def is_installed(package: str) -> bool:
    """True if a package is there, which is not imported for that."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
