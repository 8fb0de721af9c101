"""Plans: what each training stage of a program needs, before anything is loaded."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import hardware, tree
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import apply_trainable
from minitune.autodiff.value_and_grad import detached_leaves
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.planning.flops import flops_per_token
from minitune.planning.memory import Parts, StepSpec, peak_memory
from minitune.programs import program
from minitune.programs.loading import ModelSource, abstract_state, compute_place
from minitune.programs.stages import sweep_points
from minitune.programs.stages.adapt import Full, Load
from minitune.programs.stages.quantize import Qat, Quantize
from minitune.programs.stages.train import HOST, Train
from minitune.programs.state import AbstractState
from minitune.quant.schemes import Scheme, quantize
from minitune.types import Params, Trainable


class Planned(NamedTuple):
    """A training stage, its step, what that has in memory at its fullest moment, and its floating-point operations."""

    stage: Train
    step: StepSpec
    parts: Parts
    flops_per_token: float

    @property
    def n_bytes(self) -> int:
        """The floor of the step's memory."""
        return sum(self.parts.values())


class PlanState(NamedTuple):
    """What the stages so far have made of the model."""

    abstract: AbstractState
    source: ModelSource
    schemes: Mapping[str, Scheme] = MappingProxyType({})
    narrow: frozenset[str] = frozenset()  # weights that train whole in bfloat16
    rounded: frozenset[str] = frozenset()


def planned(asked: program.Program) -> Iterator[Planned]:
    """Every training stage of a program with its costs, in order; InputError for what would stop the program there."""
    nothing = AbstractState(asked.data, Model(FAMILIES["llama"], None), {})
    made = PlanState(abstract_state(asked.model, nothing), asked.model)
    for stage in asked.stage:
        before, made = made.abstract, made._replace(abstract=stage.check(made.abstract))
        if isinstance(stage, Load):
            made = PlanState(made.abstract, stage.model)
        elif isinstance(stage, Quantize):
            made = made._replace(schemes={**made.schemes, **stage.rule.plan(before.params)})
        elif isinstance(stage, Full) and stage.dtype == "bfloat16":
            made = made._replace(narrow=made.narrow | made.abstract.whole - before.whole)
        elif isinstance(stage, Qat):
            made = made._replace(rounded=frozenset(stage.rule.plan(before.params)))
        elif isinstance(stage, Train):
            step = _step(stage, made)
            yield Planned(stage, step, peak_memory(step), _flops_per_token(stage, step))


def _step(stage: Train, made: PlanState) -> StepSpec:
    abstract, (device, _) = made.abstract, compute_place(made.source)
    params, trainable = _weights(made), _trainable(made)
    optimizer = stage.optimizer_for(trainable, seed=0)
    beside: Trainable = trainable if stage.loss.compares_answers else {}  # as it was before the first step
    if stage.sweep is not None:
        n = len(sweep_points.points(stage))
        trainable = beside = tree.map(lambda x: x.new_empty(n, *x.shape), trainable)  # and the best of each so far
    teacher = None
    if stage.teacher is not None:
        teacher_state = PlanState(abstract_state(stage.teacher, abstract), stage.teacher)
        teacher = Teacher(teacher_state.abstract.model, _weights(teacher_state))
    n_tokens, n_micro = abstract.data[stage.data].seq_len, -(-stage.batch_size // (stage.micro_batch_size or stage.batch_size))
    where = device, stage.n_rows, n_tokens, n_micro, made.rounded & abstract.whole
    offloaded = stage.remat == HOST and hardware.capabilities(device).streams
    step = StepSpec(abstract.model, params, trainable, abstract.lora, optimizer, stage.loss, *where, beside, teacher, offloaded)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), (params, trainable))
        adapted = apply_trainable(like[0], detached_leaves(like[1]), abstract.lora)
        n_remat = stage.n_remat(abstract.model, adapted, n_tokens)
    return step._replace(model=abstract.model._replace(n_remat=n_remat))


def _flops_per_token(stage: Train, step: StepSpec) -> float:
    """Of a step over rows of one document each, with the forward of a reference or a teacher that is asked in every step."""
    asked = [step.teacher.model] if step.teacher is not None and stage.cached_top_k is None else []
    if stage.loss.needs_reference and stage.reference != "cached":
        asked = [step.model]
    forward = sum(flops_per_token(model, {}, step.n_tokens) for model in asked)
    return flops_per_token(step.model, step.trainable, step.n_tokens) + forward


def _weights(made: PlanState) -> Params:
    """The weights in the dtype of compute or as codes, on the meta device."""
    abstract, (_, dtype) = made.abstract, compute_place(made.source)
    schemes = {name: scheme for name, scheme in made.schemes.items() if name in abstract.quantized}
    return {**{name: w.to(dtype) for name, w in abstract.params.items()}, **quantized_params(abstract.params, schemes)}


def quantized_params(params: Params, schemes: Mapping[str, Scheme]) -> Params:
    """The weights that have a scheme as codes; of those that are alike one is made."""
    alike = {(params[name].shape, scheme): params[name] for name, scheme in schemes.items()}
    codes = {(shape, scheme): quantize(w, scheme) for (shape, scheme), w in alike.items()}
    return {name: codes[params[name].shape, scheme] for name, scheme in schemes.items()}


def _trainable(made: PlanState) -> Trainable:
    abstract, whole = made.abstract, {}
    for name in abstract.whole:
        whole[name] = abstract.params[name].to(torch.bfloat16 if name in made.narrow else torch.float32)
    if abstract.lora is None:
        return whole
    with FakeTensorMode(allow_non_fake_inputs=True):  # draws nothing, and takes no memory
        deltas = abstract.lora.init(abstract.params, 0)
    return {**tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), deltas), **whole}
