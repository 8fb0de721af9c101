"""Bytes in memory at the fullest moment of a training step, before a weight is read.

The floor is what has to be in memory. What one block keeps for its backward, and what going back through it takes, is measured on
tensors without values; how much of it is there at which moment of a step is arithmetic. A step that needs more wastes memory.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import apply_trainable
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import decoder
from minitune.models.mixers.mixer import TokenPositions
from minitune.models.model import Model
from minitune.models.weights import head_name
from minitune.nn.attention.key_range import documents
from minitune.nn.elementwise import rms_norm
from minitune.nn.head import head_chunk, rows_at_once
from minitune.optim.apply import scratch_bytes
from minitune.optim.transforms import GradientTransformation
from minitune.planning.activations import measure, measure_blocks
from minitune.tree import Tree
from minitune.types import Adapted, Delta, Params, Trainable

Parts = Mapping[str, int]  # what is in memory -> its bytes
# id, segment and mask of a token as they come, the same moved to the place that predicts them, the places of targets
BATCH_BYTES_PER_TOKEN = 45


class StepSpec(NamedTuple):
    """What a training step works on; of tensors only shapes and dtypes are read, so they may be on the meta device."""

    model: Model
    params: Params  # those of weights that train whole say what dtype is computed with, and are not there
    trainable: Trainable
    lora: Lora | None
    optimizer: GradientTransformation
    loss: Any
    device: torch.device
    n_rows: int  # that go through the model together in a micro-batch: both answers of a pair
    n_tokens: int  # of a row
    n_micro_batches: int = 1
    rounded: Collection[str] = ()  # weights that train whole and are rounded to their quantized values in the forward
    reference: Tree = ()  # the trainable tree that the policy is compared with
    teacher: Teacher | None = None
    offloaded: bool = False  # inputs of blocks that are computed again wait in the host's memory (offload.py)


def peak_memory(step: StepSpec) -> Parts:
    """Bytes of what is in memory at the fullest moment of a step whose tokens are all targets; their sum is the floor.

    Uncompiled: a compiled block may keep less. What an operator allocates for itself and frees is not counted.
    """
    state = tree.n_bytes(step.optimizer.init(tree.map(lambda x: x.to("meta"), step.trainable)))

    def without_values(leaves: Tree) -> Tree:
        return tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=step.device), leaves)

    with FakeTensorMode(allow_non_fake_inputs=True):
        params, trainable, teacher = without_values((step.params, step.trainable, step.teacher and step.teacher.params))
        step = step._replace(params=params, trainable=trainable)
        if step.teacher is not None:
            step = step._replace(teacher=Teacher(step.teacher.model, teacher))
        return max(_moments(step, state), key=lambda parts: sum(parts.values()))


def _moments(step: StepSpec, state: int) -> Iterator[Parts]:
    """What is in memory at every moment of a step that may be its fullest."""
    config, n = step.model.config, step.n_rows * step.n_tokens
    params = tree.map(_leaf, apply_trainable(step.params, detached_leaves(step.trainable), step.lora))
    deltas = {name: Delta(w.a, w.b, w.m) for name, w in params.items() if isinstance(w, Adapted)}
    embedding, norm = params["model.embed_tokens.weight"], params["model.norm.weight"]
    dtype = hardware.product_dtype(embedding.dtype, embedding.device)
    x = torch.empty(step.n_rows, step.n_tokens, config.d_model, dtype=dtype, device=embedding.device)
    x = detached_leaves(x) if embedding.requires_grad else x
    segment_ids = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    where = TokenPositions(segment_ids.long(), step.n_tokens, documents(segment_ids))
    inputs = decoder.mixer_inputs(config, where, x.dtype)
    blocks = measure_blocks(config, step.model.n_remat, params, x, inputs)
    if step.offloaded:  # two inputs are on their way
        recomputed = [
            block._replace(kept=0, transient=block.transient + 2 * tree.n_bytes(x)) for block in blocks[: step.model.n_remat]
        ]
        blocks = [*recomputed, *blocks[step.model.n_remat :]]
    below = detached_leaves(x) if x.requires_grad or any(block.kept for block in blocks) else x
    blocks = [*blocks, measure(lambda x, w: rms_norm(x, w, config.norm_eps, config.norm), below, norm)]
    whole = {name: params[name] for name, leaf in step.trainable.items() if isinstance(leaf, Tensor)}
    layers = [f"model.layers.{i}." for i in range(config.n_layers)] + ["model.norm."]
    gradients = [_bytes_of({**whole, **deltas}, layer) for layer in layers]
    kinds = {name: tree.leaves(leaf)[0].dtype for name, leaf in step.trainable.items()}
    rounded = {name: whole[name].to(kinds[name]) for name in step.rounded}
    copies = {name: w for name, w in whole.items() if w.dtype != kinds[name] or name in rounded}  # as they are computed with
    casts = [_bytes_of(copies, layer) for layer in layers]
    head, row = head_name(config), x.numel() * x.element_size()
    always = {
        "weights": tree.n_bytes([w for name, w in step.params.items() if name not in whole]),
        "second model": tree.n_bytes((step.reference, step.teacher and step.teacher.params)),
        "trained": tree.n_bytes(step.trainable) + tree.n_bytes([delta.b for delta in deltas.values()]),  # b, and b by its scale
        "optimizer": state,
        "batch": n * BATCH_BYTES_PER_TOKEN + tree.n_bytes(list(inputs.values())),
    }
    # of the micro-batches before this one, whose sum the next one is added to
    earlier = tree.n_bytes(step.trainable) if step.n_micro_batches > 1 else 0

    def moment(n_open: int, own: int, transient: int) -> Parts:
        """While the backward has yet to go through the first n_open blocks, with the gradients of this micro-batch so far."""
        parts = {"copies": sum(casts[:n_open]), "gradients": own + earlier, "transient": transient}
        return {**always, **parts, "activations": sum(block.kept for block in blocks[:n_open])}

    trained = [leaf for leaf in tree.leaves(step.model.head(params)) if leaf.requires_grad]
    # the labelled rows, as they are and one after the other, and their gradients, which wait for the backward; the gradient of a
    # head is summed over its chunks in float32
    at_head = moment(len(blocks), sum(4 * leaf.numel() for leaf in trained), 3 * row + _head(step, params))
    wide = tree.n_bytes([w for name, w in rounded.items() if w.dtype != whole[name].dtype])
    yield {**at_head, "copies": at_head["copies"] + _bytes_of(copies, head) + wide}
    done = tree.n_bytes(trained)
    for i in reversed(range(len(blocks))):
        yield moment(i + 1, done, blocks[i].transient)
        done = done + gradients[i]
    yield moment(0, done + _bytes_of(whole, "model.embed_tokens."), row)  # a tied head has two gradients until they are added
    yield moment(0, tree.n_bytes(step.trainable), 0)
    yield moment(0, tree.n_bytes(step.trainable) - earlier, scratch_bytes(step.optimizer, step.trainable))


def _head(step: StepSpec, params: Params) -> int:
    """Bytes of a chunk of logits with their gradient and what the loss makes of the last piece, or with the head's gradient."""
    head = step.model.head(params)
    trained = tree.n_bytes([leaf for leaf in tree.leaves(head) if leaf.requires_grad])
    n = min(step.n_rows * step.n_tokens, head_chunk(head, trained > 0))
    loss, beside = CrossEntropy() if step.loss.compares_answers else step.loss, []
    like = params["model.embed_tokens.weight"]

    def logits_of(model: Model, params: Params) -> Tensor:
        dtype = hardware.product_dtype(like.dtype, like.device)
        states = torch.empty(n, model.config.d_model, dtype=dtype, device=like.device)
        return model.logits(params, states).detach()

    logits = logits_of(step.model, params)
    if step.teacher is not None:
        beside = [logits_of(step.teacher.model, step.teacher.params)]
    piece, *given = (x[: rows_at_once(x)] for x in (logits, *beside))
    targets = torch.empty(len(piece), dtype=torch.int64, device=like.device)
    own = measure(lambda x: loss(decoder.scaled_logits(step.model.config, x), targets, *given), detached_leaves(piece))
    last = sum(own) - tree.n_bytes(piece)  # with the gradient of this piece, which is one of the logits'
    return tree.n_bytes((logits, beside)) + max(tree.n_bytes(logits) + last, trained)


def _bytes_of(leaves: Mapping[str, Any], prefix: str) -> int:
    return tree.n_bytes([leaf for name, leaf in leaves.items() if name.startswith(prefix)])


def _leaf(x: Tensor) -> Tensor:
    return detached_leaves(x) if x.requires_grad else x
