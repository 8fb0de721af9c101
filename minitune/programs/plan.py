"""Plans: what each training stage of a program needs, before anything is loaded."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import forward_params
from minitune.losses.token import CrossEntropy
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.optim.sgd import SGD
from minitune.planning.alike import representatives
from minitune.planning.devices import Device
from minitune.planning.flops import flops_per_token
from minitune.planning.inference import answer_memory, evaluation_memory, loss_memory
from minitune.planning.memory import peak_memory
from minitune.planning.mesh import ALONE, Mesh
from minitune.planning.rank_leaves import local_bytes, used_leaf
from minitune.planning.shared_blocks import token_shares, with_shared_blocks
from minitune.planning.step_spec import Parts, StepSpec
from minitune.programs import program
from minitune.programs.check import with_lengths
from minitune.programs.data_paths import located
from minitune.programs.loading import ModelSource, abstract_state, compute_dtype, device_and_dtype
from minitune.programs.log import say_early
from minitune.programs.model_paths import fetched_models, models_of
from minitune.programs.plan_parts import (
    blocks_of,
    flops_of_step,
    kept_codes,
    of_rank,
    quantized_params,
    refuse_offload,
)
from minitune.programs.plan_process import hole_bytes, process_bytes
from minitune.programs.stages import sweep_points
from minitune.programs.stages.adapt import Full, Load
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.generate import Generate
from minitune.programs.stages.quantize import Qat, Quantize
from minitune.programs.stages.stage import Stage
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_model import HOST
from minitune.programs.state import AbstractState, trainable_like
from minitune.quant.schemes import Scheme
from minitune.types import Params, Trainable


class Planned(NamedTuple):
    """Stage with its step, memory at the fullest moment of that, and floating-point operations.

    The step of an evaluation or a generation is the forward of its rows.
    """

    stage: Train | Eval | Generate
    step: StepSpec
    parts: Parts
    flops_per_token: float
    memory: Callable[[StepSpec], Parts] = peak_memory  # of another step of the same stage

    @property
    def n_bytes(self) -> int:
        """Bytes at the fullest moment of the step."""
        return sum(self.parts.values())

    @property
    def process_bytes(self) -> int:
        """Bytes of the process beside its step; on an accelerator they are not in its memory."""
        embedding = self.step.params["model.embed_tokens.weight"]
        return process_bytes(self.step.device, embedding.dtype, self.step.mesh)

    @property
    def peak_bytes(self) -> int:
        """Bytes that are expected at the peak, with the holes that the C library keeps on a CPU.

        What is needed is less: holes are filled where memory is short.
        """
        return self.process_bytes + self.n_bytes + hole_bytes(self.step.device, self.parts)


class PlanTarget(NamedTuple):
    """Devices that a plan is made for."""

    device: Device | None = None  # by name; None: the one that the program would take here
    mesh: Mesh = ALONE


HERE = PlanTarget()


class PlanState(NamedTuple):
    """Model as the stages so far have changed it."""

    abstract: AbstractState
    source: ModelSource
    target: PlanTarget = HERE
    schemes: Mapping[str, Scheme] = MappingProxyType({})  # of quantized weights
    narrow: frozenset[str] = frozenset()  # weights that train whole in bfloat16
    rounded: frozenset[str] = frozenset()  # weights that a qat stage rounds in every forward

    def place(self) -> tuple[torch.device, torch.dtype]:
        """(device of the model, dtype of its compute)."""
        if self.target.device is None:
            return device_and_dtype(self.source)
        # autograd takes no tensors of a device that torch lacks here: those of meta stand for them
        kind = self.target.device.kind
        device = torch.device(kind if kind in ("cpu", hardware.accelerator()) else "meta")
        is_auto = self.source.dtype == "auto"
        return device, compute_dtype(device) if is_auto else getattr(torch, self.source.dtype)

    def after(self, stage: Stage) -> "PlanState":
        """State after one more stage."""
        abstract = stage.check(self.abstract)
        if isinstance(stage, Load):
            return PlanState(abstract, stage.model, self.target)
        plan = self._replace(abstract=abstract)
        if isinstance(stage, Quantize):
            return plan._replace(schemes={**self.schemes, **stage.rule.plan(self.abstract.params)})
        if isinstance(stage, Full) and stage.dtype == "bfloat16":
            return plan._replace(narrow=self.narrow | abstract.whole - self.abstract.whole)
        if isinstance(stage, Qat):
            return plan._replace(rounded=frozenset(stage.rule.plan(self.abstract.params)))
        return plan


def planned(
    source: program.Program, first: AbstractState | None = None, target: PlanTarget = HERE
) -> Iterator[Planned]:
    """Stages of a program that train, in order, with their costs on one rank, and the evaluations
    and generations with a batch_size of their own.

    Those without one take as many tokens as a step. InputError for what would stop the program.
    first: the state before the first stage, where a check has found it.
    """
    refuse_offload(models_of(source.model, source.stage), target.mesh)
    plan = PlanState(first or first_state(source), source.model, target)
    for stage in source.stage:
        plan = plan.after(stage)
        if isinstance(stage, Train):
            step = _step(stage, plan)
            yield Planned(stage, step, _memory(stage, step, plan), flops_of_step(stage, step))
        elif isinstance(stage, Eval | Generate) and None not in (stage.batch_size, stage.data):
            yield _planned_forward(stage, plan)


def first_state(source: program.Program) -> AbstractState:
    """State before the first stage, without weights, the lengths of rows decided."""
    fetched_models(models_of(source.model, source.stage), say_early)
    abstract = abstract_state(source.model, AbstractState({}, Model(FAMILIES["llama"], None), {}))
    placed = {name: located(data) for name, data in source.data.items()}
    data, _ = with_lengths(placed, abstract)
    return abstract._replace(data=data)


def _planned_forward(stage: Eval | Generate, plan: PlanState) -> Planned:
    """Evaluation or generation of its batch_size at a time, its prompts as long as a row."""
    n_rows = stage.batch_size or 1
    source, (device, _) = plan.abstract.data[str(stage.data)], plan.place()
    step = StepSpec(
        plan.abstract.model,
        _weights(plan),
        trainable_like(plan.abstract, plan.narrow),
        plan.abstract.lora,
        SGD(lr=0.0),  # which keeps nothing, and is never asked
        CrossEntropy(),
        device,
        n_rows,
        source.max_seq_len,
        mesh=plan.target.mesh.for_model(plan.abstract.model.config),
        blocks=blocks_of(plan.source, device),
    )
    memory = partial(_forward_memory, stage, source.format != "text")
    flops = flops_per_token(step.model, {}, step.n_tokens)
    return Planned(stage, step, memory(step), flops, memory)


def _forward_memory(stage: Eval | Generate, answers: bool, step: StepSpec) -> Parts:
    """Memory of the fullest moment of an evaluation or a generation; answers: it writes some."""
    moments = [loss_memory(step)] if isinstance(stage, Eval) else []
    if answers:
        moments.append(answer_memory(step, stage.max_new_tokens))
    return max(moments, key=lambda one: sum(one.values()))


def _step(stage: Train, plan: PlanState) -> StepSpec:
    abstract, (device, _) = plan.abstract, plan.place()
    stage = of_rank(stage, plan.target.mesh)
    params, trainable = _weights(plan), trainable_like(abstract, plan.narrow)
    optimizer = stage.optimizer_for(trainable, seed=0)

    # Trees that stay in memory besides the ones that train: a reference as training found it, or a
    # sweep's best.
    kept: Trainable = trainable if stage.loss.compares_answers else {}
    if stage.sweep is not None:
        n = len(sweep_points.points(stage))
        trainable = kept = tree.map(lambda x: x.new_empty(n, *x.shape), trainable)

    n_tokens = abstract.data[stage.data].max_seq_len
    n_micro = -(-stage.batch_size // (stage.micro_batch_size or stage.batch_size))
    return StepSpec(
        abstract.model._replace(n_remat=_n_remat(stage, plan, params, trainable, device)),
        params,
        trainable,
        abstract.lora,
        optimizer,
        stage.loss,
        device,
        stage.n_rows,
        n_tokens,
        n_micro,
        plan.rounded & abstract.whole,
        kept,
        _teacher(stage, abstract, plan.target),
        stage.remat == HOST and hardware.capabilities(device).streams,
        plan.target.mesh.for_model(abstract.model.config),
        blocks_of(plan.source, device),
        blocks_of(stage.teacher, device),
    )


def _memory(stage: Train, step: StepSpec, plan: PlanState) -> Parts:
    """Memory of a step, or of an evaluation during training if that needs more."""
    parts = peak_memory(step)
    if stage.privacy is not None:  # a gradient for each row of a chunk, beside their sum
        rows_of_chunk = step.n_rows // stage.loss.rows_per_sample
        of_rows = rows_of_chunk * tree.n_bytes(step.trainable)
        parts = {**parts, "gradients": parts["gradients"] + of_rows}
    if stage.save_in_background and step.device.type == "cpu":
        trained = local_bytes(step.trainable, step.mesh)
        parts = {**parts, "copy to save": trained + parts["optimizer"]}
    if stage.evaluate is None:
        return parts
    data = plan.abstract.data
    n_tokens = data[stage.evaluate.data].max_seq_len
    rows = stage.evaluation_rows(n_tokens, data[stage.data].max_seq_len)
    n_rows = rows * stage.loss.rows_per_sample
    if n_rows * n_tokens <= step.n_rows * step.n_tokens:
        return parts  # the same tokens without gradients
    return max(parts, evaluation_memory(step, n_rows, n_tokens), key=lambda one: sum(one.values()))


def _teacher(stage: Train, abstract: AbstractState, target: PlanTarget) -> Teacher | None:
    if stage.teacher is None:
        return None
    plan = PlanState(abstract_state(stage.teacher, abstract), stage.teacher, target)
    return Teacher(plan.abstract.model, _weights(plan))


def _n_remat(
    stage: Train,
    plan: PlanState,
    params: Params,
    trainable: Trainable,
    device: torch.device,
) -> int:
    """Number of blocks that the stage will compute again; a budget is measured on fake tensors of
    its device."""
    abstract = plan.abstract
    n_tokens = abstract.data[stage.data].max_seq_len
    if stage.remat == HOST or not isinstance(stage.remat, str):
        return stage.n_remat(abstract.model, params, n_tokens)
    # all that is measured is the last block
    last = [abstract.model.config.n_layers - 1]
    kept = representatives(params, last), representatives(trainable, last)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), kept)
        adapted = forward_params(like[0], like[1], abstract.lora, stage.n_rows)
        mesh = plan.target.mesh.for_model(abstract.model.config)
        used = {name: used_leaf(name, w, mesh) for name, w in adapted.items()}
        model = with_shared_blocks(abstract.model, mesh)._replace(shares=token_shares(mesh))
        return stage.n_remat(model, used, n_tokens)


def _weights(plan: PlanState) -> Params:
    """Weights in the dtype of compute or as codes, on the meta device."""
    _, dtype = plan.place()
    dense = {name: w.to(dtype) for name, w in plan.abstract.params.items()}
    return {**dense, **codes_of(plan)}


def codes_of(plan: PlanState) -> Params:
    """Quantized weights as codes, on the meta device."""
    schemes = {
        name: scheme for name, scheme in plan.schemes.items() if name in plan.abstract.quantized
    }
    codes = quantized_params(plan.abstract.params, schemes)
    return {**codes, **kept_codes(codes, plan.source)}
