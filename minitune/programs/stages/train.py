"""Stage that takes optimizer steps. The step is the only clock: it drives data, schedule, saves,
evaluations and logs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import msgspec
import torch

from minitune import tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.load_balancing import balanced
from minitune.algorithms.loss_scale import LossScale
from minitune.algorithms.objective import Objective
from minitune.checkpoint.tensors import require_finite
from minitune.data.cursor import Cursor
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.registry import Loss
from minitune.losses.token import CrossEntropy
from minitune.models.model import Model
from minitune.nn.dropout import seeded
from minitune.optim.adamw import AdamW
from minitune.optim.registry import Optimizer
from minitune.optim.schedules import Constant, Schedule
from minitune.optim.transforms import Chain
from minitune.programs.data_tables import require_data
from minitune.programs.loading import ModelSource
from minitune.programs.stages import (
    loop_state,
    private_training,
    sweep_points,
    teachers,
    training_loop,
    training_model,
    training_notes,
    training_optimizer,
)
from minitune.programs.stages import sweep as sweep_stage
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.batches import (
    BatchLoader,
    heldout_losses,
    load_batches,
    tokenized_table,
)
from minitune.programs.stages.best_state import load_best, save_best
from minitune.programs.stages.continued import evaluation
from minitune.programs.stages.first_steps import watched_step
from minitune.programs.stages.histograms import watcher
from minitune.programs.stages.other_answers import other_answers
from minitune.programs.stages.private_training import PrivateTraining
from minitune.programs.stages.shown_batches import n_tokens, shown_batches
from minitune.programs.stages.training_stage import FREE_KEYS, Evaluation, Sweep
from minitune.programs.stages.training_step import (
    check_load_balance,
    check_samples,
    initial_state,
    objective_for,
    rows_of_rank,
    step_for,
)
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import (
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    Trainable,
)


class Train(BaseStage, frozen=True, kw_only=True, tag="train"):
    """Take optimizer steps on the trainable tree, by whatever loss."""

    free_keys: ClassVar[tuple[str, ...]] = FREE_KEYS
    shards: ClassVar[bool] = True

    data: str  # name of the [data] table to learn from
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as epochs need
    epochs: PositiveFloat | None = None  # passes through the data, rounded up to whole steps
    batch_size: PositiveInt  # rows (or pairs) per optimizer step
    micro_batch_size: PositiveInt | None = None  # rows per forward; the whole batch if absent
    loss: Loss = CrossEntropy()  # what training makes small; its kind names it
    # Reference of a preference loss: the model as this stage found it ("start"), the same with its
    # log-probs computed once ("cached"), or the parameters without deltas ("base").
    reference: Literal["start", "base", "cached"] = "start"
    teacher: ModelSource | None = None  # model that a distillation loss learns from
    cached_top_k: PositiveInt | None = None  # ask it once, and keep its k likeliest tokens on disk
    optimizer: Optimizer = AdamW(lr=1e-4)  # its kind, its rate lr and its other numbers
    # glob over trained leaves -> factor of the learning rate; {"*.b" = 16.0} is LoRA+
    lr_factors: dict[str, NonNegativeFloat] = msgspec.field(default_factory=dict)
    # glob over trained leaves -> factor of optimizer.weight_decay, the first match's, else 1:
    # { "*norm*" = 0.0, "*bias*" = 0.0 } spares these, as most training code does
    decay_factors: dict[str, NonNegativeFloat] = msgspec.field(default_factory=dict)
    schedule: Schedule = Constant()  # course of the learning rate over the steps
    # of the loss where the model computes in float16, without meaning elsewhere; absent: as in
    # torch.amp.GradScaler: from 65536, halved at an overflow, doubled after 2000 steps
    loss_scale: LossScale | None = None
    clip_norm: NonNegativeFloat = 1.0  # largest norm of the whole gradient; 0 leaves it as it is
    # noise on the embedded tokens of a training step, uniform on +-neftune_alpha / sqrt(L d_model),
    # L the tokens of the document (Jain et al. 2023, arXiv 2310.05914, algorithm 1); 5 to 15 are
    # usual
    neftune_alpha: NonNegativeFloat = 0.0
    # coefficient of a mixture's load-balancing loss, in nats a token (Fedus et al. 2021, arXiv
    # 2101.03961, eq. 4-6): router_aux_loss_coef of transformers, where 0.001 to 0.02 are usual
    load_balance: NonNegativeFloat = 0.0
    privacy: PrivateTraining | None = None  # DP-SGD: clip the gradient of each row, and add noise
    evaluate: Evaluation | None = None  # loss on held-out data on the way; the best state goes on
    save_every: PositiveInt = 100  # steps between two saved states
    keep: PositiveInt = 2  # saved states on the disk: the newest ones, and the best besides
    # write states while steps go on, from a copy in the host's memory; on an accelerator if absent
    save_in_background: bool | None = None
    # Compute blocks again in the backward: less memory, a third more work. All of them (true), only
    # so many that the others fit with their inputs in memory such as "8 GiB", or all with their
    # inputs kept in the host's memory ("host").
    remat: bool | str = False
    compiled: bool | None = None  # compile the block, once for all layers; on a GPU if absent
    sweep: Sweep | None = None  # train an adapter a point of a grid at once; the best goes on

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless something trains, on data and from a teacher that fit it."""
        if (self.steps == 0) == (self.epochs is None):
            has = "both steps and epochs" if self.steps else "neither steps nor epochs"
            raise InputError(f"stages: {self.label} has {has}, expected one; write or remove one")
        if not abstract.adapted and not abstract.whole:
            raise InputError(
                f"stages: {self.label} finds nothing to train, expected lora or full before it"
            )
        for name in (self.data, *([self.evaluate.data] if self.evaluate else [])):
            require_data(abstract, name, self.label, *self.loss.formats)
        teachers.check_teacher(self.label, self.loss, self.teacher, abstract, self.cached_top_k)
        if self.reference == "base" and self.loss.compares_answers and abstract.whole:
            raise InputError(
                f"stages: {self.label} has reference = 'base', but {min(abstract.whole)} trains "
                "whole; expected 'start' or 'cached'"
            )
        check_samples(self)
        training_model.check_remat(self.label, self.remat)
        training_optimizer.check_factors(self)
        private_training.check_private(self, abstract)
        check_load_balance(self, abstract)
        if abstract.lora is not None:
            abstract.lora.check_dropout(sorted(abstract.adapted))
        if self.sweep is not None:
            sweep_points.check(self, abstract)
        return abstract

    def on_ranks(self, n_ranks: int, *, is_sharded: bool) -> "Train":
        """Stage with a micro-batch for each rank; InputError where they can't train it."""
        n_rows = rows_of_rank(self, n_ranks)
        return msgspec.structs.replace(self, micro_batch_size=n_rows)

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the data and on the steps that it makes; InputError for a malformed row."""
        return training_notes.prepare(self, abstract, self.epochs)

    def run(self, state: PipelineState) -> PipelineState:
        """State with the trained tree; continues from the newest saved state in the run folder."""
        source, loaded = state.data[self.data], state.loaded
        text = (loaded.tokenizer, loaded.template)
        table = tokenized_table(self.data, source, *text, state.seed)
        steps = training_notes.n_steps(self, self.epochs, table.n_rows)
        training_notes.say(self, state, steps, table)
        stage = msgspec.structs.replace(self, steps=steps, evaluate=evaluation(self, state))
        return stage._train(state, table.n_rows)

    def _train(self, state: PipelineState, n_rows: int) -> PipelineState:
        if self.sweep is not None:
            return sweep_stage.run(self, state, self._model(state))
        trainable = state.loaded.trainable
        optimizer = self.optimizer_for(trainable, state.seed)
        if self.loss.compares_answers:
            # The reference is what training started from, and steps write over their trees.
            trainable = tree.map(torch.clone, trainable)
        train_state = initial_state(self, state, optimizer, trainable)

        train_state, loop = training_loop.train(
            self,
            state,
            train_state,
            loop_state.begin(1),
            lambda writing: self._task(writing, optimizer, n_rows),
        )

        trainable = train_state["trainable"]
        others = other_answers(self, state, trainable, loop)
        if self.evaluate is not None and self.evaluate.keep == "best":
            trainable = load_best(self, state, trainable, loop)
        require_finite(trainable, f"stages: {self.label}")
        record = loop.stage_record(self) | private_training.spent(self, n_rows, loop.step)
        private_training.say_spent(self, state, record)
        return state.with_model(trainable=trainable).record(self.label, record | others)

    def _task(
        self,
        state: PipelineState,
        optimizer: Chain,
        n_rows: int,
    ) -> training_loop.TrainingTask:
        params, model = state.loaded.params, self._model(state)
        teacher = teachers.load_teacher(self.label, self.teacher, state) if self.teacher else None
        objective = trained = self._objective(model, state, teacher)
        if self.load_balance:
            # of the training loss alone: a held-out loss is that of the tokens
            plain = partial(self._objective, state=state, teacher=teacher)
            trained = balanced(plain, model, self.load_balance)
        loader = self._load_batches(state, self.data, teacher)
        state.log.say(f"{self.label}: {self.data} has {loader.description}")
        one = step_for(self, state, trained, optimizer, n_rows)
        step = watched_step(self, trained, one, optimizer, params)
        draws = self.draws(state.loaded.lora)

        def next_batch(done: int, cursors: Sequence[Cursor]) -> tuple[Any, list[Cursor]]:
            batch, after = loader.take(cursors[0], self.batch_size)
            return seeded(batch, state.seed, done) if draws else batch, [after]

        def rows(done: int, metrics: loop_state.MetricValues) -> list[loop_state.Row]:
            only = {name: value for name, (value,) in metrics.items()}
            return [training_loop.row(self, done, only)]

        def evaluate(train_state: Any) -> list[float]:
            return self._heldout(state, objective, teacher, train_state["trainable"])

        def keep_best(train_state: Any, loop: loop_state.LoopState, improved: list[bool]) -> Any:
            if improved[0]:
                save_best(self, state, train_state["trainable"], loop)
            return train_state

        watch = watcher(self, state, trained)
        functions = next_batch, n_tokens, step, rows, evaluate, keep_best, watch
        return training_loop.TrainingTask(*functions)

    def _heldout(
        self,
        state: PipelineState,
        objective: Objective,
        teacher: Teacher | None,
        trainable: Trainable,
    ) -> list[float]:
        assert self.evaluate is not None, "there is nothing to evaluate on"
        params, name = state.loaded.params, self.evaluate.data
        loader = self._load_batches(state, name, teacher)
        lengths = state.data[name].max_seq_len, state.data[self.data].max_seq_len
        batches = loader.batches(self.evaluation_rows(*lengths))
        title, total = f"{self.label} held-out", loader.total_tokens
        with shown_batches(state.log, title, batches, total) as shown:
            return heldout_losses(
                lambda batch: objective(trainable, params, batch)[0], shown, state
            )

    def draws(self, *rules: Lora | None) -> bool:
        """True if a step of these rules drops or adds noise, so that its rows need seeds."""
        return self.neftune_alpha > 0 or any(rule is not None and rule.dropout for rule in rules)

    def _load_batches(
        self, state: PipelineState, name: str, teacher: Teacher | None
    ) -> BatchLoader:
        cached = self.reference == "cached"
        return load_batches(
            state, name, self.loss, cached=cached, teacher=teacher, top_k=self.cached_top_k
        )

    def optimizer_for(self, trainable: Trainable, seed: int) -> Chain:
        """Optimizer between its clip and its schedule."""
        return training_optimizer.optimizer_for(self, trainable, seed)

    def _objective(self, model: Model, state: PipelineState, teacher: Teacher | None) -> Objective:
        return objective_for(model, state, self.loss, teacher, from_base=self.reference == "base")

    def _model(self, state: PipelineState) -> Model:
        """Model whose blocks and embedding are what the stage asks for."""
        model = training_model.transformed(self, state, self.n_rows, self.compiled, self.remat)
        return model._replace(neftune_alpha=self.neftune_alpha)

    @property
    def n_rows(self) -> int:
        """Rows that go through the model together in a micro-batch."""
        n_samples = min(self.micro_batch_size or self.batch_size, self.batch_size)
        return n_samples * self.rows_per_sample

    @property
    def rows_per_sample(self) -> int:
        """Rows of a sample in a forward: both answers of a pair, every adapter's of a sweep."""
        swept = self.sweep is not None
        return len(sweep_points.points(self)) if swept else self.loss.rows_per_sample

    def evaluation_rows(self, n_tokens: int, n_trained: int) -> int:
        """Rows (or pairs) of n_tokens for a forward of `evaluate`; n_trained: of a trained row."""
        assert self.evaluate is not None, "there is nothing to evaluate on"
        n_step = min(self.micro_batch_size or self.batch_size, self.batch_size)
        default = max(self.loss.min_samples, n_step * n_trained // n_tokens)
        return self.evaluate.batch_size or default

    def n_remat(self, model: Model, params: Params, n_tokens: int) -> int:
        """Blocks that a backward of rows of n_tokens computes again; InputError for a low bound."""
        return training_model.n_remat(self.remat, model, params, self.n_rows, n_tokens)
