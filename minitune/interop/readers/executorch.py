"""ExecuTorch's runtime as the reader of a .pte file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.errors import InputError
from minitune.interop.graphs import quiet
from minitune.interop.readers.reader import Reader

BITS = "get_weight_bits"  # metadata of our own, by which `verify` knows its bound


def open_executorch(file: Path) -> Reader:
    """Program in ExecuTorch's runtime, called as its TextLLMRunner calls it: a prompt in parts that
    are as long as the program allows, then one token after another.
    """
    program = _program(file)
    forward = program.load_method("forward")
    names = ("get_max_seq_len", "get_max_context_len", BITS)
    n_new, n_slots, _ = (_metadata(program, name) for name in names)

    def run(ids: Sequence[int], start: int) -> Float[Tensor, "V"]:
        """Logits after ids, the first of which is token `start` of the text."""
        inputs = [torch.tensor([list(ids)]), torch.tensor([start])]
        return forward.execute(inputs)[0].flatten().float().clone()

    def check_room(n: int) -> None:
        if n > n_slots:
            raise InputError(
                f"verify: {file} has room for {n_slots} tokens, expected at least {n} for a prompt "
                "and its answer; ask for fewer tokens, or write the file with a longer "
                "max_context_len"
            )

    def logits(ids: Sequence[int]) -> Float[Tensor, "T V"]:
        check_room(len(ids))
        return torch.stack([run([token], i) for i, token in enumerate(ids)])

    def greedy(ids: Sequence[int], n: int) -> list[int]:
        check_room(len(ids) + n)
        parts = [run(ids[i : i + n_new], i) for i in range(0, len(ids), n_new)]
        new = [int(parts[-1].argmax())]
        while len(new) < n:
            new.append(int(run(new[-1:], len(ids) + len(new) - 1).argmax()))
        return new

    return Reader(("executorch",), logits, greedy)


def weight_bits(file: Path) -> int:
    """Bits of a number of the most rounded weight of a program."""
    return _metadata(_program(file), BITS)


def _program(file: Path) -> Any:
    """Program in a file; ValueError for a file of another kind, which the runtime may end on."""
    with file.open("rb") as opened:
        identifier = opened.read(8)[4:]
    if not identifier.startswith(b"ET"):
        raise ValueError("it is no program of ExecuTorch")
    with quiet():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(file)


def _metadata(program: Any, name: str) -> int:
    """Value of a constant method of a program; ValueError for one that it does not have."""
    if name not in program.method_names:
        raise ValueError(f"it has no method {name}, as programs of export stages have")
    return int(program.load_method(name).execute([])[0])
