"""Pure, stateless steps: `step.init(trainable) -> state`, `step.update(params, state, batch) ->
(state, metrics)`.

`train_step` makes one of any objective and any optimizer; every loss has its named step.
"""

from typing import TypedDict, Unpack

import torch

from minitune import tree
from minitune.algorithms.distillation import Teacher, TeacherLoss, distillation
from minitune.algorithms.division import divided
from minitune.algorithms.loss_scale import (
    LossScale,
    factor_of,
    inner_state,
    next_scale,
    scaled,
    with_scale,
)
from minitune.algorithms.micro_batches import micro_batches, summed_over_ranks
from minitune.algorithms.objective import Objective, checked_objective
from minitune.algorithms.preference import PreferenceLoss, preference
from minitune.algorithms.shared_state import apply_to_parts, begin_state
from minitune.algorithms.step_arguments import require_batch, require_parts
from minitune.algorithms.supervised import SupervisedLoss, sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.lora import Lora
from minitune.losses.distillation import ForwardKL
from minitune.losses.preference import ApoDown, ApoZero, Cpo, Dpo, Hinge, Ipo, Orpo, SimPO
from minitune.losses.token import CrossEntropy
from minitune.losses.unpaired import Kto
from minitune.models.model import Model
from minitune.optim.transforms import GradientTransformation
from minitune.sharding.collectives import norms_over_ranks
from minitune.sharding.ranks import ALONE, Ranks
from minitune.types import (
    AnyBatch,
    Metrics,
    Params,
    Step,
    Trainable,
    TrainState,
)


class StepOptions(TypedDict, total=False):
    """Keywords of train_step, which every named step takes too."""

    # rows of a forward and backward; None: all of the batch, or a rank's share of them
    micro_batch: int | None
    donate: bool  # whether the tensors of the state that is passed in are written over
    loss_scale: LossScale | None  # for parameters in float16
    # With ranks every process gets the same batch and takes its share of the micro-batches; without
    # them each process of a group gets rows of its own. Sums are over all processes either way.
    ranks: Ranks


def train_step(
    objective: Objective,
    optimizer: GradientTransformation,
    *,
    micro_batch: int | None = None,
    donate: bool = False,
    loss_scale: LossScale | None = None,
    ranks: Ranks = ALONE,
) -> Step:
    """Step of an objective under an optimizer, in micro-batches of `micro_batch` rows whose sums
    are divided once; None: one micro-batch, or one for each of the ranks that share out the batch.

    A step whose loss or gradient is not finite, or that has no target token at all, changes nothing
    and says so in metrics["skipped"]; metrics["not_finite"] is the number of the first leaf without
    a finite gradient, or -1. TypeError for no objective, optimizer or AnyBatch.
    """
    require_parts(objective, optimizer, micro_batch)

    def init(trainable: Trainable) -> TrainState:
        began = begin_state(optimizer, trainable)
        return TrainState(trainable, with_scale(began, loss_scale, trainable))

    def update(params: Params, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        require_batch(batch)
        parts = micro_batches(batch, micro_batch or ranks.share(len(tree.leaves(batch)[0])))
        factor = factor_of(state.opt_state, tree.leaves(parts[0])[0].shape.numel())
        checked = scaled(checked_objective(objective, batch.counts), factor)

        # sums over the batch: of losses, of what the objective reports, and of gradients
        (loss, reports), grads = summed_over_ranks(checked, state.trainable, params, parts, ranks)
        leaf_norms = norms_over_ranks(grads)
        sums = divided(loss, torch.linalg.vector_norm(leaf_norms), factor)
        trees = grads, inner_state(state.opt_state), state.trainable
        after = apply_to_parts(optimizer, *trees, **sums.of_gradients(), donate=donate)

        metrics = {name: mean.value() for name, mean in reports.items()}
        metrics |= sums.metrics(batch.counts, leaf_norms)
        return next_scale(loss_scale, state.opt_state, TrainState(*after), sums.norm, metrics)

    return Step(init, update)


def eval_step(objective: Objective) -> Objective:
    """Objective without its gradient, for evaluations."""
    return torch.no_grad()(objective)


def sft_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    loss: SupervisedLoss = CrossEntropy(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of supervised fine-tuning on a Batch: next-token cross-entropy, or a loss of yours;
    `how` is what train_step takes.
    """
    return train_step(sft(model, lora, loss), optimizer, **how)


def preference_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    loss: PreferenceLoss,
    reference: Trainable | None,
    **how: Unpack[StepOptions],
) -> Step:
    """Step of any loss over Pairs; reference as algorithms.preference takes it: the frozen
    trainable tree, {} for the base alone, None for losses without one.
    """
    return train_step(preference(model, lora, loss, reference), optimizer, **how)


def dpo_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: Dpo = Dpo(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of direct preference optimization on Pairs."""
    return preference_step(model, lora, optimizer, loss, reference, **how)


def ipo_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: Ipo = Ipo(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of identity preference optimization on Pairs."""
    return preference_step(model, lora, optimizer, loss, reference, **how)


def hinge_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: Hinge = Hinge(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of the hinge loss of RSO and SLiC on Pairs."""
    return preference_step(model, lora, optimizer, loss, reference, **how)


def apo_zero_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: ApoZero = ApoZero(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of anchored preference optimization on Pairs."""
    return preference_step(model, lora, optimizer, loss, reference, **how)


def apo_down_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: ApoDown = ApoDown(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of anchored preference optimization on Pairs whose chosen answers are worse than the
    model's own.
    """
    return preference_step(model, lora, optimizer, loss, reference, **how)


def simpo_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    loss: SimPO = SimPO(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of simple preference optimization on Pairs: no reference."""
    return preference_step(model, lora, optimizer, loss, None, **how)


def orpo_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    loss: Orpo = Orpo(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of odds-ratio preference optimization on Pairs: no reference."""
    return preference_step(model, lora, optimizer, loss, None, **how)


def cpo_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    loss: Cpo = Cpo(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of contrastive preference optimization on Pairs: no reference."""
    return preference_step(model, lora, optimizer, loss, None, **how)


def kto_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    reference: Trainable | None,
    loss: Kto = Kto(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of Kahneman-Tversky optimization on an UnpairedBatch."""
    return train_step(unpaired_preference(model, lora, loss, reference), optimizer, **how)


def kd_step(
    model: Model,
    lora: Lora | None,
    optimizer: GradientTransformation,
    teacher: Teacher | None,
    loss: TeacherLoss = ForwardKL(),  # noqa: B008 - a frozen struct
    **how: Unpack[StepOptions],
) -> Step:
    """Step of distillation on a Batch, or on a TeacherBatch without the teacher itself."""
    return train_step(distillation(model, lora, loss, teacher), optimizer, **how)
