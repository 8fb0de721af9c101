"""Histograms of gradients and parameters during training, for the trackers that draw them."""

from collections.abc import Callable

import torch

from minitune import tree
from minitune.algorithms.objective import Objective
from minitune.autodiff.value_and_grad import accumulate, value_and_grad
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.trackers.tracker import Histogram
from minitune.tree import Tree
from minitune.types import Params, Trainable

N_BINS = 64  # as wandb.watch draws


def nothing_watched(step: int, trainable: Trainable, batch: Tree) -> None:
    """Nothing: of a program without [log] watch."""


def watcher(
    stage: TrainingStage, state: PipelineState, objective: Objective
) -> Callable[[int, Trainable, Tree], None]:
    """Function (step, trainable, batch) that gives histograms to the trackers when they are due.

    The gradients are those of the step that follows, before it is clipped. They cost one more step
    each time: 1 % with every = 100.
    """
    rule = state.log.watch
    n_rows = stage.micro_batch_size or stage.batch_size
    if rule is None:
        return nothing_watched

    def watch(step: int, trainable: Trainable, batch: Tree) -> None:
        if step % rule.every:
            return
        found: dict[str, Histogram] = {}
        if rule.log in ("gradients", "all"):
            grads = mean_gradients(objective, trainable, state.loaded.params, batch, n_rows)
            found |= {f"gradients/{path}": histogram(g) for path, g in tree.items(grads)}
        if rule.log in ("parameters", "all"):
            found |= {f"parameters/{path}": histogram(w) for path, w in tree.items(trainable)}
        state.log.histograms(step, found)

    return watch


def mean_gradients(
    objective: Objective, trainable: Trainable, params: Params, batch: Tree, n_rows: int
) -> Tree:
    """Gradients of the mean loss of a batch, in parts of n_rows rows."""
    evaluated = value_and_grad(objective, has_aux=True)
    total = len(tree.leaves(batch)[0])
    parts = [tree.map(lambda x, i=i: x[i : i + n_rows], batch) for i in range(0, total, n_rows)]
    (loss, _), grads = accumulate(lambda rows: evaluated(trainable, params, rows), parts)
    return tree.map(lambda g: g / loss.weight.clamp(min=1.0), grads)


def histogram(x: torch.Tensor) -> Histogram:
    """Counts of the finite values of a tensor in N_BINS bins between its least and largest one."""
    values = x.detach().float().cpu().flatten()
    values = values[torch.isfinite(values)]
    if not values.numel():
        return Histogram([0.0], [0.0, 1.0])
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = torch.histogram(values, bins=N_BINS, range=(low, high))
    return Histogram(counts.tolist(), edges.tolist())
