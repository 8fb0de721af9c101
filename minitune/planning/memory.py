"""Bytes in memory at the fullest moment of a training step, before a weight is read.

The floor is what has to be in memory. What one block keeps for its backward, and what going back
through it takes, is measured on tensors without values; how much of it is there at which moment of
a step is arithmetic. A step that needs more wastes memory.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import forward_params
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import decoder
from minitune.models.mixers.mixer import TokenPositions
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.nn.attention.key_range import document_keys
from minitune.nn.elementwise import rms_norm
from minitune.nn.head import head_chunk, rows_at_once
from minitune.optim.apply import scratch_bytes
from minitune.optim.transforms import GradientTransformation
from minitune.planning.activations import BlockMemory, measure, measure_blocks
from minitune.planning.alike import first_alike, representatives
from minitune.tree import Tree
from minitune.types import Adapted, Delta, Params, Trainable, wide_dtype

Parts = Mapping[str, int]  # what is in memory -> its bytes
# id, segment and mask of a token as they come, the same moved to the place that predicts them, the
# places of targets
BATCH_BYTES_PER_TOKEN = 45


class StepSpec(NamedTuple):
    """Everything that a training step works on.

    Of tensors only shapes and dtypes are read, so they may be on the meta device.
    """

    model: Model
    # those of weights that train whole say what dtype is computed with, and are not there
    params: Params
    trainable: Trainable
    lora: Lora | None
    optimizer: GradientTransformation
    loss: Any
    device: torch.device
    n_rows: int  # that go through the model together in a micro-batch: both answers of a pair
    n_tokens: int  # of a row
    n_micro_batches: int = 1
    # weights that train whole and are rounded to their quantized values in the forward
    rounded: Collection[str] = ()
    reference: Tree = ()  # the trainable tree that the policy is compared with
    teacher: Teacher | None = None
    # inputs of blocks that are computed again wait in the host's memory (autodiff/offload.py)
    offloaded: bool = False


def peak_memory(step: StepSpec) -> Parts:
    """Bytes of what is in memory at the fullest moment of a step whose tokens are all targets;
    their sum is the floor.

    Uncompiled: a compiled block may keep less. What an operator allocates for itself and frees is
    not counted.
    """
    state = step.optimizer.init(tree.map(lambda x: x.to("meta"), step.trainable))
    with FakeTensorMode(allow_non_fake_inputs=True):
        scratch = scratch_bytes(step.optimizer, state, without_values(step.trainable, step.device))
        moments = _moments(step, tree.n_bytes(state), scratch)
        return max(moments, key=lambda parts: sum(parts.values()))


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


def reduced(step: StepSpec, alike: list[int]) -> StepSpec:
    """Step with one layer of each kind, on fake tensors of its device."""

    def like(leaves: Mapping[str, Any]) -> dict[str, Any]:
        kept = representatives(leaves, alike)
        return tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=step.device), kept)

    teacher = step.teacher
    if teacher is not None:  # its head alone is asked, for the logits that a loss compares
        teacher = Teacher(teacher.model, like(representatives(teacher.params, [])))
    rounded = [*representatives(dict.fromkeys(step.rounded), alike)]
    params, trainable = like(step.params), like(step.trainable)
    return step._replace(params=params, trainable=trainable, rounded=rounded, teacher=teacher)


class StepForward(NamedTuple):
    """Forward of a step without values, as the moments of the step count it, with the weights of
    one layer of each kind."""

    step: StepSpec  # with one layer of each kind, on fake tensors
    params: Params  # adapted, with a gradient where a leaf trains
    whole: Params  # of these the weights that train whole
    deltas: Mapping[str, Delta]
    x: Tensor  # input of the first block
    shared_bytes: int  # that the mixers of all blocks share: angles and ranges of keys
    blocks: list[BlockMemory]  # in the order of the forward, and the last norm
    alike: list[int]  # for each layer the one that stands for it

    def bytes_by_block(self, leaves: Mapping[str, Any]) -> list[int]:
        """Bytes of the leaves of each block, and of the last norm."""
        by_layer = {i: _bytes_of(leaves, f"model.layers.{i}.") for i in set(self.alike)}
        return [*(by_layer[i] for i in self.alike), _bytes_of(leaves, "model.norm.")]


class Backward(NamedTuple):
    """Bytes in memory while the backward goes through the blocks."""

    always: Parts
    copies: Sequence[int]  # that the forward of each block computes with
    activations: Sequence[int]  # of each block
    earlier: int  # of gradients, summed over the micro-batches before this one

    def parts(self, n_blocks_left: int, gradients: int, transient: int) -> Parts:
        """Parts while the first blocks are yet to come; gradients: of this micro-batch so far."""
        return {
            **self.always,
            "copies": sum(self.copies[:n_blocks_left]),
            "gradients": gradients + self.earlier,
            "transient": transient,
            "activations": sum(self.activations[:n_blocks_left]),
        }


def _moments(step: StepSpec, optimizer_bytes: int, scratch: int) -> Iterator[Parts]:
    """Parts in memory at every moment of a step that may be its fullest."""
    alike = first_alike(step.model, step.params, step.trainable)
    forward = step_forward(reduced(step, alike), alike)
    whole, blocks = forward.whole, forward.blocks
    always = constant_parts(step, forward, optimizer_bytes)
    copies, rounded = _copies(forward.step, whole)
    # by block: the gradients of its backward, and the copies that its forward computes with
    gradients = forward.bytes_by_block({**whole, **forward.deltas})
    block_copies = forward.bytes_by_block(copies)
    earlier = _sum_bytes(step) if step.n_micro_batches > 1 else 0
    backward = Backward(always, block_copies, [block.kept for block in blocks], earlier)

    # at the head
    at_head = backward.parts(len(blocks), *head_bytes(forward))
    wide = {name: w for name, w in rounded.items() if w.dtype != whole[name].dtype}
    head_copies = _bytes_of(copies, head_name(step.model.config))
    outside = tree.n_bytes(representatives(wide, []))
    wide_bytes = sum(forward.bytes_by_block(wide)) + outside - _bytes_of(wide, "model.norm.")
    yield {**at_head, "copies": at_head["copies"] + head_copies + wide_bytes}

    # back through the blocks
    done = _bytes_with_gradient(step.model.head(forward.params))
    for i in reversed(range(len(blocks))):
        yield backward.parts(i + 1, done, blocks[i].transient)
        done = done + gradients[i]

    # at the embedding, where a tied head has two gradients until they are added
    done = done + _bytes_of(whole, "model.embed_tokens.")
    yield backward.parts(0, done, tree.n_bytes(forward.x))
    # the sum over micro-batches, then the optimizer, which has that sum alone
    n_bytes = tree.n_bytes(step.trainable)
    yield backward.parts(0, n_bytes, 0)
    yield backward.parts(0, 0 if earlier else n_bytes, scratch)


def _sum_bytes(step: StepSpec) -> int:
    """Bytes of the gradients that are summed over micro-batches, in float32 or wider."""
    leaves = tree.leaves(step.trainable)
    return sum(leaf.numel() * wide_dtype(leaf.dtype).itemsize for leaf in leaves)


def step_forward(step: StepSpec, alike: list[int]) -> StepForward:
    """Forward of one micro-batch of a reduced step, a block of each kind measured."""
    config = step.model.config
    forward = forward_params(step.params, step.trainable, step.lora, step.n_rows)
    params = tree.map(_leaf, forward)
    whole = {
        name: params[name] for name, leaf in step.trainable.items() if isinstance(leaf, Tensor)
    }
    deltas = {name: Delta(w.a, w.b, w.m) for name, w in params.items() if isinstance(w, Adapted)}

    # what the first block is given
    embedding = params["model.embed_tokens.weight"]
    device = embedding.device
    dtype = hardware.product_dtype(embedding.dtype, device)
    x = torch.empty(step.n_rows, step.n_tokens, config.d_model, dtype=dtype, device=device)
    x = detached_leaves(x) if embedding.requires_grad else x
    segment_ids = torch.empty(x.shape[:2], dtype=torch.int32, device=device)
    where = TokenPositions(segment_ids.long(), step.n_tokens, document_keys(segment_ids))
    inputs = decoder.mixer_inputs(config, where, x.dtype)

    blocks = measure_blocks(step.model, params, alike, x, inputs)
    if step.offloaded:
        # an input that waits in the host's memory is not kept, but two of them are on their way
        travelling = 2 * tree.n_bytes(x)
        n = step.model.n_remat
        blocks = [BlockMemory(0, block.transient + travelling) for block in blocks[:n]] + blocks[n:]

    last = detached_leaves(x) if x.requires_grad or any(block.kept for block in blocks) else x
    norm = measure(
        lambda x, w: rms_norm(x, w, config.norm_eps, config.norm), last, params["model.norm.weight"]
    )
    shared_bytes = tree.n_bytes(list(inputs.values()))
    return StepForward(step, params, whole, deltas, x, shared_bytes, [*blocks, norm], alike)


def constant_parts(step: StepSpec, forward: StepForward, optimizer_bytes: int) -> Parts:
    """Parts that are in memory all through a step."""
    trained = step.trainable
    whole = {name for name, leaf in trained.items() if isinstance(leaf, Tensor)}
    frozen = [w for name, w in step.params.items() if not (name in whole and forward.whole)]
    # b times its scale, as well as b
    scaled = [leaf.b for leaf in trained.values() if forward.deltas and isinstance(leaf, Delta)]
    return {
        "weights": tree.n_bytes(frozen),
        "second model": tree.n_bytes((step.reference, step.teacher and step.teacher.params)),
        "trained": tree.n_bytes(step.trainable) + tree.n_bytes(scaled),
        "optimizer": optimizer_bytes,
        "batch": step.n_rows * step.n_tokens * BATCH_BYTES_PER_TOKEN + forward.shared_bytes,
    }


def _copies(step: StepSpec, whole: Params) -> tuple[Params, Params]:
    """(weights that train whole and are computed with as copies, the rounded ones in the dtype that
    they train in).
    """
    dtypes = {name: tree.leaves(leaf)[0].dtype for name, leaf in step.trainable.items()}
    rounded = {name: whole[name].to(dtypes[name]) for name in step.rounded}
    return {
        name: w for name, w in whole.items() if w.dtype != dtypes[name] or name in rounded
    }, rounded


def head_bytes(forward: StepForward) -> tuple[int, int]:
    """(bytes of the sums of the head's gradient, the most that else is there while its losses are
    taken).

    The latter: the labelled rows, as they are and one after the other, and their gradients, which
    wait for the backward; a chunk of logits with their gradient and what the loss makes of the last
    slice, or with the gradient of the head.
    """
    step, params, row_bytes = forward.step, forward.params, tree.n_bytes(forward.x)
    head = step.model.head(params)
    trained = _bytes_with_gradient(head)
    # over the chunks a gradient is summed in float32
    sums = sum(4 * leaf.numel() for leaf in tree.leaves(head) if leaf.requires_grad)
    n = min(step.n_rows * step.n_tokens, head_chunk(head, trained > 0))
    loss = CrossEntropy() if step.loss.compares_answers else step.loss
    like = params["model.embed_tokens.weight"]

    def logits_of(model: Model, params: Params) -> Tensor:
        dtype = hardware.product_dtype(like.dtype, like.device)
        hidden = torch.empty(n, model.config.d_model, dtype=dtype, device=like.device)
        return model.logits(params, hidden).detach()

    logits = logits_of(step.model, params)
    teacher_logits = (
        [] if step.teacher is None else [logits_of(step.teacher.model, step.teacher.params)]
    )

    # the loss sees a few rows at a time, and keeps of each slice the gradient, which is one of the
    # logits'
    rows, *teacher_rows = (x[: rows_at_once(x)] for x in (logits, *teacher_logits))
    targets = torch.empty(len(rows), dtype=torch.int64, device=like.device)

    def losses(x: Tensor) -> Tensor:
        return loss(decoder.scaled_logits(step.model.config, x), targets, *teacher_rows)

    of_slice = sum(measure(losses, detached_leaves(rows))) - tree.n_bytes(rows)
    chunk = tree.n_bytes((logits, teacher_logits)) + max(tree.n_bytes(logits) + of_slice, trained)
    return sums, 3 * row_bytes + chunk


def _bytes_with_gradient(leaves: Tree) -> int:
    return tree.n_bytes([leaf for leaf in tree.leaves(leaves) if leaf.requires_grad])


def _bytes_of(leaves: Mapping[str, Any], prefix: str) -> int:
    return tree.n_bytes([leaf for name, leaf in leaves.items() if name.startswith(prefix)])


def _leaf(x: Tensor) -> Tensor:
    """Leaf of a graph where x, made by apply_trainable, has a gradient."""
    return detached_leaves(x) if x.requires_grad else x
