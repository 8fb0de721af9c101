"""Proof, in the first steps of a run, that every weight that trains has a gradient and moves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune import hardware, tree
from minitune.algorithms.loss_scale import inner_state
from minitune.algorithms.objective import Objective
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.optim.schedules import ScaleBySchedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import Chain, ScaleByGlob
from minitune.programs.stages.training_stage import TrainingStage
from minitune.sharding.collectives import sum_over_ranks
from minitune.sharding.parts import local_parts
from minitune.tree import Tree
from minitune.types import Metrics, Params, Step, Trainable, TrainState

TakeStep = Callable[[], tuple[TrainState, Metrics]]
EPSILON = torch.finfo(torch.float32).eps
N_STEPS = 2  # LoRA's b moves in the first one, and with it a in the second


def watched_step(
    stage: TrainingStage,
    objective: Objective,
    one: Step,
    optimizer: Chain,
    params: Params,
) -> Callable[[Any, Any], tuple[Any, Metrics]]:
    """Step of a stage on (train_state, batch), whose first ones are watched; one: the step itself.

    Its metrics have the learning rate that is applied, which a skipped step does not advance.
    """
    micro_batch = stage.micro_batch_size or stage.batch_size
    schedule_at = [isinstance(part, ScaleBySchedule) for part in optimizer.parts].index(True)
    watch = watched(stage.label, objective, params, rate_function(stage), micro_batch)

    def step(train_state: Any, batch: Any) -> tuple[Any, Metrics]:
        before = TrainState(train_state["trainable"], train_state["opt_state"])
        n_taken = inner_state(before.opt_state)[schedule_at]
        lr = stage.optimizer.lr * stage.schedule.factor(n_taken, stage.steps)
        after, metrics = watch(before, batch, lambda: one.update(params, before, batch))
        return after._asdict(), {**metrics, "lr": lr}

    return step


def rate_function(stage: TrainingStage) -> Callable[[str], float]:
    """Function that gives about how far an element of a leaf moves in a first step; 0: unknown."""
    factor = float(stage.schedule.factor(torch.tensor(1), stage.steps))
    factors = ScaleByGlob(dict(stage.lr_factors))

    def rate_of(path: str) -> float:
        # plain gradient descent moves as far as the gradient is large
        is_scaled = not isinstance(stage.optimizer, SGD)
        return is_scaled * stage.optimizer.lr * factor * factors.path_factor(path)

    return rate_of


class WatchedAdapter(NamedTuple):
    """One adapter of a sweep as its first steps are watched."""

    objective: Objective
    rate_of: Callable[[str], float]
    take: Callable[[Tree], Trainable]  # stacked deltas -> those of this adapter


def watched_adapters(
    label: str,
    adapters: Sequence[WatchedAdapter],
    params: Params,
    micro_batch: int,
) -> Callable[[TrainState, Tree, TakeStep], tuple[TrainState, Metrics]]:
    """Function that takes a step of a sweep and looks at every weight of every adapter.

    watch(state, batch, step) is that of `watched`; leaves of the batch are [n, B, ...]. Messages
    name the adapter by its number.
    """
    first: list[dict[str, list[Tensor]]] = []
    taken: list[int] = []

    def watch(state: TrainState, batch: Tree, step: TakeStep) -> tuple[TrainState, Metrics]:
        if len(taken) == N_STEPS:
            return step()
        if not first:
            for i, adapter in enumerate(adapters):
                own = adapter.take(state.trainable)
                rows = tree.map(lambda x, i=i: x[i, :micro_batch], batch)
                require_gradients(f"{label}, adapter {i},", adapter.objective, own, params, rows)
                first.append(signatures(own))
        after, metrics = step()
        if not bool(metrics["skipped"].any()):
            taken.append(1)
        if len(taken) == N_STEPS:
            for i, adapter in enumerate(adapters):
                moved = signatures(adapter.take(after.trainable))
                require_moved(f"{label}, adapter {i},", first[i], moved, adapter.rate_of)
        return after, metrics

    return watch


def watched(
    label: str,
    objective: Objective,
    params: Params,
    rate_of: Callable[[str], float],
    micro_batch: int,
) -> Callable[[TrainState, Tree, TakeStep], tuple[TrainState, Metrics]]:
    """Function that takes a step and, for the first N_STEPS of them, looks at every weight.

    watch(state, batch, step) returns what step() does. InputError names a weight without a
    gradient before the first step, and one that did not move after the last. rate_of(path): about
    how far an element of a leaf moves in such a step; 0 where nobody can say.
    """
    first: dict[str, list[Tensor]] = {}
    taken: list[int] = []

    def watch(
        state: TrainState,
        batch: Tree,
        step: TakeStep,
    ) -> tuple[TrainState, Metrics]:
        if len(taken) == N_STEPS:
            return step()
        if not first:
            rows = tree.map(lambda x: x[:micro_batch], batch)
            require_gradients(label, objective, state.trainable, params, rows)
            first.update(signatures(state.trainable))
        after, metrics = step()
        if not float(metrics["skipped"]):
            taken.append(1)
        if len(taken) == N_STEPS:
            require_moved(label, first, signatures(after.trainable), rate_of)
        return after, metrics

    return watch


def require_gradients(
    label: str,
    objective: Objective,
    trainable: Trainable,
    params: Params,
    batch: Any,
) -> None:
    """InputError naming a weight whose gradient on a batch is zero while others have one.

    One of a delta's leaves is enough, and one of the experts of a layer: no token need be routed to
    the others. A batch without a target, a loss that is not finite and a loss at its minimum
    (a teacher that the student equals) prove nothing.
    """
    (mean, _), grads = value_and_grad(objective, has_aux=True)(trainable, params, batch)
    # a part of a weight may have none where others have
    own = torch.stack([g.any() for g in tree.leaves(local_parts(grads))]).int()
    found = sum_over_ranks(own).tolist()
    has_gradient = {path: n > 0 for (path, _), n in zip(tree.items(grads), found, strict=True)}
    if float(mean.weight) == 0 or not bool(torch.isfinite(mean.total)):
        return
    proven = {_group(path) for path, nonzero in has_gradient.items() if nonzero}
    dead = [path for path in has_gradient if _group(path) not in proven]
    if dead and proven:
        raise InputError(
            f"stages: {label} finds no gradient for {_group(dead[0])} ({len(dead)} tensors of "
            f"{len(has_gradient)}), expected one for all that trains: the loss does not depend on "
            "it; leave it out of what the lora or full stage trains"
        )


def signatures(trainable: Tree) -> dict[str, list[Tensor]]:
    """Two sums of every leaf, which differ where it has moved, and the least step that it can show.

    That is twice the distance of float32 numbers at the leaf's largest value, and without bound in
    narrower dtypes, which are rounded at random.
    """
    sums: dict[str, list[Tensor]] = {}
    for path, leaf in tree.items(local_parts(trainable)):
        wide = hardware.widest_float(leaf.device)
        # a rank may hold nothing of a leaf
        magnitude = leaf.abs() if leaf.numel() else leaf.new_zeros(1)
        least = 2 * EPSILON * magnitude.amax().to(wide)
        if leaf.dtype.itemsize < 4:
            least = torch.full_like(least, torch.inf)
        sums[path] = [leaf.sum(dtype=wide), magnitude.sum(dtype=wide), least]
    return sums


def require_moved(
    label: str,
    before: Mapping[str, list[Tensor]],
    after: Mapping[str, list[Tensor]],
    rate_of: Callable[[str], float],
) -> None:
    """InputError naming a weight none of whose leaves has changed, given two `signatures`.

    Leaves whose rate is too small to show may stay where they are.
    """
    differs = torch.tensor([_differ(sums, after[path]) for path, sums in before.items()])
    on_any_rank = sum_over_ranks(differs.int()).tolist()
    moved = {_group(path) for path, n in zip(before, on_any_rank, strict=True) if n}
    unmoved = {path: sums[2] for path, sums in before.items() if _group(path) not in moved}
    still = [path for path, least in unmoved.items() if rate_of(path) > float(least)]
    if still:
        raise InputError(
            f"stages: {label} has not moved {_group(still[0])} in {N_STEPS} steps "
            f"({len(still)} tensors of {len(before)}), expected all that trains to move; "
            "look at optimizer, lr_factors and schedule"
        )


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return any(bool(a != b) for a, b in zip(before[:2], after[:2], strict=True))


def _group(path: str) -> str:
    """Weight that a leaf belongs to; of experts the layer's, some of which get no token."""
    name = path.removesuffix(".a").removesuffix(".b").removesuffix(".m")
    layer, experts, _ = name.partition(".experts.")
    return layer + ".experts" if experts else name
