"""Objective: a function (trainable, params, batch) -> (Mean, reports), and what several of them
share.
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from minitune import hardware, tree
from minitune.autodiff.value_and_grad import detached_leaves, require_scalars, total_of
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.token import cross_entropy
from minitune.models.draws import Draws, with_dropout
from minitune.models.model import Model
from minitune.types import AnyBatch, Batch, Delta, Mean, Params, SeededBatch, Trainable


@runtime_checkable
class Objective(Protocol):
    """Function that a step minimizes: pure, of the trees that train, the frozen parameters and a
    batch.

    Its trainable tree comes first, by which `value_and_grad` differentiates.
    """

    # a batch of any kind would be more than an objective promises: each takes its own
    def __call__(
        self, trainable: Trainable, params: Params, batch: Any, /
    ) -> tuple[Mean, dict[str, Mean]]:
        """(sum of the losses of these rows and how much they weigh, what else to report by its name
        in metrics): the step adds up micro-batches and processes, and divides once.
        """
        ...


# what a step itself reports, beside the weight under the name that the batch counts in
METRICS = ("loss_nats", "grad_norm", "skipped", "not_finite", "loss_scale")


def checked_objective(objective: Objective, counts: str) -> Objective:
    """Objective whose result is looked at: TypeError for what is no (Mean, reports) of scalars, and
    for a report under a name that the step uses itself; counts: the batch's own.
    """

    def checked(trainable: Trainable, params: Params, batch: Any) -> tuple[Mean, dict[str, Mean]]:
        result = objective(trainable, params, batch)
        total = total_of(result, has_aux=True)
        mean, reports = result
        require_scalars(mean, total)
        if not isinstance(reports, dict):
            raise TypeError(
                f"objective: the reports are a {type(reports).__name__}, expected a dict of Means "
                "by their names in metrics; {} reports nothing"
            )
        for name, report in reports.items():
            if name in (*METRICS, counts):
                raise TypeError(
                    f"objective: a report is named {name!r}, which is a metric of every step, "
                    "expected a name of its own"
                )
            if not isinstance(report, Mean):
                raise TypeError(
                    f"objective: the report {name!r} is a {type(report).__name__}, expected a "
                    "Mean; Mean.of(values, mask) makes one"
                )
            require_scalars(report, report.total)
        return result

    return checked


def require_loss(loss: object, names: tuple[str, ...], expected: str) -> None:
    """TypeError for a loss that can't be called or lacks one of these names."""
    is_class = isinstance(loss, type)
    missing = [name for name in names if not hasattr(loss, name)]
    if callable(loss) and not is_class and not missing:
        return
    found = f"the class {loss.__name__}" if is_class else f"a {type(loss).__name__}"
    without = f" without {' and '.join(missing)}" if missing else ""
    raise TypeError(f"objective: the loss is {found}{without}, expected {expected}")


def apply_trainable(params: Params, trainable: Trainable, lora: Lora | None) -> Params:
    """Parameters for a forward: a trainable tensor replaces the weight of its name, cast to that
    weight's dtype, and a Delta adapts it by the rule. TypeError for deltas without a rule,
    InputError for a weight that trains whole and is not there.

    Where either dtype is a bfloat16 that the device does not multiply, nothing is cast:
    `linear.linear` takes both as they are.
    """
    deltas = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    missing = next(
        (
            name
            for name, w in params.items()
            # a fake tensor of the meta device stands for a weight that is there
            if type(w) is Tensor and w.is_meta and name not in trainable
        ),
        None,
    )
    if missing is not None:
        raise InputError(
            f"objective: {missing} is trained whole, but the trainable tree does not hold it"
        )
    whole = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    replaced = {
        name: leaf.to(_multiplied_dtype(leaf, params[name].dtype)) for name, leaf in whole.items()
    }
    if deltas and lora is None:
        raise TypeError(f"objective: {next(iter(deltas))} is a Delta, expected a Lora rule for it")
    whole = {**params, **replaced}
    return whole if lora is None else lora.apply(whole, deltas)


def forward_params(
    params: Params,
    trainable: Trainable,
    lora: Lora | None,
    n_rows: int,
) -> Params:
    """Parameters as a forward of n_rows in a training step has them, so that it can be measured."""
    adapted = apply_trainable(params, detached_leaves(trainable), lora)
    if lora is None or not trainable:
        return adapted
    seeds = torch.zeros(n_rows, dtype=torch.int64, device=tree.device_of(params, trainable))
    return with_dropout(adapted, seeds, n_rows, (lora.dropout,))


def with_draws(model: Model, lora: Lora | None, batch: AnyBatch, *kinds: type) -> tuple[Model, Any]:
    """(model, rows) of a training step: the model draws from the seeds of a SeededBatch.

    Rows without seeds are those of an evaluation. TypeError for such rows where a gradient is to be
    taken through a model or a rule that draws: a training without its dropout would not be seen.
    TypeError for rows that are of none of these kinds and lack what the first of them has.
    """
    rate = lora.dropout if lora is not None else 0.0
    if isinstance(batch, SeededBatch):
        model, batch = model._replace(draws=Draws(batch.seeds, (rate,))), batch.rows
    else:
        require_no_draws(model, rate)
    if not isinstance(batch, kinds):
        require_fields(batch, kinds[0])
    return model, batch


def require_fields(rows: object, kind: type) -> None:
    """TypeError for rows without a field or a method that a batch of this kind has."""
    names = [name for name in dir(kind) if not name.startswith("_") and not hasattr(tuple, name)]
    missing = [name for name in names if not hasattr(rows, name)]
    if missing:
        raise TypeError(
            f"objective: the batch is a {type(rows).__name__} without {', '.join(missing)}, "
            f"expected a {kind.__name__} or what has all that one has; give it these, or write an "
            "objective of your own for it"
        )


def require_no_draws(model: Model, rate: float) -> None:
    """TypeError for rows without seeds of which a gradient is to be taken with dropout or noise."""
    if torch.is_grad_enabled() and (rate or model.neftune_alpha):
        what = f"lora.dropout = {rate}" if rate else f"neftune_alpha = {model.neftune_alpha}"
        raise TypeError(
            f"objective: {what} is drawn from seeds of the rows, and the batch has none, expected "
            "dropout.seeded(batch, seed, step) in training, and torch.no_grad() in evaluation"
        )


def answer_logps(model: Model, params: Params, rows: Batch) -> Float[Tensor, "B"]:
    """log p of each row's labelled tokens given those before them, summed, in nats."""
    return -model.token_losses(params, rows, cross_entropy).sum(1)


def split_trainable(
    params: Params,
    globs: tuple[str, ...],
    stored: Params | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Params, Trainable]:
    """(params, trainable) for training chosen weights whole: copies to train, and the originals
    freed.

    stored: the same weights before they were cast to the dtype of compute, which is what the copies
    are then made of. InputError for weights that are codes.

    A trained weight stays in params as dtype and shape alone (on the meta device): it says what to
    cast to and holds no memory.
    """
    names = tree.select(params, globs, "full: weights")
    _require_dense(params, names)
    trainable = {
        name: (stored or {}).get(name, params[name]).to(params[name].device, dtype, copy=True)
        for name in names
    }
    return {**params, **{name: params[name].to("meta") for name in names}}, trainable


def _require_dense(params: Params, names: Iterable[str]) -> None:
    """InputError for a weight that is codes, which can't train."""
    for name in names:
        leaf = params[name]
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"full: {name} {list(leaf.shape)} is a {type(leaf).__name__}, expected a dense "
                "weight, because codes don't train; train deltas beside them, or a dense base"
            )


def _multiplied_dtype(leaf: Tensor, computed: torch.dtype) -> torch.dtype:
    """Dtype in which a forward takes a trained leaf whose weight was loaded as `computed`."""
    emulated = any(
        hardware.product_dtype(dtype, leaf.device) != dtype for dtype in (leaf.dtype, computed)
    )
    return leaf.dtype if emulated else computed


def mean_of(x: Float[Tensor, "B"]) -> Mean:
    """Mean over all rows."""
    return Mean.of(x, torch.ones_like(x, dtype=torch.bool))


def required(value: Any, name: str) -> Any:
    """Value, which is not None; TypeError names the objective that lacks it."""
    if value is None:
        raise TypeError(
            f"objective: {name} has nothing frozen to compare with, expected it as an argument or "
            "in the batch"
        )
    return value
