"""Distillation from a teacher."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from minitune.algorithms.objective import (
    Objective,
    apply_trainable,
    require_loss,
    required,
    with_draws,
)
from minitune.lora import Lora
from minitune.losses.base import Logits, Nats
from minitune.models.model import Model
from minitune.nn.head import by_rows
from minitune.types import Batch, Mean, Params, SeededBatch, TeacherBatch, Trainable


@runtime_checkable
class TeacherLoss(Protocol):
    """Loss of tokens beside a teacher: a struct of losses.DistillationLoss, or one of yours."""

    def __call__(self, logits: Logits, targets: Tensor, teacher_logits: Logits, /) -> Nats:
        """One value a row, in nats, given all logits of the teacher."""
        ...

    def on_top(self, logits: Logits, targets: Tensor, top_ids: Tensor, top_logps: Tensor) -> Nats:
        """One value a row, in nats, given the teacher's log-probs [rows k] of k tokens."""
        ...


class Teacher(NamedTuple):
    """Frozen model to learn from, in its own dtype and on its own device."""

    model: Model
    params: Params


def distillation(
    model: Model, lora: Lora | None, loss: TeacherLoss, teacher: Teacher | None
) -> Objective:
    """Objective of learning from a teacher's distribution over every labelled token, live or as
    each batch carries it (TeacherBatch): the sum of the losses of these tokens, in nats, and how
    many there are.

    Neither model's whole logits ever exist: the teacher's hidden states pass its head in chunks,
    as the student's do. Where the two heads differ in rows, both are cut to the smaller: the rows
    beyond the tokenizer that they share stand for no token.
    """
    require_loss(loss, ("on_top",), "an instance of a TeacherLoss, such as losses.ForwardKL()")
    n_tokens = model.config.vocab_size
    if teacher is not None:
        n_tokens = min(n_tokens, teacher.model.config.vocab_size)

    def objective(
        trainable: Trainable, params: Params, batch: Batch | TeacherBatch | SeededBatch
    ) -> tuple[Mean, dict[str, Mean]]:
        drawing, rows = with_draws(model, lora, batch, Batch, TeacherBatch)
        adapted = apply_trainable(params, trainable, lora)
        if isinstance(rows, TeacherBatch):
            tops = (rows.top_ids, rows.top_logps)
            on_top = by_rows(lambda y, t, top: loss.on_top(y[..., :n_tokens], t, *top))
            nats = drawing.token_losses(adapted, rows.rows, on_top, tops, summed=True)
            return Mean.of(nats, rows.rows.target_mask()), {}
        frozen = required(teacher, "distillation")
        with torch.no_grad():
            # hidden[t] predicts token t + 1: aligned with the targets
            teacher_hidden = frozen.model.hidden(frozen.params, rows).roll(1, 1)

        def divergence(logits: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
            teacher_logits = frozen.model.logits(frozen.params, hidden)
            both = logits[..., :n_tokens], targets, teacher_logits[..., :n_tokens].to(logits.device)
            return by_rows(loss)(*both)

        nats = drawing.token_losses(adapted, rows, divergence, teacher_hidden, summed=True)
        return Mean.of(nats, rows.target_mask()), {}

    return objective
