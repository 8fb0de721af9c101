"""One rank of a mesh whose other ranks are not there: what depends on the place alone needs no other process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitune.sharding.mesh import Mesh, device_mesh, n_ranks


@contextmanager
def as_rank(rank: int, mesh: Mesh) -> Iterator[DeviceMesh]:
    """Process groups of a mesh in which this process is one rank, and the others are not there."""
    dist.init_process_group("fake", rank=rank, world_size=n_ranks(mesh), store=FakeStore())
    try:
        yield device_mesh(mesh, "cpu")
    finally:
        dist.destroy_process_group()
