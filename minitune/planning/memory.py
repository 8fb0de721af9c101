"""Bytes in memory at the fullest moment of a training step, before a weight is read.

The floor is what has to be in memory. What one block keeps for its backward, and what going back
through it takes, is measured on tensors without values; how much of it is there at which moment of
a step is arithmetic. A step that needs more wastes memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import tree
from minitune.models.weights import head_name
from minitune.optim.apply import scratch_bytes
from minitune.planning.alike import first_alike, representatives
from minitune.planning.forward import (
    StepForward,
    bytes_of,
    constant_parts,
    head_bytes,
    reduced,
    step_forward,
)
from minitune.planning.offloading import arriving_bytes
from minitune.planning.rank_leaves import (
    copied_bytes,
    gathered_bytes,
    gathering_bytes,
    local_bytes,
    local_part,
)
from minitune.planning.step_spec import Parts, StepSpec
from minitune.tree import Tree
from minitune.types import Params, Trainable

# a mixture whose experts stand one by one has more, other models fewer
MANY_LEAVES = 2000


def peak_memory(step: StepSpec) -> Parts:
    """Bytes of what is in a rank's memory at the fullest moment of a step whose tokens are all
    targets; their sum is the floor.

    Uncompiled: a compiled block may keep less. What an operator allocates for itself and frees is
    not counted.
    """
    alike = first_alike(step.model, step.params, step.trainable)
    n_bytes, scratch = _optimizer_bytes(step, alike)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moments = _moments(step, alike, n_bytes, scratch)
        return max(moments, key=lambda parts: sum(parts.values()))


def _optimizer_bytes(step: StepSpec, alike: list[int]) -> tuple[int, int]:
    """(bytes of the optimizer's state, those that it takes beside it in an update).

    Of very many leaves one layer of each kind is looked at, which has hundreds of each shape; every
    other one of the kind adds as much state as a second one does.
    """
    is_long = len(step.trainable) > MANY_LEAVES
    chosen = alike if is_long else [*range(len(alike))]

    def state_of(layers: list[int]) -> tuple[Trainable, Tree]:
        trained = local_part(representatives(step.trainable, layers), step.mesh)
        return trained, step.optimizer.init(trained)

    trained, state = state_of(chosen)
    n_bytes = n_of_one = tree.n_bytes(state)
    for first, n in Counter(chosen).items():
        if n > 1:
            second = alike.index(first, alike.index(first) + 1)
            n_of_two = tree.n_bytes(state_of([*chosen, second])[1])
            n_bytes = n_bytes + (n - 1) * (n_of_two - n_of_one)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = without_values(trained, step.device)
        return n_bytes, scratch_bytes(step.optimizer, state, like)


def without_values(leaves: Tree, device: torch.device) -> Tree:
    """Tensors on a device like these, without values where fake tensors are made; those of one
    shape and dtype are one tensor."""
    known: dict[Any, Tensor] = {}

    def like(x: Tensor) -> Tensor:
        key = (x.shape, x.dtype)
        if key not in known:
            known[key] = torch.empty(x.shape, dtype=x.dtype, device=device)
        return known[key]

    return tree.map(like, leaves)


class Backward(NamedTuple):
    """Bytes in memory while the backward goes through the blocks."""

    always: Parts
    # weights that are gathered or fetched: of the block that computes and of the one that is next,
    # in the backward of every block once more
    arriving: int
    copies: Sequence[int]  # that the forward of each block computes with
    activations: Sequence[int]  # of each block
    earlier: int  # of gradients, summed over the micro-batches before this one

    def parts(self, n_blocks_left: int, gradients: int, transient: int) -> Parts:
        """Parts while the first blocks are yet to come; gradients: of this micro-batch so far."""
        return {
            **self.always,
            "gathered": self.arriving,
            "copies": sum(self.copies[:n_blocks_left]),
            "gradients": gradients + self.earlier,
            "transient": transient,
            "activations": sum(self.activations[:n_blocks_left]),
        }


def _moments(
    step: StepSpec, alike: list[int], optimizer_bytes: int, scratch: int
) -> Iterator[Parts]:
    """Parts in memory at every moment of a step that may be its fullest."""
    forward = step_forward(reduced(step, alike), alike)
    whole, blocks = forward.whole, forward.blocks
    always = constant_parts(step, forward, optimizer_bytes)
    copies, rounded = _copies(forward.step, whole)
    # by block: the gradients of its backward, and the copies that its forward computes with
    gradients = forward.bytes_by_block({**whole, **forward.deltas})
    block_copies = forward.bytes_by_block(copies)
    earlier = _sum_bytes(step) if step.n_micro_batches > 1 else 0
    activations = [block.kept for block in blocks]
    arriving = 2 * max(forward.gathered_by_block()) + arriving_bytes(step)
    backward = Backward(always, arriving, block_copies, activations, earlier)

    mesh = step.mesh
    yield _before_head(forward, backward)
    yield _at_head(forward, backward, copies, rounded)

    # back through the blocks, while the gradients of the block after each are summed
    late = [*forward.late_by_block(), 0]
    head = head_name(step.model.config)
    trained_head = {head: step.trainable[head]} if head in step.trainable else {}
    done = local_bytes(trained_head, mesh)
    for i in reversed(range(len(blocks))):
        yield backward.parts(i + 1, done, blocks[i].transient + late[i + 1])
        done = done + gradients[i]

    # at the embedding, where a tied head has two gradients until they are added
    done = done + bytes_of(whole, "model.embed_tokens.", mesh)
    yield backward.parts(0, done, tree.n_bytes(forward.x))
    # the sum over micro-batches, that over ranks in one buffer, then the optimizer, which has that
    # sum alone
    backward = backward._replace(arriving=0)
    n_bytes = local_bytes(step.trainable, mesh)
    yield backward.parts(0, n_bytes, 0)
    yield backward.parts(0, 0 if earlier else n_bytes, copied_bytes(step.trainable, mesh))
    yield backward.parts(0, 0 if earlier else n_bytes, scratch)


def _before_head(forward: StepForward, backward: Backward) -> Parts:
    """Parts when the head's weights have come together."""
    head = head_name(forward.step.model.config)
    arriving = gathering_bytes({head: forward.params[head]}, forward.step.mesh)
    n_blocks, of_rows = len(forward.blocks), tree.n_bytes(forward.x)
    return {
        **backward.parts(n_blocks, 0, of_rows),
        "gathered": arriving + arriving_bytes(forward.step),
    }


def _at_head(forward: StepForward, backward: Backward, copies: Params, rounded: Params) -> Parts:
    """Parts while the head takes its losses."""
    step, blocks = forward.step, forward.blocks
    at_head = backward.parts(len(blocks), *head_bytes(forward))
    wide = {name: w for name, w in rounded.items() if w.dtype != forward.whole[name].dtype}
    mesh, head = step.mesh, head_name(step.model.config)
    head_copies = bytes_of(copies, head, mesh)
    outside = local_bytes(representatives(wide, []), mesh)
    wide_bytes = sum(forward.bytes_by_block(wide)) + outside
    wide_bytes = wide_bytes - bytes_of(wide, "model.norm.", mesh)
    of_head = gathered_bytes({head: forward.params[head]}, mesh)
    return {
        **at_head,
        # the last block's weights are gone, or wait until an accelerator has computed with them
        "gathered": of_head + arriving_bytes(step),
        "copies": at_head["copies"] + head_copies + wide_bytes,
    }


def _sum_bytes(step: StepSpec) -> int:
    """Bytes of the gradients that are summed over micro-batches, in float32 or wider."""
    return local_bytes(step.trainable, step.mesh, wide=True)


def _copies(step: StepSpec, whole: Params) -> tuple[Params, Params]:
    """(weights that train whole and are computed with as copies, the rounded ones in the dtype that
    they train in).
    """
    dtypes = {name: tree.leaves(leaf)[0].dtype for name, leaf in step.trainable.items()}
    rounded = {name: whole[name].to(dtypes[name]) for name in step.rounded}
    return {
        name: w for name, w in whole.items() if w.dtype != dtypes[name] or name in rounded
    }, rounded
