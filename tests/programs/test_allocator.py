"""Memory that was freed stays with the process: what a step allocates again costs no page faults."""

import sys

import pytest
import torch

from minitune import hardware
from support.scripts import run_script


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    """48 MiB, twice alive at a time: above the largest block that glibc would keep by itself."""

    pages = 2 * 5 * 48 * 2**20 // 4096
    assert (
        int(run_script("heap_faults", "kept")) < pages / 4
    )  # now and then a block finds its place only at the second or third time
    assert int(run_script("heap_faults", "given back")) > 0.9 * pages


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.skipif(not hardware.multiplies_bfloat16(torch.device("cpu")), reason="oneDNN makes no kernels for bfloat16 here")
def test_products_of_ever_new_shapes_do_not_fill_the_memory() -> None:
    bounded, free = (int(run_script("kernel_cache", how)) for how in ("bounded", "free"))
    assert free > 2**24  # of 600 kernels
    assert bounded < free / 3
