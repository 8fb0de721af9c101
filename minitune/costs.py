"""What a training step costs, before a weight is read: bytes at its fullest moment, and floating-point operations.

The floor is what has to be in memory. What one block keeps for its backward, and what going back through it takes, is measured on
tensors without values; how much of it is there at which moment of a step is arithmetic. A step that needs more wastes memory.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import hardware, objectives, ops, tree
from minitune.attention import documents
from minitune.grad import detached_leaves
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models import Model, decoder, memory
from minitune.models.config import layer_kind
from minitune.models.mixers.mixer import TokenPositions
from minitune.models.mixers.registry import MIXERS
from minitune.models.weights import head_name
from minitune.objectives import Teacher
from minitune.optim.apply import scratch_bytes
from minitune.optim.transforms import GradientTransformation
from minitune.tree import Tree
from minitune.types import Adapted, Delta, Params, Trainable

Parts = Mapping[str, int]  # what is in memory -> its bytes
BESIDE = 45  # bytes of a token: id, segment and mask, as they come and moved to the place that predicts them; the targets' places
STEPS = (  # of a block, in the order of its forward; the weights of one step see the same input
    r"input_layernorm",
    r"self_attn\.(q|k|v|qkv)_proj",
    r"self_attn\.([qk]_norm|sinks)",
    r"self_attn\.o_proj",
    r"(post_attention|pre_feedforward)_layernorm",
    r"(?!.*(down_proj|\.w2\b|post_feedforward))",
    r"(?!.*post_feedforward)",
    r"",
)
ATTENTION = 2  # the step behind which queries, keys and values are there


class Step(NamedTuple):
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
    beside: Tree = ()  # what else is kept: the trainable tree that a reference is made of
    teacher: Teacher | None = None
    offloaded: bool = False  # inputs of blocks that are computed again wait in the host's memory (offload.py)


def floor(step: Step) -> Parts:
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


def _moments(step: Step, state: int) -> Iterator[Parts]:
    """What is in memory at every moment of a step that may be its fullest."""
    config, n = step.model.config, step.n_rows * step.n_tokens
    params = tree.map(_leaf, objectives.apply_trainable(step.params, detached_leaves(step.trainable), step.lora))
    deltas = {name: Delta(w.a, w.b, w.m) for name, w in params.items() if isinstance(w, Adapted)}
    embedding, norm = params["model.embed_tokens.weight"], params["model.norm.weight"]
    dtype = hardware.product_dtype(embedding.dtype, embedding.device)
    x = torch.empty(step.n_rows, step.n_tokens, config.d_model, dtype=dtype, device=embedding.device)
    x = detached_leaves(x) if embedding.requires_grad else x
    segment_ids = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    where = TokenPositions(segment_ids.long(), step.n_tokens, documents(segment_ids))
    inputs = decoder.mixer_inputs(config, where, x.dtype)
    blocks = memory.measure_blocks(config, step.model.n_remat, params, x, inputs)
    if step.offloaded:  # two inputs are on their way
        recomputed = [
            block._replace(kept=0, transient=block.transient + 2 * tree.n_bytes(x)) for block in blocks[: step.model.n_remat]
        ]
        blocks = [*recomputed, *blocks[step.model.n_remat :]]
    below = detached_leaves(x) if x.requires_grad or any(block.kept for block in blocks) else x
    blocks = [*blocks, memory.measure(lambda x, w: ops.rms_norm(x, w, config.norm_eps, config.norm), below, norm)]
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
        "second model": tree.n_bytes((step.beside, step.teacher and step.teacher.params)),
        "trained": tree.n_bytes(step.trainable) + tree.n_bytes([delta.b for delta in deltas.values()]),  # b, and b by its scale
        "optimizer": state,
        "batch": n * BESIDE + tree.n_bytes(list(inputs.values())),
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


def _head(step: Step, params: Params) -> int:
    """Bytes of a chunk of logits with their gradient and what the loss makes of the last piece, or with the head's gradient."""
    head = step.model.head(params)
    trained = tree.n_bytes([leaf for leaf in tree.leaves(head) if leaf.requires_grad])
    n = min(step.n_rows * step.n_tokens, ops.head_chunk(head, trained > 0))
    loss, beside = CrossEntropy() if step.loss.compares_answers else step.loss, []
    like = params["model.embed_tokens.weight"]

    def logits_of(model: Model, params: Params) -> Tensor:
        dtype = hardware.product_dtype(like.dtype, like.device)
        states = torch.empty(n, model.config.d_model, dtype=dtype, device=like.device)
        return model.logits(params, states).detach()

    logits = logits_of(step.model, params)
    if step.teacher is not None:
        beside = [logits_of(step.teacher.model, step.teacher.params)]
    piece, *given = (x[: ops.rows_at_once(x)] for x in (logits, *beside))
    targets = torch.empty(len(piece), dtype=torch.int64, device=like.device)
    own = memory.measure(lambda x: loss(decoder.scaled_logits(step.model.config, x), targets, *given), detached_leaves(piece))
    last = sum(own) - tree.n_bytes(piece)  # with the gradient of this piece, which is one of the logits'
    return tree.n_bytes((logits, beside)) + max(tree.n_bytes(logits) + last, trained)


def flops_per_token(model: Model, trainable: Trainable, companions: float | int) -> float:
    """Floating-point operations of a training step for each of its tokens, all of them targets and in a document with
    `companions` tokens on average (the sum of squares of the documents' lengths over the sum of their lengths).

    2 for every weight that a token is multiplied by, 2 more where its input has a gradient, 2 more where it trains whole; those
    of deltas; attention over the keys that are seen, forward and twice as many back; the forward of blocks computed again.
    """
    config, experts = model.config, model.config.experts
    first = min((_place(name) for name in trainable), default=(torch.inf, 0))
    total = 0.0
    head = head_name(config)
    for name, shape in model.shapes().items():
        if len(shape) < 2 or (name.endswith("embed_tokens.weight") and name != head):
            continue
        place = (torch.inf, 1) if name == head else _place(name)
        share = experts.n_active / experts.n_experts if experts is not None and ".experts." in name else 1.0
        leaf, back = trainable.get(name), first < place
        forward = n = 2 * share * torch.Size(shape).numel()
        total += n * (1 + back + isinstance(leaf, Tensor))
        if isinstance(leaf, Delta):
            n_a, n_b = (2 * share * x.numel() for x in (leaf.a, leaf.b))
            forward = n + n_a + n_b
            total += n_a * (2 + back) + 3 * n_b
        total += forward if place[0] < model.n_remat and first <= (place[0], len(STEPS)) else 0
    for i in range(config.n_layers):
        kind = layer_kind(config, i)
        forward = MIXERS[kind.mixer].flops(config, kind, companions)
        back = first <= (i, ATTENTION)
        total += forward * (3 if back else 1) + (forward if i < model.n_remat and first <= (i, len(STEPS)) else 0)
    return total


def _place(name: str) -> tuple[float | int, int]:
    """(layer, step) of a weight in the forward."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found is None:
        return (-1, 0) if name.endswith("embed_tokens.weight") else (torch.inf, int(not name.startswith("model.norm")))
    own = name[found.end() :]
    return int(found[1]), next(i for i, step in enumerate(STEPS) if re.match(step, own))


def _bytes_of(leaves: Mapping[str, Any], prefix: str) -> int:
    return tree.n_bytes([leaf for name, leaf in leaves.items() if name.startswith(prefix)])


def _leaf(x: Tensor) -> Tensor:
    return detached_leaves(x) if x.requires_grad else x
