"""Objectives: how a forward and a loss make a number to differentiate: (trainable, params, batch) -> (Mean, extras)."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitune import hardware, ops, tree
from minitune.hardware import to_device
from minitune.lora import Lora
from minitune.losses.base import BaseLoss, ObjectiveName
from minitune.losses.registry import DistillationLoss, TokenLoss, UnpairedLoss
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.types import Batch, Delta, InputError, Judged, LogProbs, Mean, Pairs, Params, Taught, Trainable

Objective = Callable[[Trainable, Params, Any], tuple[Mean, dict[str, Mean]]]


@runtime_checkable
class PreferenceLoss(Protocol):
    """What a loss over pairs of answers must do: every struct of losses.PairLoss does, and so may your own class."""

    needs_reference: ClassVar[bool]

    def rewards(self, policy: LogProbs, reference: LogProbs | None) -> tuple[Tensor, Tensor]:
        """The implicit rewards of chosen and rejected, [B] each."""
        ...

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Tensor:
        """One loss a pair [B], in nats."""
        ...


class Teacher(NamedTuple):
    """A frozen model to learn from, in its own dtype and on its own device."""

    model: Model
    params: Params


class Frozen(NamedTuple):
    """What an objective compares a model with; a loss says which of these it needs."""

    reference: Trainable | None = None  # the trainable tree as it was when training began; {}: the parameters alone
    teacher: Teacher | None = None


def apply_trainable(params: Params, trainable: Trainable, lora: Lora | None) -> Params:
    """Parameters for a forward: a trainable tensor replaces the weight of its name, cast to that weight's dtype, and a Delta
    adapts it by the rule. TypeError for deltas without a rule, InputError for a weight that trains whole and is not there.

    Where either dtype is a bfloat16 that the device does not multiply, nothing is cast: `ops.linear` takes both as they are.
    """
    deltas = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Delta)}
    missing = next((name for name, w in params.items() if isinstance(w, Tensor) and w.is_meta and name not in trainable), None)
    if missing is not None:
        raise InputError(f"objectives: {missing} is trained whole, but the trainable tree does not hold it")
    whole = {name: leaf for name, leaf in trainable.items() if isinstance(leaf, Tensor)}
    replaced = {name: leaf.to(_multiplied_dtype(leaf, params[name].dtype)) for name, leaf in whole.items()}
    if deltas and lora is None:
        raise TypeError(f"objectives: {next(iter(deltas))} is a Delta, expected a Lora rule beside it")
    whole = {**params, **replaced}
    return whole if lora is None else lora.apply(whole, deltas)


def sft(model: Model, lora: Lora | None, loss: TokenLoss = CrossEntropy()) -> Objective:  # noqa: B008 - a frozen struct
    """Supervised fine-tuning: the loss of every labelled token given those before it."""

    def objective(trainable: Trainable, params: Params, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        nats = model.token_losses(apply_trainable(params, trainable, lora), batch, loss, summed=True)
        return Mean.of(nats, batch.labelled()), {}

    return objective


def preference(model: Model, lora: Lora | None, loss: PreferenceLoss, reference: Trainable | None) -> Objective:
    """Learning from pairs of answers: one forward for chosen and rejected, and one without gradient for the reference.

    reference: the frozen trainable tree to compare with, {} for the parameters without deltas; None for a loss that
    compares with nothing, or when every batch carries the reference's log-probs.
    """

    def objective(trainable: Trainable, params: Params, pairs: Pairs) -> tuple[Mean, dict[str, Mean]]:
        frozen = None
        if loss.needs_reference and not isinstance(pairs.reference, Tensor):
            with torch.no_grad():  # first: what the policy keeps for its backward is not there yet
                frozen = pair_logps(model, apply_trainable(params, required(reference, "preference"), lora), pairs)
        policy = pair_logps(model, apply_trainable(params, trainable, lora), pairs)
        if loss.needs_reference and isinstance(pairs.reference, Tensor):
            cached = to_device(pairs.reference, policy.chosen.device)
            frozen = policy._replace(chosen=cached[:, 0], rejected=cached[:, 1])
        chosen, rejected = loss.rewards(policy, frozen)
        readings = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).to(chosen.dtype),
            "logp_chosen_nats": policy.chosen,
            "logp_rejected_nats": policy.rejected,
        }
        return _mean(loss(policy, frozen)), {name: _mean(x) for name, x in readings.items()}

    return objective


def unpaired_preference(model: Model, lora: Lora | None, loss: UnpairedLoss, reference: Trainable | None) -> Objective:
    """Learning from single answers, each found desirable or not (KTO); the reference is given as for `preference`.

    The mismatched answers of a micro-batch estimate how far the policy has drifted from the reference.
    """

    def objective(trainable: Trainable, params: Params, judged: Judged) -> tuple[Mean, dict[str, Mean]]:
        rows = judged.answers, judged.mismatched
        adapted = apply_trainable(params, trainable, lora)
        with torch.no_grad():  # first: what the policy keeps for its backward is not there yet
            drifted = answer_logps(model, adapted, rows[1])
            if isinstance(judged.reference, Tensor):
                frozen, held = to_device(judged.reference, drifted.device).unbind(1)
            else:
                base = apply_trainable(params, required(reference, "unpaired_preference"), lora)
                frozen, held = (answer_logps(model, base, one) for one in rows)
            kl = (drifted - held).mean().clamp(min=0.0)
        policy = answer_logps(model, adapted, rows[0])
        rewards, desirable = loss.rewards(policy, frozen), to_device(judged.desirable, policy.device)
        readings = {
            "reward_desirable": Mean.of(rewards, desirable),
            "reward_undesirable": Mean.of(rewards, ~desirable),
            "kl_nats": _mean(kl.expand_as(policy)),
        }
        return _mean(loss(policy, frozen, desirable, kl)), tree.map(Tensor.detach, readings)

    return objective


def distillation(model: Model, lora: Lora | None, loss: DistillationLoss, teacher: Teacher | None) -> Objective:
    """Learning from a teacher's distribution over every labelled token: live, or what each batch carries of it (Taught).

    Neither model's whole logits ever exist: the teacher's hidden states go through its head chunk by chunk, as the student's do.
    """

    def objective(trainable: Trainable, params: Params, batch: Batch | Taught) -> tuple[Mean, dict[str, Mean]]:
        adapted = apply_trainable(params, trainable, lora)
        if isinstance(batch, Taught):
            tops = (batch.top_ids, batch.top_logps)
            on_top = ops.by_rows(lambda y, t, top: loss.on_top(y, t, *top))
            nats = model.token_losses(adapted, batch.rows, on_top, tops, summed=True)
            return Mean.of(nats, batch.rows.labelled()), {}
        frozen = required(teacher, "distillation")
        with torch.no_grad():
            teacher_hidden = frozen.model.hidden(frozen.params, batch)
            teacher_hidden = teacher_hidden.roll(1, 1)  # hidden[t] predicts token t + 1: aligned with the targets

        def divergence(logits: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
            teacher_logits = frozen.model.logits(frozen.params, hidden)
            return ops.by_rows(loss)(logits, targets, teacher_logits.to(logits.device))

        nats = model.token_losses(adapted, batch, divergence, teacher_hidden, summed=True)
        return Mean.of(nats, batch.labelled()), {}

    return objective


OBJECTIVES: dict[ObjectiveName, Callable[[Model, Lora | None, Any, Frozen], Objective]] = {
    "supervised": lambda model, lora, loss, frozen: sft(model, lora, loss),
    "preference": lambda model, lora, loss, frozen: preference(model, lora, loss, frozen.reference),
    "unpaired_preference": lambda model, lora, loss, frozen: unpaired_preference(model, lora, loss, frozen.reference),
    "distillation": lambda model, lora, loss, frozen: distillation(model, lora, loss, frozen.teacher),
}


def objective_of(model: Model, lora: Lora | None, loss: BaseLoss, frozen: Frozen) -> Objective:
    """Objective that a loss declares, with what it compares the model with."""
    return OBJECTIVES[loss.objective](model, lora, loss, frozen)


def quantization_aware(objective: Objective, fake: Callable[[Trainable], Trainable]) -> Objective:
    """The objective at the weights as they will be once quantized; `fake` rounds them and passes gradients straight through."""
    return lambda trainable, params, batch: objective(fake(trainable), params, batch)


def answer_logps(model: Model, params: Params, rows: Batch) -> Float[Tensor, "B"]:
    """log p of each row's labelled tokens given those before them, summed, in nats."""
    return -model.token_losses(params, rows, CrossEntropy()).sum(1)


def pair_logps(model: Model, params: Params, pairs: Pairs) -> LogProbs:
    """Log-probs of chosen and rejected answers from one forward over both."""
    width = max(pairs.chosen.tokens.shape[1], pairs.rejected.tokens.shape[1])
    padded = (tree.map(lambda x: F.pad(x, (0, width - x.shape[1])), rows) for rows in (pairs.chosen, pairs.rejected))
    rows = tree.map(lambda x, y: torch.cat([x, y]), *padded)
    logps = answer_logps(model, params, rows)
    n_tokens = to_device(rows.labelled().sum(1), logps.device).to(logps.dtype)
    return LogProbs(*logps.chunk(2), *n_tokens.chunk(2))


def split_trainable(
    params: Params, globs: tuple[str, ...], stored: Params | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Params, Trainable]:
    """(params, trainable) for training chosen weights whole: copies to train, and the originals freed.

    stored: the same weights before they were cast to the dtype of compute, which is what the copies are then made of.

    A trained weight stays in params as dtype and shape alone (on the meta device): it says what to cast to and holds no memory.
    """
    names = tree.select(params, globs, "full: weights")
    trainable = {name: (stored or {}).get(name, params[name]).to(params[name].device, dtype, copy=True) for name in names}
    return {**params, **{name: params[name].to("meta") for name in names}}, trainable


def _multiplied_dtype(leaf: Tensor, computed: torch.dtype) -> torch.dtype:
    """The dtype in which a forward takes a trained leaf whose weight was loaded as `computed`."""
    emulated = any(hardware.product_dtype(dtype, leaf.device) != dtype for dtype in (leaf.dtype, computed))
    return leaf.dtype if emulated else computed


def _mean(x: Float[Tensor, "B"]) -> Mean:
    return Mean.of(x, torch.ones_like(x, dtype=torch.bool))


def required(value: Any, name: str) -> Any:
    """The value, which is not None; TypeError names the objective that lacks it."""
    if value is None:
        raise TypeError(f"objectives: {name} has nothing frozen to compare with, expected it as an argument or in the batch")
    return value
