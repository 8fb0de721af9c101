"""Forward of a training step without values: one block of each kind, the head, and what is there
all through the step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import forward_params
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.losses.token import CrossEntropy
from minitune.models import decoder
from minitune.models.mixers.mixer import TokenPositions
from minitune.models.model import Model
from minitune.nn.attention.key_range import document_keys
from minitune.nn.elementwise import rms_norm
from minitune.nn.head import head_chunk, rows_at_once
from minitune.planning.activations import BlockMemory, measure, measure_blocks
from minitune.planning.alike import representatives
from minitune.planning.mesh import Mesh
from minitune.planning.offloading import resident
from minitune.planning.rank_leaves import gathered_bytes, late_bytes, local_bytes, used_leaf
from minitune.planning.shared_blocks import token_shares, with_shared_blocks
from minitune.planning.step_spec import BATCH_BYTES_PER_TOKEN, Parts, StepSpec
from minitune.tree import Tree
from minitune.types import Adapted, Delta, Params


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
        mesh = self.step.mesh
        by_layer = {i: bytes_of(leaves, f"model.layers.{i}.", mesh) for i in set(self.alike)}
        return [*(by_layer[i] for i in self.alike), bytes_of(leaves, "model.norm.", mesh)]

    def gathered_by_block(self) -> list[int]:
        """Bytes of the weights of each block, and of the last norm, on a rank that computes with
        them; 0 where they lie there whole."""
        return self._by_block(self.params, gathered_bytes)

    def late_by_block(self) -> list[int]:
        """Bytes of the gradients of each block, and of the last norm, that are summed while the
        backward goes on."""
        return self._by_block(self.whole, late_bytes)

    def _by_block(
        self, leaves: Mapping[str, Any], n_bytes: Callable[[Mapping[str, Any], Mesh], int]
    ) -> list[int]:
        def of_layer(i: int) -> int:
            prefix = f"model.layers.{i}."
            layer = {name: w for name, w in leaves.items() if name.startswith(prefix)}
            return n_bytes(layer, self.step.mesh)

        by_layer = {i: of_layer(i) for i in set(self.alike)}
        return [*(by_layer[i] for i in self.alike), 0]


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
    device, mesh = embedding.device, step.mesh
    dtype = hardware.product_dtype(embedding.dtype, device)
    shape = (step.n_rows, mesh.own_tokens(step.n_tokens), config.d_model)
    x = torch.empty(shape, dtype=dtype, device=device)
    x = detached_leaves(x) if embedding.requires_grad else x
    inputs = decoder.mixer_inputs(config, _positions(step, device), x.dtype)

    used = {name: used_leaf(name, w, mesh) for name, w in params.items()}
    blocks = measure_blocks(with_shared_blocks(step.model, mesh), used, alike, x, inputs)
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
    here = resident(step.params, step.blocks)
    frozen = {name: w for name, w in here.items() if not (name in whole and forward.whole)}
    # b times its scale, as well as b
    deltas = trained.values() if forward.deltas else ()
    scaled = sum(tree.n_bytes((leaf.b, leaf.m)) for leaf in deltas if isinstance(leaf, Delta))
    mesh, teacher = step.mesh, step.teacher
    second_model = local_bytes(step.reference, mesh)
    if teacher is not None:
        of_teacher = mesh.for_model(teacher.model.config)
        weights = resident(teacher.params, step.teacher_blocks)
        second_model = second_model + local_bytes(weights, of_teacher)
    return {
        "weights": local_bytes(frozen, mesh),
        "second model": second_model,
        "trained": local_bytes(trained, mesh) + scaled,
        "optimizer": optimizer_bytes,
        "batch": step.n_rows * step.n_tokens * BATCH_BYTES_PER_TOKEN + forward.shared_bytes,
    }


def head_bytes(forward: StepForward) -> tuple[int, int]:
    """(bytes of the sums of the head's gradient, the most that else is there while its losses are
    taken).

    The latter: the labelled rows, as they are and one after the other, and their gradients, which
    wait for the backward; a chunk of logits with their gradient and what the loss makes of the last
    slice, or with the gradient of the head.
    """
    step, params, row_bytes = forward.step, forward.params, tree.n_bytes(forward.x)
    head = step.model.head(params)
    trained = tree.n_bytes(with_gradient(head))
    # over the chunks a gradient is summed in float32
    sums = sum(4 * leaf.numel() for leaf in tree.leaves(head) if leaf.requires_grad)
    n = min(step.n_rows * step.mesh.own_tokens(step.n_tokens), head_chunk(head, trained > 0))
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


def with_gradient(leaves: Tree) -> list[Tensor]:
    """Leaves that have a gradient."""
    return [leaf for leaf in tree.leaves(leaves) if leaf.requires_grad]


def bytes_of(leaves: Mapping[str, Any], prefix: str, mesh: Mesh) -> int:
    """Bytes of the leaves of these names on a rank of a mesh."""
    chosen = {name: leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    return local_bytes(chosen, mesh)


def _positions(step: StepSpec, device: torch.device) -> TokenPositions:
    """Positions of the tokens of a rank, of rows that hold any number of documents."""
    shares = token_shares(step.mesh)
    n_all = step.mesh.n_sharers * step.mesh.own_tokens(step.n_tokens)  # the last rank's padded
    segment_ids = torch.empty(step.n_rows, n_all, dtype=torch.int32, device=device)
    where = TokenPositions(segment_ids.long(), step.n_tokens, document_keys(segment_ids))
    if shares is None:
        return where
    sharers = () if shares.context is None else shares.context.sharers
    return where._replace(positions=shares.of_mixer(where.positions), sharers=sharers)


def _leaf(x: Tensor) -> Tensor:
    """Leaf of a graph where x, made by apply_trainable, has a gradient."""
    return detached_leaves(x) if x.requires_grad else x
