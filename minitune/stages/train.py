"""The stage that takes optimizer steps. The step is the only clock: it drives data, schedule, saves, evaluations and logs."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from minitune import checkpoint, grad, objectives, optim, tree
from minitune.data import Cursor
from minitune.losses import CrossEntropy, DistillationLoss, Kto, Loss, PairLoss, TokenLoss
from minitune.models import Model
from minitune.objectives import Objective, Teacher
from minitune.stages import sweeping
from minitune.stages.base import BaseStage, Positive, device_of, peak_mem_bytes
from minitune.stages.feed import feed
from minitune.steps import Step, eval_step, train_step
from minitune.types import InputError, Mean, Metrics, Trainable
from minitune.world import Draft, ModelSource, Stopped, World, asked_data, drafted, load

SKIPS = 20  # consecutive steps without a finite gradient after which a run stops


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training loss on held-out data every `every` steps."""

    data: str
    every: Positive  # steps
    patience: Positive | None = None  # stop after so many evaluations in a row without a new best; never if absent
    keep: Literal["best", "last"] = "best"  # what goes on to the next stage
    batch_size: Positive = 64  # rows per forward


class Train(BaseStage, frozen=True, kw_only=True, tag="train"):
    """Take optimizer steps on the trainable tree, by whatever loss."""

    data: str
    steps: Positive
    batch_size: Positive  # rows (or pairs) per optimizer step
    micro_batch_size: Positive | None = None  # rows per forward; the whole batch if absent
    loss: Loss = CrossEntropy()
    reference: Literal["start", "base", "cached"] = "start"  # of a preference loss: the model as this stage found it, live or its
    # log-probs computed once; or the parameters without deltas
    teacher: ModelSource | None = None  # of a distillation loss
    cached_top_k: Positive | None = None  # ask the teacher once, and keep its k likeliest tokens on disk
    optimizer: optim.Optimizer = optim.AdamW(lr=1e-4)
    lr_factors: dict[str, optim.NonNegative] = msgspec.field(
        default_factory=dict
    )  # glob over trained leaves -> factor; {"*.b" = 16.0} is LoRA+
    schedule: optim.Schedule = optim.Constant()
    clip_norm: optim.NonNegative = 1.0  # largest norm of the whole gradient; 0 leaves it as it is
    evaluate: Evaluation | None = None
    save_every: Positive = 100  # steps
    remat: bool = False  # recompute each block in the backward: less memory, a third more work
    sweep: sweeping.Sweep | None = None  # train an adapter for every point of a grid at once; the best goes on

    def check(self, draft: Draft) -> Draft:
        """Something trains, the data has the format that the loss needs, and a teacher speaks the student's vocabulary."""
        if not draft.adapted and not draft.whole:
            raise InputError(f"stages: {self.label} finds nothing to train, expected a lora or full stage before it")
        for name in (self.data, *([self.evaluate.data] if self.evaluate else [])):
            asked_data(draft, name, self.label, *self._formats)
        if isinstance(self.loss, DistillationLoss) != (self.teacher is not None):
            raise InputError(
                f"stages: {self.label} has {'no teacher' if self.teacher is None else 'a teacher'}, expected one exactly with a "
                "distillation loss (forward_kl, reverse_kl, symmetric_kl, jensen_shannon)"
            )
        if self.teacher is not None:
            wise = drafted(self.teacher, draft)
            ours, theirs = draft.model.config.vocab_size, wise.model.config.vocab_size
            if ours != theirs:
                raise InputError(
                    f"stages: {self.label} has a student of {ours} tokens and a teacher of {theirs}, expected one vocabulary"
                )
        if self.reference == "base" and isinstance(self.loss, PairLoss | Kto) and draft.whole:
            raise InputError(
                f"stages: {self.label} has reference = 'base', but {min(draft.whole)} trains whole; expected 'start' or 'cached'"
            )
        if isinstance(self.loss, Kto) and min(self.batch_size, self.micro_batch_size or self.batch_size) < 2:
            raise InputError(
                f"stages: {self.label} has a batch of one answer, expected two: kto compares the answers of a micro-batch"
            )
        if self.sweep is not None:
            sweeping.check(self, draft)
        return draft

    @property
    def _formats(self) -> tuple[str, ...]:
        if isinstance(self.loss, Kto):
            return ("judged",)
        return ("pairs",) if isinstance(self.loss, PairLoss) else ("instruct", "chat", "text")

    def run(self, world: World) -> World:
        """world with the trained tree; continues from the newest state in the run folder."""
        if self.sweep is not None:
            return sweeping.run(self, world, self._model(world), Train._optimizer)
        folder = world.folder / "checkpoints" / self.label
        start = world.loaded.trainable
        optimizer = self._optimizer()
        if any(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(start)):
            optimizer = optim.chain(*optimizer.parts, optim.RoundStochastically(world.seed))
        state, marks = {"trainable": start, "opt_state": optimizer.init(start)}, _Marks()
        if saved := checkpoint.committed(folder):
            state, meta = checkpoint.load_state(saved[-1], state)
            marks = msgspec.convert(meta["marks"], _Marks)
            world.log.say(f"{self.label}: continuing from step {marks.step} of {self.steps}")
        world.log.rewind(marks.step)
        if not marks.over(self):
            state, marks = self._train(world, state, marks, optimizer, folder)
        trainable = state["trainable"]
        if self.evaluate is not None and self.evaluate.keep == "best":
            if marks.best_nats is None:
                raise InputError(
                    f"stages: {self.label} had no finite held-out loss in {marks.step} steps; lower the learning rate"
                )
            best = folder / "best" / f"step-{marks.best_step:08d}"
            trainable = checkpoint.load_state(best, {"trainable": trainable})[0]["trainable"]
            world.log.say(f"{self.label}: step {marks.best_step} was the best, held-out loss {marks.best_nats:.4f}")
        return world.with_model(trainable=trainable).record(self.label, self._record(marks))

    def _train(self, world: World, state: Any, marks: "_Marks", optimizer: optim.Chain, folder: Path) -> tuple[Any, "_Marks"]:
        objective, teacher = self._objective(world)
        fed = feed(world, self.data, self.loss, cached=self.reference == "cached", teacher=teacher, top_k=self.cached_top_k)
        world.log.say(f"{self.label}: {self.data} has {fed.told}")
        # donated: the trees are this stage's own, and the ones before the step are never asked for again, but as a reference
        step: Step = train_step(objective, optimizer, micro_batch=self.micro_batch_size or self.batch_size, donate=True)
        state = tree.map(torch.clone, state) if isinstance(self.loss, PairLoss | Kto) else state
        skips, device = 0, device_of(world.loaded.params, state["trainable"])
        with world.log.progress(self.label, self.steps, marks.step) as progress:
            while not marks.over(self):
                started = time.perf_counter()
                batch, cursor = fed.take(Cursor(*marks.cursor), self.batch_size)
                batch = tree.map(lambda x: x.to(device), batch)
                trainable, opt_state, metrics = step(world.loaded.params, state["trainable"], state["opt_state"], batch)
                state = {"trainable": trainable, "opt_state": opt_state}
                row = self._row(marks.step + 1, metrics)
                n_tokens, time_s = fed.n_tokens(batch), time.perf_counter() - started
                marks = marks.after(cursor, time_s, n_tokens, int(row["skipped"]), peak_mem_bytes(device))
                row = {**row, "tokens_per_second": n_tokens / time_s, "mem_bytes": marks.peak_mem_bytes}
                progress.update(marks.step, {key: row[key] for key in ("loss", "lr", "tokens_per_second", "mem_bytes")})
                if self.evaluate is not None and (marks.step % self.evaluate.every == 0 or marks.step == self.steps):
                    nats = self._heldout(world, objective, trainable, teacher, self.evaluate)
                    row, marks = {**row, "heldout_loss": nats}, self._judged(marks, nats, trainable, folder / "best")
                world.log.metrics(marks.step, row)

                skips = skips + 1 if row["skipped"] else 0
                stopping, over = world.stopping(), marks.over(self)
                if stopping or skips == SKIPS or over or marks.step % self.save_every == 0:
                    checkpoint.save_state(folder, marks.step, state, {"marks": msgspec.to_builtins(marks)})
                if stopping and not over:
                    raise Stopped(marks.step, folder)
                if skips == SKIPS:
                    raise InputError(
                        f"stages: {self.label} had {SKIPS} steps in a row without a finite gradient or a target token, "
                        f"up to step {marks.step}; they changed nothing. Lower the learning rate, or look at the data"
                    )
        return state, marks

    def _optimizer(self) -> optim.Chain:
        clip = [optim.ClipByGlobalNorm(self.clip_norm)] if self.clip_norm else []
        factors = [optim.ScaleByGlob(self.lr_factors)] if self.lr_factors else []
        return optim.chain(*clip, self.optimizer, *factors, optim.ScaleBySchedule(self.schedule, self.steps))

    def _objective(self, world: World) -> tuple[Objective, Teacher | None]:
        loaded, model, teacher = world.loaded, self._model(world), None
        if isinstance(self.loss, TokenLoss):
            objective = objectives.sft(model, self.loss, loaded.lora)
        elif isinstance(self.loss, DistillationLoss):
            teacher = self._teacher(world)
            objective = objectives.distillation(model, self.loss, loaded.lora, teacher)
        else:
            reference = {} if self.reference == "base" or not _moved(loaded.trainable) else loaded.trainable
            kind: Any = objectives.judgement if isinstance(self.loss, Kto) else objectives.preference
            objective = kind(model, self.loss, loaded.lora, reference)
        return (objectives.quantization_aware(objective, world.fake.fake) if world.fake else objective), teacher

    def _model(self, world: World) -> Model:
        model = world.loaded.model
        return model._replace(wrap=grad.remat) if self.remat else model

    def _teacher(self, world: World) -> Teacher:
        wise = load(self.teacher or ModelSource(), world.folder, world.seed)
        if wise.tokenizer.fingerprint != world.loaded.tokenizer.fingerprint:
            raise InputError(
                f"stages: {self.label} has a teacher whose tokenizer ({wise.tokenizer_folder}) is not the student's "
                f"({world.loaded.tokenizer_folder}), expected the same tokens; distil from a model of the same family"
            )
        return Teacher(wise.model, *objectives.attach(wise.params, wise.trainable, wise.lora))

    def _heldout(
        self, world: World, objective: Objective, trainable: Trainable, teacher: Teacher | None, rule: Evaluation
    ) -> float:
        """The objective's mean over the held-out data."""
        fed = feed(world, rule.data, self.loss, cached=self.reference == "cached", teacher=teacher, top_k=self.cached_top_k)
        device = device_of(world.loaded.params, trainable)
        total, step = Mean(torch.zeros((), device=device), torch.zeros((), device=device)), eval_step(objective)
        for batch in fed.batches(rule.batch_size):
            total = tree.add(total, step(trainable, world.loaded.params, tree.map(lambda x: x.to(device), batch))[0])
        return float(total.value())

    def _judged(self, marks: "_Marks", nats: float, trainable: Trainable, folder: Path) -> "_Marks":
        if not (math.isfinite(nats) and (marks.best_nats is None or nats < marks.best_nats)):
            return msgspec.structs.replace(marks, n_worse=marks.n_worse + 1)
        checkpoint.save_state(folder, marks.step, {"trainable": trainable}, {"loss_nats": nats})
        return msgspec.structs.replace(marks, best_nats=nats, best_step=marks.step, n_worse=0)

    def _row(self, done: int, metrics: Metrics) -> dict[str, float]:
        """What is logged of a step, under the names that dashboards expect."""
        values = {name: float(value) for name, value in metrics.items()}
        lr = self.optimizer.lr * float(self.schedule.factor(torch.tensor(done - 1), self.steps))
        return {"loss": values.pop("loss_nats"), "lr": lr, **values}

    def _record(self, marks: "_Marks") -> dict[str, Any]:
        speed = marks.n_tokens / marks.time_s
        top = {"tokens_per_s": speed, "peak_mem_bytes": marks.peak_mem_bytes, "steps": marks.step}
        best = {"best_step": marks.best_step, "best_heldout_nats": marks.best_nats} if self.evaluate else {}
        return {"top": top, "time_s": marks.time_s, "n_skipped": marks.n_skipped, "steps": marks.step, **best}


def _moved(trainable: Trainable) -> bool:
    """Whether the tree changes the model at all: fresh deltas do not, so a reference can go without them."""
    return any(isinstance(leaf, Tensor) or bool(leaf.b.any()) for leaf in trainable.values())


class _Marks(msgspec.Struct, frozen=True):
    """Where a training stage is: saved with its state, and enough to go on from there."""

    step: int = 0
    cursor: tuple[int, int] = (0, 0)
    time_s: float = 0.0
    n_tokens: int = 0
    n_skipped: int = 0
    peak_mem_bytes: int = 0
    best_nats: float | None = None
    best_step: int = 0
    n_worse: int = 0  # evaluations in a row without a new best

    def after(self, cursor: Cursor, time_s: float, n_tokens: int, n_skipped: int, mem_bytes: int) -> "_Marks":
        """The marks one step later."""
        return msgspec.structs.replace(
            self,
            step=self.step + 1,
            cursor=(cursor.epoch, cursor.row),
            time_s=self.time_s + time_s,
            n_tokens=self.n_tokens + n_tokens,
            n_skipped=self.n_skipped + n_skipped,
            peak_mem_bytes=max(self.peak_mem_bytes, mem_bytes),
        )

    def over(self, stage: Train) -> bool:
        """Whether all steps are taken, or the held-out loss has not improved for as long as the stage waits."""
        patience = stage.evaluate.patience if stage.evaluate else None
        return self.step >= stage.steps or (patience is not None and self.n_worse >= patience)
