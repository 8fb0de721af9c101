"""The stage that takes optimizer steps. The step is the only clock: it drives data, schedule, saves, evaluations and logs."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import Objective, apply_trainable
from minitune.algorithms.quantization_aware import quantization_aware
from minitune.algorithms.registry import Frozen, objective_of
from minitune.autodiff import offload
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.checkpoint.state import load_state, save_state
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.losses.registry import Loss
from minitune.losses.token import CrossEntropy
from minitune.models.compile import wrap
from minitune.models.model import Model
from minitune.optim.adamw import AdamW
from minitune.optim.registry import Optimizer
from minitune.optim.rounding import RoundStochastically
from minitune.optim.schedules import Constant, ScaleBySchedule, Schedule
from minitune.optim.transforms import Chain, ClipByGlobalNorm, NonNegative, ScaleByGlob, chain
from minitune.planning import activations
from minitune.programs.loading import ModelSource, abstract_state, asked_data, load, say_widening
from minitune.programs.stages import sweep as sweep_stage
from minitune.programs.stages import training_loop
from minitune.programs.stages.base import BaseStage, Positive
from minitune.programs.stages.batches import BatchLoader, feed
from minitune.programs.state import AbstractState, PipelineState
from minitune.steps import eval_step, train_step
from minitune.tree import device_of
from minitune.types import Mean, Metrics, Params, Trainable, TrainState


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training loss on held-out data every `every` steps."""

    data: str
    every: Positive  # steps
    patience: Positive | None = None  # stop after so many evaluations in a row without a new best; never if absent
    keep: Literal["best", "last"] = "best"  # what goes on to the next stage
    batch_size: Positive = 64  # rows per forward


HOST, ROOM = "host", re.compile(r"(\d+(?:\.\d+)?) ?([KMG])iB")


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
    optimizer: Optimizer = AdamW(lr=1e-4)
    lr_factors: dict[str, NonNegative] = msgspec.field(
        default_factory=dict
    )  # glob over trained leaves -> factor; {"*.b" = 16.0} is LoRA+
    schedule: Schedule = Constant()
    clip_norm: NonNegative = 1.0  # largest norm of the whole gradient; 0 leaves it as it is
    evaluate: Evaluation | None = None
    save_every: Positive = 100  # steps
    remat: bool | str = False  # compute each block again in the backward: less memory, a third more work; or only so many blocks
    # that the others fit, with their inputs, in memory such as "8 GiB"; or all, their inputs kept in the host's memory: "host"
    compiled: bool | None = None  # compile the block, once for all layers; on a GPU if absent
    sweep: sweep_stage.Sweep | None = None  # train an adapter for every point of a grid at once; the best goes on

    def check(self, abstract: AbstractState) -> AbstractState:
        """Something trains, the data has the format that the loss needs, and a teacher speaks the student's vocabulary."""
        if not abstract.adapted and not abstract.whole:
            raise InputError(f"stages: {self.label} finds nothing to train, expected a lora or full stage before it")
        for name in (self.data, *([self.evaluate.data] if self.evaluate else [])):
            asked_data(abstract, name, self.label, *self.loss.formats)
        if self.loss.needs_teacher != (self.teacher is not None):
            raise InputError(
                f"stages: {self.label} has {'no teacher' if self.teacher is None else 'a teacher'}, expected one exactly with a "
                "distillation loss (forward_kl, reverse_kl, symmetric_kl, jensen_shannon)"
            )
        if self.teacher is not None:
            teacher = abstract_state(self.teacher, abstract)
            ours, theirs = abstract.model.config.vocab_size, teacher.model.config.vocab_size
            if ours != theirs:
                raise InputError(
                    f"stages: {self.label} has a student of {ours} tokens and a teacher of {theirs}, expected one vocabulary"
                )
        if self.reference == "base" and self.loss.compares_answers and abstract.whole:
            raise InputError(
                f"stages: {self.label} has reference = 'base', but {min(abstract.whole)} trains whole; expected 'start' or 'cached'"
            )
        if min(self.batch_size, self.micro_batch_size or self.batch_size) < self.loss.min_samples:
            raise InputError(
                f"stages: {self.label} has a batch of one answer, expected two: kto compares the answers of a micro-batch"
            )
        if isinstance(self.remat, str) and self.remat != HOST and not ROOM.fullmatch(self.remat):
            raise InputError(
                f"stages: {self.label} has remat = {self.remat!r}, expected true, false, 'host', or memory such as '8 GiB'"
            )
        if self.sweep is not None:
            sweep_stage.check(self, abstract)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """state with the trained tree; continues from the newest train_state in the run folder."""
        if self.sweep is not None:
            return sweep_stage.run(self, state, self._model(state), Train._optimizer)
        best, start = state.folder / "checkpoints" / self.label / "best", state.loaded.trainable
        optimizer = self.optimizer_for(start, state.seed)
        if self.loss.compares_answers:  # the reference is what training started from, and steps write over their trees
            start = tree.map(torch.clone, start)
        train_state = {"trainable": start, "opt_state": optimizer.init(start)}
        train_state, loop = training_loop.train(self, state, train_state, training_loop.start(1), lambda: self._work(state, optimizer, best))
        trainable = train_state["trainable"]
        if self.evaluate is not None and self.evaluate.keep == "best":
            (nats,), (step,) = loop.best_nats, loop.best_step
            if nats is None:
                raise InputError(
                    f"stages: {self.label} had no finite held-out loss in {loop.step} steps; lower the learning rate"
                )
            trainable = load_state(best / f"step-{step:08d}", {"trainable": trainable})[0]["trainable"]
            state.log.say(f"{self.label}: step {step} was the best, held-out loss {nats:.4f}")
        return state.with_model(trainable=trainable).record(self.label, self._record(loop))

    def _work(self, state: PipelineState, optimizer: Chain, best: Path) -> training_loop.TrainingTask:
        objective, teacher = self._objective(state)
        fed = self._feed(state, self.data, teacher)
        state.log.say(f"{self.label}: {self.data} has {fed.told}")
        # donated: the trees are this stage's own, and the ones before the step are never asked for again, but as a reference
        one = train_step(objective, optimizer, micro_batch=self.micro_batch_size or self.batch_size, donate=True)

        def take(cursors: Sequence[Cursor]) -> tuple[Any, list[Cursor]]:
            batch, after = fed.take(cursors[0], self.batch_size)
            return batch, [after]

        def step(train_state: Any, batch: Any) -> tuple[Any, Metrics]:
            before = TrainState(train_state["trainable"], train_state["opt_state"])
            after, metrics = one.update(state.loaded.params, before, batch)
            return after._asdict(), metrics

        def rows(done: int, metrics: training_loop.Read) -> list[training_loop.Row]:
            return [training_loop.row(self, done, {name: value for name, (value,) in metrics.items()})]

        def heldout(train_state: Any) -> list[float]:
            assert self.evaluate is not None, "there is nothing to evaluate on"
            held = self._feed(state, self.evaluate.data, teacher)
            return [self._heldout(state, objective, train_state["trainable"], held.batches(self.evaluate.batch_size))]

        def keep(train_state: Any, loop: training_loop.LoopState, better: list[bool]) -> Any:
            if better[0]:
                save_state(best, loop.step, {"trainable": train_state["trainable"]}, {"loss_nats": loop.nats[0]})
            return train_state

        return training_loop.TrainingTask(take, fed.n_tokens, step, rows, heldout, keep)

    def _feed(self, state: PipelineState, name: str, teacher: Teacher | None) -> BatchLoader:
        return feed(state, name, self.loss, cached=self.reference == "cached", teacher=teacher, top_k=self.cached_top_k)

    def optimizer_for(self, trainable: Trainable, seed: int) -> Chain:
        """The optimizer between its clip and its schedule; what trains in bfloat16 is rounded at random."""
        narrow = any(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(trainable))
        return chain(*self._optimizer().parts, *([RoundStochastically(seed)] if narrow else []))

    def _optimizer(self) -> Chain:
        clip = [ClipByGlobalNorm(self.clip_norm)] if self.clip_norm else []
        factors = [ScaleByGlob(self.lr_factors)] if self.lr_factors else []
        return chain(*clip, self.optimizer, *factors, ScaleBySchedule(self.schedule, self.steps))

    def _objective(self, state: PipelineState) -> tuple[Objective, Teacher | None]:
        loaded, model, teacher = state.loaded, self._model(state), None
        if self.loss.needs_teacher:
            teacher = self._teacher(state)
        from_base = self.reference == "base" or not _moved(loaded.trainable)
        frozen = Frozen({} if from_base else loaded.trainable, teacher)
        objective = objective_of(model, loaded.lora, self.loss, frozen)
        return (quantization_aware(objective, state.fake.fake) if state.fake else objective), teacher

    def _model(self, state: PipelineState) -> Model:
        loaded, model, device = state.loaded, state.loaded.model, device_of(state.loaded.params, state.loaded.trainable)
        if self.compiled or (self.compiled is None and hardware.capabilities(device).compiles):
            model = model._replace(block_transform=wrap(state.log.say))
        adapted = apply_trainable(loaded.params, detached_leaves(loaded.trainable), loaded.lora)
        n_remat = self.n_remat(model, adapted, state.data[self.data].seq_len)
        if self.remat == HOST and hardware.capabilities(device).streams:
            model = model._replace(remat=offload.remat(offload.side_stream(device)))
        elif self.remat == HOST:
            state.log.say(f"{self.label}: remat = 'host' is remat = true on {device.type}, which sends nothing to the host")
        elif isinstance(self.remat, str):
            told = f"{n_remat} of {model.config.n_layers} blocks are computed again to stay within {self.remat}"
            state.log.say(f"{self.label}: {told}")
        return model._replace(n_remat=n_remat)

    @property
    def n_rows(self) -> int:
        """Rows that go through the model together in a micro-batch: both answers of a pair, every adapter's of a sweep."""
        at_once = self.loss.rows_per_sample
        if self.sweep is not None:
            at_once = len(sweep_stage.points(self))
        return min(self.micro_batch_size or self.batch_size, self.batch_size) * at_once

    def n_remat(self, model: Model, params: Params, n_tokens: int) -> int:
        """How many blocks are computed again in the backward of rows of n_tokens; InputError for a budget that is too small."""
        if self.remat == HOST:
            return model.config.n_layers
        if not isinstance(self.remat, str):
            return model.config.n_layers if self.remat else 0
        number, unit = ROOM.findall(self.remat)[0]
        n_bytes = int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])
        return activations.n_remat(model.config, params, self.n_rows, n_tokens, n_bytes)

    def _teacher(self, state: PipelineState) -> Teacher:
        teacher = load(self.teacher or ModelSource(), state.folder, state.seed)
        if teacher.tokenizer.fingerprint != state.loaded.tokenizer.fingerprint:
            raise InputError(
                f"stages: {self.label} has a teacher whose tokenizer ({teacher.tokenizer_folder}) is not the student's "
                f"({state.loaded.tokenizer_folder}), expected the same tokens; distil from a model of the same family"
            )
        say_widening(state.log, f"{self.label}: teacher", teacher.params)
        return Teacher(teacher.model, apply_trainable(teacher.params, teacher.trainable, teacher.lora))

    def _heldout(self, state: PipelineState, objective: Objective, trainable: Trainable, batches: Iterator[Any]) -> float:
        """The objective's mean over the held-out data."""
        device = device_of(state.loaded.params, trainable)
        total, step = Mean(torch.zeros((), device=device), torch.zeros((), device=device)), eval_step(objective)
        for batch in batches:
            total = tree.add(total, step(trainable, state.loaded.params, batch)[0])
        return float(total.value())

    def _record(self, loop: training_loop.LoopState) -> dict[str, Any]:
        best = {"best_step": loop.best_step[0], "best_heldout_nats": loop.best_nats[0]} if self.evaluate else {}
        return {"top": loop.speed(), "time_s": loop.time_s, "n_skipped": loop.n_skipped[0], "steps": loop.step, **best}


def _moved(trainable: Trainable) -> bool:
    """Whether the tree changes the model at all: fresh deltas do not, so a reference can go without them."""
    return any(isinstance(leaf, Tensor) or bool(leaf.b.any()) for leaf in trainable.values())
