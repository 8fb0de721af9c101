"""Memory of gathered weights goes back to the system with them."""

import json
import mmap
import sys

import pytest
import torch

from minitune.sharding.passing import SMALLEST, copied, joined, passing
from support.scripts import run_script


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux keeps what was freed")
def test_blocks_that_were_gathered_leave_no_holes() -> None:
    with_passing, with_torch = json.loads(run_script("gather_holes", OMP_NUM_THREADS="1"))
    assert with_passing < 4
    assert with_torch > 32  # what a block of 8 MiB leaves 24 times, where it is not in pages of its own


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 3, 2 * SMALLEST])
def test_it_is_an_ordinary_tensor(n: int, dtype: torch.dtype) -> None:
    x = passing([n, 2], dtype, torch.device("cpu"))
    assert (x.shape, x.dtype, x.device.type, x.is_contiguous()) == ((n, 2), dtype, "cpu", True)
    x.fill_(3)
    part = x[n // 2 :]
    del x
    assert bool((part == 3).all())


def test_where_the_system_gives_no_pages_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert passing([3, SMALLEST], torch.uint8, torch.device("cpu")).shape == (3, SMALLEST)


@pytest.mark.parametrize("n", [0, 3, SMALLEST])
def test_what_is_joined_or_copied_is_what_torch_makes(n: int) -> None:
    x, y = torch.arange(3 * n).view(3, n), -torch.arange(6 * n).view(3, 2 * n)
    assert joined([x, y], 1).equal(torch.cat([x, y], 1))
    assert joined([x, x]).equal(torch.cat([x, x]))
    one = copied(y.mT)
    assert one.is_contiguous()
    assert one.equal(y.mT)
