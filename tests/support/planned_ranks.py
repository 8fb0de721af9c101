"""Memory of a training step on a rank, as it is planned and as it is measured there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.algorithms.objective import split_trainable
from minitune.algorithms.supervised import sft
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy
from minitune.models.config import DecoderConfig
from minitune.models.model import Model
from minitune.models.weights import dims
from minitune.nn import head
from minitune.nn.attention import blockwise
from minitune.optim import adamw, transforms
from minitune.optim.adamw import AdamW
from minitune.planning.mesh import ALONE, Mesh, mesh_under
from minitune.planning.step_spec import StepSpec
from minitune.quant.schemes import NF4, quantize
from minitune.sharding import collectives, routes
from minitune.sharding.mesh import device_mesh, n_sharers
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import shard
from minitune.sharding.plans import named_plan
from minitune.sharding.ranks import Ranks
from minitune.sharding.tokens import shares_of
from minitune.steps import train_step
from minitune.types import Batch
from support.allocation import AllocatedBytes
from support.models import model_of, random_params

RULE = Lora(4, 8.0, ("*_proj.weight",))
OPTIMIZER = AdamW(lr=1e-3)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of the head and of the optimizer, and blocks of attention, as small as they are beside a real model."""
    with (
        patch.object(head, "HEAD_CHUNK", 2**14),
        patch.object(head, "HEAD_ROWS", 1),
        patch.object(blockwise, "BLOCK", 64),
        patch.object(adamw, "FUSED_ELEMENTS", {"cpu": 2**14}),
        patch.object(transforms, "SLICE_ELEMENTS", {"cpu": 2**13}),
    ):
        yield


class Planned(NamedTuple):
    """Step that a rank takes: how it is cut, and the rows that it works on."""

    config: DecoderConfig
    n_remat: int
    trains: str  # lora or full
    plan: str
    axes: dict[str, int]
    n_rows: int
    n_tokens: int
    base: str = "dense"  # or nf4: what the linear maps of a frozen base are

    @property
    def model(self) -> Model:
        """Model of the case, without ranks."""
        return model_of(self.config)._replace(n_remat=self.n_remat)

    def step(self, mesh: Mesh | None = None) -> StepSpec:
        """Step as its costs are counted, on the mesh of the case or on another."""
        mesh = mesh or mesh_under(self.axes, self.plan)
        params: Any = self.params()
        lora = RULE if self.trains == "lora" else None
        trainable: Any = RULE.like(params) if lora is not None else {}
        if lora is None:
            params, trainable = split_trainable(params, ("*",))
        where = torch.device("cpu"), self.n_rows, self.n_tokens
        of_model = mesh.for_model(self.config)
        return StepSpec(self.model, params, trainable, lora, OPTIMIZER, CrossEntropy(), *where, mesh=of_model)

    def params(self) -> Any:
        """Whole weights of the model, random ones."""
        params: Any = random_params(self.config)
        if self.base == "nf4":
            params |= {name: quantize(w, NF4()) for name, w in params.items() if name.endswith("_proj.weight")}
        return params

    def alone(self) -> StepSpec:
        """The same step of a single process."""
        return self.step(ALONE)


class Measured(NamedTuple):
    """What a rank measures in a step."""

    peak: int  # the most bytes of tensors at once: those that it is given, and those that are made meanwhile
    sent: dict[str, float]  # bytes that it sends, by collective


def measured(case: Planned) -> Measured:
    """Memory and traffic of a step on this rank."""
    devices = device_mesh(case.axes, "cpu")
    params: Any = shard(case.params(), dims(case.config), named_plan(case.plan), devices)
    lora = RULE if case.trains == "lora" else None
    trainable: Any = RULE.init(random_params(case.config), 0)
    if lora is None:
        params, trainable = split_trainable(params, ("*",))
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), sharers=n_sharers(case.axes))
    model = case.model._replace(shares=shares_of(devices))
    step = train_step(sft(model, lora), OPTIMIZER, micro_batch=case.n_rows, donate=True, ranks=ranks)
    n_shares = dist.get_world_size() // n_sharers(case.axes)
    shape = (case.n_rows * n_shares, case.n_tokens)
    ids = torch.randint(0, case.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.bool))
    with small_chunks():
        state, _ = step.update(params, step.init(trainable), batch)  # what is set up on a first call is no part of a step
        with counted_traffic() as sent:
            state, _ = step.update(params, state, batch)
        peaks = []
        for _ in range(3):
            with AllocatedBytes() as allocated:
                state, _ = step.update(params, state, batch)
            peaks.append(allocated.peak)
    weights = {name: w for name, w in params.items() if not isinstance(state.trainable.get(name), Tensor)}
    # gloo's own thread lets go of a buffer a little later, now and then
    return Measured(min(peaks) + tree.n_bytes(local_parts((weights, state.trainable, state.opt_state))), sent)


@contextmanager
def counted_traffic() -> Iterator[dict[str, float]]:
    """Bytes that this rank sends meanwhile by collective, were each a ring."""
    sent = {"gather": 0.0, "scatter": 0.0, "sum": 0.0, "exchange": 0.0}
    purposes = ["exchange"]  # of an all-to-all: the last one holds

    def counting(name: str, collective: Any, place: int, times: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            x, n = args[place], dist.get_world_size(kwargs.get("group"))
            sent[name] += times(n) * x.numel() * x.element_size()
            return collective(*args, **kwargs)

        return run

    def all_to_all(got: Tensor, x: Tensor, received: Any = None, lengths: Any = None, group: Any = None, **how: Any) -> Any:
        n, rank = dist.get_world_size(group), dist.get_rank(group)
        kept = len(x) // n if lengths is None else lengths[rank]
        sent[purposes[-1]] += (len(x) - kept) * x[:1].numel() * x.element_size()
        return whole(got, x, received, lengths, group, **how)

    def for_purpose(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            purposes.append(name)
            found = function(*args, **kwargs)
            purposes.pop()
            return found

        return run

    whole = dist.all_to_all_single
    with (
        patch.object(collectives, "_all_gather", counting("gather", collectives._all_gather, 1, lambda n: n - 1)),
        patch.object(collectives, "_reduce_scatter", counting("scatter", collectives._reduce_scatter, 0, lambda n: n - 1)),
        patch.object(dist, "all_reduce", counting("sum", dist.all_reduce, 0, lambda n: 2 * (n - 1) / n)),
        patch.object(dist, "all_to_all_single", all_to_all),
        patch.object(routes, "begin_sending", for_purpose("gather", routes.begin_sending)),
        patch.object(routes, "parts_from_owners", for_purpose("scatter", routes.parts_from_owners)),
    ):
        yield sent
