"""Training steps of small models on one process, and on ranks that share the model by a plan."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from minitune import tree
from minitune.algorithms.load_balancing import balanced
from minitune.algorithms.merging import merge_trainable
from minitune.algorithms.objective import split_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.checkpoint.state import load_state, save_state
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import cross_entropy
from minitune.models import compile
from minitune.models.block import block
from minitune.models.config import DecoderConfig
from minitune.models.mixers import grouped_query
from minitune.models.probe import Probe
from minitune.models.weights import dims
from minitune.optim.adamw import AdamW
from minitune.optim.sgd import SGD
from minitune.quant.schemes import NF4, Int8, dequantize, quantize
from minitune.sharding import later
from minitune.sharding.experts import OwnExperts
from minitune.sharding.gather import Ahead, gather
from minitune.sharding.mesh import Mesh, device_mesh, n_sharers
from minitune.sharding.parts import local_parts
from minitune.sharding.placements import Plan, shard, shard_leaf
from minitune.sharding.plans import named_plan
from minitune.sharding.ranks import ALONE
from minitune.sharding.ranks import Ranks as ProcessRanks
from minitune.sharding.tokens import TokenShares, shares_of
from minitune.steps import kd_step, preference_step, sft_step, train_step
from minitune.types import Batch, Delta, Mean, Pairs, Step, Trainable
from support.models import SMALL, model_of, random_batch, random_deltas, random_params, widened

RULE = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",))
DORA = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",), dora=True)
# names of biases end with s
EXPERTS = Lora(rank=2, alpha=4.0, targets=("*.experts.*[!s]",))
ONE_EXPERT = Lora(rank=2, alpha=4.0, targets=("*.experts.0.*",))
RULES = {"lora": RULE, "dora": DORA, "experts": EXPERTS, "one expert": ONE_EXPERT}


class Case(NamedTuple):
    """What is trained, on what, and in which micro-batches."""

    config: DecoderConfig
    loss: str = "sft"  # sft, dpo or kd
    trains: str = "lora"  # full, or whose name is in RULES
    micro_batch: int | None = 1
    n_remat: int = 0
    dtype: torch.dtype = torch.float32  # of the weights that are not trained
    n_steps: int = 2
    base: str = "dense"  # dense, int8 or nf4: what the linear maps of a frozen base are
    is_packed: bool = True
    optimizer: Any = AdamW(lr=0.01, weight_decay=0.1)


def rows_of(case: Case, n_rows: int, seed: int, mask: Tensor | None = None) -> Any:
    """Batch of a case; mask [n_rows] leaves out the targets of a row."""

    def batch(seed: int) -> Batch:
        rows = random_batch(case.config, n_rows, 11, seed, packed=case.is_packed)
        return rows if mask is None else rows._replace(loss_mask=rows.loss_mask & mask[:, None])

    return Pairs(batch(seed), batch(seed + 1)) if case.loss == "dpo" else batch(seed)


def trained(
    case: Case, batches: list[Any], plan: Plan | None = None, mesh: Mesh | None = None, ranks: ProcessRanks = ALONE
) -> dict[str, Tensor]:
    """Leaves of the trained tree and of the optimizer's state, whole, and the metrics of the last step.

    ranks: which deal out batches that all have; without them each has its own.
    """
    params, teacher, shares = weights_of(case), random_params(case.config, 7), None
    if plan is not None:
        devices = device_mesh(mesh or {}, "cpu")
        params, shares = shard(params, dims(case.config), plan, devices), shares_of(devices)
        teacher = shard(teacher, dims(case.config), plan, devices)
    return _after_steps(case, batches, params, _deltas_of(case), teacher, shares, ranks)


def trained_in_float64(case: Case, batches: list[Any]) -> dict[str, Tensor]:
    """`trained` of one process, with float64 in place of float32: on the same weights, of which codes stand for what they are
    decoded to in float32.
    """
    params = {name: w if isinstance(w, Tensor) else dequantize(w, torch.float32) for name, w in weights_of(case).items()}
    trees = tree.map(Tensor.double, (params, _deltas_of(case), random_params(case.config, 7)))
    with widened():
        return _after_steps(case, batches, *trees)


def weights_of(case: Case) -> dict[str, Any]:
    """Weights that a case begins with, of which the linear maps are codes if it says so."""
    params: dict[str, Any] = random_params(case.config, dtype=case.dtype)
    if case.base == "dense":
        return params
    scheme = {"int8": Int8(), "nf4": NF4()}[case.base]
    return params | {name: quantize(w, scheme) for name, w in params.items() if _is_quantized(name)}


def _deltas_of(case: Case) -> dict[str, Delta]:
    """Deltas that a case begins with; none where weights train."""
    rule = RULES.get(case.trains)
    return {} if rule is None else random_deltas(random_params(case.config, dtype=case.dtype), rule)


def _after_steps(
    case: Case,
    batches: list[Any],
    params: Any,
    deltas: dict[str, Delta],
    teacher: Any,
    shares: TokenShares | None = None,
    ranks: ProcessRanks = ALONE,
) -> dict[str, Tensor]:
    lora, trainable = RULES.get(case.trains), deltas
    if lora is None:
        params, trainable = split_trainable(params, ("*",))
    step = step_of(case, lora, params, trainable, shares, ranks, teacher)
    state = step.init(trainable)
    metrics: Any = {}
    for batch in batches:
        state, metrics = step.update(params, state, batch)
    return dict(tree.items({"trainable": gather(state.trainable), "state": gather(state.opt_state), "metrics": metrics}))


def _is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight") or (".experts." in name and name.endswith(".weight"))


def step_of(
    case: Case,
    lora: Lora | None,
    params: Any,
    trainable: Trainable,
    shares: TokenShares | None = None,
    ranks: ProcessRanks = ALONE,
    teacher: Any = None,
) -> Step:
    """Step of a case, with the base or a second model as its reference."""
    model = model_of(case.config)._replace(n_remat=case.n_remat, shares=shares)
    optimizer = case.optimizer
    how: Any = {"micro_batch": case.micro_batch, "ranks": ranks}
    if case.loss == "dpo":
        reference = {} if lora is not None else trainable
        return preference_step(model, lora, optimizer, Dpo(), reference, **how)
    if case.loss == "kd":
        from minitune.algorithms.distillation import Teacher

        return kd_step(model, lora, optimizer, Teacher(model, teacher or random_params(case.config, 7)), **how)
    return sft_step(model, lora, optimizer, **how)


def on_ranks(case: Case, batches: list[list[Any]], plan: Plan, mesh: Mesh) -> dict[str, Tensor]:
    """`trained` of this rank's rows: batches[step][rank]."""
    rank = dist.get_rank()
    return trained(case, [ranks[rank] for ranks in batches], plan, mesh)


def on_shared_rows(case: Case, batches: list[Any], plan: Plan, mesh: Mesh) -> dict[str, Tensor]:
    """`trained` of batches that all ranks have, and deal out among those of the mesh that have rows of their own."""
    ranks = ProcessRanks(dist.get_rank(), dist.get_world_size(), sharers=n_sharers(mesh))
    return trained(case, batches, plan, mesh, ranks)


def said_to(cases: list[Case], plan: Plan, mesh: Mesh) -> list[str]:
    """What is said to each of these cases before its first step; empty where nothing is."""

    def words(case: Case) -> str:
        try:
            trained(case, [], plan, mesh)
        except InputError as error:
            return str(error)
        return ""

    return [words(case) for case in cases]


def lengths_that_are_seen(n_tokens: int) -> dict[str, Any]:
    """Tokens that blocks and attention get of rows that all ranks share, heads in attention, and tokens of what a model gives."""
    seen: dict[str, Any] = {"block": set(), "attention": set(), "heads": set()}
    attend = grouped_query.attention

    def watched_block(config: Any, mixer: Any, w: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
        seen["block"].add(x.shape[1])
        return block(config, mixer, w, x, *rest, **kwargs)

    def watched_attention(q: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        seen["heads"].add(q.shape[1])
        seen["attention"].add(q.shape[2])
        return attend(q, *rest, **kwargs)

    shares = shares_of(device_mesh({"context": dist.get_world_size()}, "cpu"))
    model, params = model_of(SMALL)._replace(block=watched_block, shares=shares), random_params(SMALL)
    rows = random_batch(SMALL, 2, n_tokens)
    with patch.object(grouped_query, "attention", watched_attention):
        seen["hidden"] = model.hidden(params, rows).shape[1]
        seen["logits"] = model.forward(params, rows.tokens).shape[1]
        probe = Probe(("self_attn.o_proj.weight",), lambda name, y: seen.update(probed=y.shape[1]))
        model._replace(probe=probe).hidden(params, rows)
    return seen


def plain_and_compiled_losses() -> tuple[Tensor, Tensor]:
    """Losses of tokens that all ranks share, by blocks that are not compiled and by compiled ones."""
    shares = shares_of(device_mesh({"context": dist.get_world_size()}, "cpu"))
    model, params, rows = model_of(SMALL)._replace(shares=shares), random_params(SMALL), random_batch(SMALL, 2, 11)
    compiled = model._replace(block_transform=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    return model.token_losses(params, rows, cross_entropy), compiled.token_losses(params, rows, cross_entropy)


def losses_by_compiled_blocks(config: DecoderConfig, lengths: Sequence[int], mesh: Mesh) -> tuple[list[Any], list[int]]:
    """(losses and gradients of deltas, by blocks as they are and by compiled ones, of rows of each length; graphs until then)."""
    from torch._dynamo.backends.debugging import aot_eager

    n_graphs, seen, found = 0, [], []

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal n_graphs
        n_graphs += 1
        return aot_eager(graph, inputs)

    params = shard(random_params(config), dims(config), named_plan("ep"), device_mesh(mesh, "cpu"))
    deltas, plain = random_deltas(random_params(config), RULE), model_of(config)
    with patch.object(compile, "_lowered", counted):
        compiled = plain._replace(block_transform=compile.wrap(seen.append))

        def loss(model: Any, rows: Batch) -> Any:
            def total(deltas: Any) -> Mean:
                nats = model.token_losses(RULE.apply(params, deltas), rows, cross_entropy)
                return Mean(nats.sum(), torch.ones(()))

            return value_and_grad(total)(deltas)

        for length in lengths:
            rows = random_batch(config, 2, length, seed=dist.get_rank())
            found.append((loss(plain, rows), loss(compiled, rows)))
            seen.append(n_graphs)
    return found, seen


def dealt(batch: Any, sizes: list[int]) -> list[Any]:
    """Parts of a batch of so many rows each."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [tree.map(lambda x, i=i, n=n: x[i : i + n], batch) for i, n in zip(starts, sizes, strict=True)]


def gathered_of(w: Any, dim_of: dict[str, int | None], mesh: Mesh, cotangents: Any) -> tuple[Any, Any]:
    """(whole tensors as `gather` makes them of this rank's parts, this rank's parts of their gradients)."""
    ranks = device_mesh(mesh, "cpu")
    parts = {name: placed(x, dim_of[name], ranks) for name, x in w.items()}
    leaves = tree.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), parts)
    wholes = gather(leaves)
    own = cotangents[dist.get_rank()]
    names = [*own]
    grads = torch.autograd.grad([wholes[name] for name in names], [leaves[name] for name in names], [own[name] for name in names])
    return tree.map(torch.Tensor.detach, wholes), {name: gather(grad) for name, grad in zip(names, grads, strict=True)}


def placed(x: Any, dim: int | None, ranks: Any) -> Any:
    """Part of this rank of a tensor or a quantized weight that the last axis of a mesh cuts along a dim."""
    from torch.distributed.tensor import Replicate, Shard

    copies = [Replicate()] * (ranks.ndim - 1)
    return x if dim is None else shard_leaf(x, (*copies, Shard(dim)), ranks)


def shares_of_experts(case: Case, batch: Any, mesh: Mesh) -> tuple[float, float, set[Any]]:
    """(share of the weights of experts that a rank holds at rest, the most that a block has of a layer's, its own experts)."""
    seen: list[float] = []
    own: set[Any] = set()

    def n_numbers(w: dict[str, Any]) -> int:
        return sum(tensor.numel() for name, leaf in w.items() if ".experts." in name for tensor in tree.leaves(leaf))

    def watched(config: Any, mixer: Any, w: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
        weights = {name: leaf.w for name, leaf in w.items() if isinstance(leaf, OwnExperts)}
        seen.append(n_numbers(weights))
        own.update(name for name, leaf in weights.items() if leaf.numel())
        return block(config, mixer, w, x, *rest, **kwargs)

    whole = random_params(case.config)
    params: Any = shard(whole, dims(case.config), named_plan("ep"), device_mesh(mesh, "cpu"))
    model = model_of(case.config)._replace(block=watched)
    model.token_losses(params, batch, cross_entropy)
    n_layers = len({name.split(".")[2] for name in whole if ".experts." in name})
    return n_numbers(local_parts(params)) / n_numbers(whole), max(seen) * n_layers / n_numbers(whole), own


def lives_of_whole_weights(case: Case, batch: Any, plan: Plan) -> list[list[int]]:
    """Layers whose weights exist whole when each block begins, in a step."""
    alive: dict[int, Any] = {}
    seen = []

    def watched(config: Any, mixer: Any, w: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
        down = w["mlp.down_proj.weight"].w  # beneath its delta
        layer = len(seen) % config.n_layers
        seen.append(sorted(number for number, one in alive.items() if one() is not None))
        alive[layer] = weakref.ref(down)
        return block(config, mixer, w, x, *rest, **kwargs)

    params: Any = shard(random_params(case.config), dims(case.config), plan, device_mesh({"data": dist.get_world_size()}, "cpu"))
    trainable = random_deltas(random_params(case.config), RULE)
    model = model_of(case.config)._replace(n_remat=case.n_remat, block=watched)
    step = sft_step(model, RULE, AdamW(lr=0.01))
    step.update(params, step.init(trainable), batch)
    return seen


def order_of_sums(case: Case, batch: Any, plan: Plan) -> list[str]:
    """Blocks as their weights are asked for, and reduce-scatters of their gradients as these begin and end, in a step."""
    seen: list[str] = []

    def noting(what: str, f: Any) -> Any:
        def noted(*args: Any) -> Any:
            seen.append(what)
            return f(*args)

        return noted

    def wholes(ahead: Ahead, number: int, leaves: Any) -> Any:
        seen.append(f"block {number}")
        return asked(ahead, number, leaves)

    asked, mesh = Ahead.wholes, device_mesh({"data": dist.get_world_size()}, "cpu")
    params: Any = shard(random_params(case.config), dims(case.config), plan, mesh)
    params, trainable = split_trainable(params, ("*",))
    step = sft_step(model_of(case.config)._replace(n_remat=case.n_remat), None, AdamW(lr=0.01))
    with (
        patch.object(Ahead, "wholes", wholes),
        patch.object(later, "begin_scatter", noting("begin", later.begin_scatter)),
        patch.object(later, "end_scatter", noting("end", later.end_scatter)),
    ):
        step.update(params, step.init(trainable), batch)
    return seen


def fsdp2_step(case: Case, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """(weights, norm of the gradient) after a step of SGD by torch's fully_shard on an nn.Module of the same weights."""
    from torch.distributed.fsdp import fully_shard

    model = model_of(case.config)

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = random_params(case.config)
            self.names = {name.replace(".", "/"): name for name in weights}
            for key, name in self.names.items():
                self.register_parameter(key, torch.nn.Parameter(weights[name]))

        def forward(self, rows: Batch) -> Tensor:
            params = {name: getattr(self, key) for key, name in self.names.items()}
            return model.token_losses(params, rows, cross_entropy).sum()

    module = fully_shard(Layers(), mesh=device_mesh({"data": dist.get_world_size()}, "cpu"))
    n_targets = batch.target_mask().sum()
    dist.all_reduce(n_targets)
    # fully_shard takes the mean over ranks
    (module(batch) * dist.get_world_size() / n_targets).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).full_tensor()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    return {module.names[key]: p.full_tensor().detach() for key, p in module.named_parameters()}, norm


def own_step(case: Case, batch: Any, plan: Plan, mesh: Mesh) -> tuple[dict[str, Tensor], Tensor]:
    """(weights, norm of the gradient) after a step of SGD on weights in parts."""
    params = shard(random_params(case.config), dims(case.config), plan, device_mesh(mesh, "cpu"))
    frozen, trainable = split_trainable(params, ("*",))
    step = sft_step(model_of(case.config)._replace(n_remat=case.n_remat), None, SGD(lr=0.5))
    state, metrics = step.update(frozen, step.init(trainable), batch)
    return gather(state.trainable), metrics["grad_norm"]


def both_steps(case: Case, batches: list[Any], plan: Plan, mesh: Mesh) -> tuple[Any, Any]:
    """(fsdp2_step, own_step) of this rank's rows."""
    rows = batches[dist.get_rank()]
    return fsdp2_step(case, rows), own_step(case, rows, plan, mesh)


def quantized_hidden(config: DecoderConfig, scheme: Any, tokens: Tensor, plan: Plan | None, n_remat: int) -> tuple[Tensor, Any]:
    """(logits of a model with quantized linear maps and deltas, gradients of the deltas); in parts if there is a plan."""
    weights = random_params(config)
    names = [name for name in weights if name.endswith("_proj.weight")]
    params: Any = weights | {name: quantize(weights[name], scheme) for name in names}
    if plan is not None:
        params = shard(params, dims(config), plan, device_mesh({"data": dist.get_world_size()}, "cpu"))
    deltas = random_deltas(weights, RULE)
    model = model_of(config)._replace(n_remat=n_remat)

    def objective(deltas: Any) -> tuple[Mean, Tensor]:
        logits = model.forward(RULE.apply(params, deltas), tokens)
        return Mean.of(logits.square(), torch.ones_like(logits, dtype=torch.bool)), logits

    (_, logits), grads = value_and_grad(objective, has_aux=True)(deltas)
    return logits, grads


def refusal(plan: Plan, optimizer: Any) -> str:
    """What is said to an optimizer that is to train all weights of a small model in parts."""
    params = shard(random_params(SMALL), dims(SMALL), plan, device_mesh({"data": dist.get_world_size()}, "cpu"))
    try:
        sft_step(model_of(SMALL), None, optimizer).init(split_trainable(params, ("*",))[1])
    except InputError as error:
        return str(error)
    return ""


def balanced_gradients(config: DecoderConfig, batch: Batch, mesh: Mesh, plan: Plan | None = None) -> dict[str, Tensor]:
    """Routers of a mixture and metrics after a step with the term that keeps routers even, in micro-batches of one row."""
    params, shares, ranks = random_params(config), None, ALONE
    if mesh:
        devices = device_mesh(mesh, "cpu")
        params, shares = shard(params, dims(config), plan or {}, devices), shares_of(devices)
        ranks = ProcessRanks(dist.get_rank(), dist.get_world_size(), sharers=n_sharers(mesh))
    model = model_of(config)._replace(shares=shares)
    frozen, trainable = split_trainable(params, ("*.mlp.gate.weight",))
    objective = balanced(lambda probed: sft(probed, None), model, 0.5)
    step = train_step(objective, SGD(lr=0.5), micro_batch=1, ranks=ranks)
    state, metrics = step.update(frozen, step.init(trainable), batch)
    return dict(tree.items({"trainable": gather(state.trainable), "metrics": metrics}))


def dtypes_of_step(case: Case, plan: Plan) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """Dtypes of what ranks hold after a step: of the parts of quantized weights, of deltas and of norms."""
    params: Any = random_params(case.config, dtype=case.dtype)
    scheme = {"int8": Int8(), "nf4": NF4()}[case.base]
    params |= {name: quantize(w, scheme) for name, w in params.items() if name.endswith("_proj.weight")}
    params = shard(params, dims(case.config), plan, device_mesh({"data": dist.get_world_size()}, "cpu"))
    deltas = RULE.init(params, 0)
    step = step_of(case, RULE, params, deltas)
    state, _ = step.update(params, step.init(deltas), rows_of(case, 2, 0))
    codes = [leaf for name, w in params.items() if name.endswith("_proj.weight") for leaf in tree.leaves(w)]
    norms = [w for name, w in params.items() if name.endswith("norm.weight")]
    trained_leaves = tree.leaves(state.trainable)
    return {x.dtype for x in codes}, {x.dtype for x in trained_leaves}, {x.dtype for x in norms}


def saved_and_continued(case: Case, batches: list[list[Any]], plan: Plan, mesh: Mesh, folder: Path) -> dict[str, Tensor]:
    """`on_ranks`, but that the ranks save their state after the first batch, and go on with what they read of it."""
    rank = dist.get_rank()
    params: Any = shard(random_params(case.config, dtype=case.dtype), dims(case.config), plan, device_mesh(mesh, "cpu"))
    frozen, trainable = split_trainable(params, ("*",))
    step = step_of(case, None, frozen, trainable)
    state, _ = step.update(frozen, step.init(trainable), batches[0][rank])
    these = ProcessRanks(rank, dist.get_world_size())
    save_state(folder, 1, state, {}, ranks=these)
    state, _ = load_state(folder / "step-00000001", step.init(trainable), these)
    state, metrics = step.update(frozen, state, batches[1][rank])
    return dict(tree.items({"trainable": gather(state.trainable), "state": gather(state.opt_state), "metrics": metrics}))


def read_whole(case: Case, plan: Plan, mesh: Mesh, folder: Path) -> Any:
    """Trained weights of a saved state that these ranks read in parts, whole."""
    params: Any = shard(random_params(case.config), dims(case.config), plan, device_mesh(mesh, "cpu"))
    frozen, trainable = split_trainable(params, ("*",))
    state, _ = load_state(folder / "step-00000001", step_of(case, None, frozen, trainable).init(trainable))
    return gather(state.trainable)


def held(config: DecoderConfig, plan: Plan | None, mesh: Mesh | None) -> int:
    """Bytes of memory behind the trained weights and the optimizer's state of this process, after a step."""
    params: Any = random_params(config)
    if plan is not None:
        params = shard(params, dims(config), plan, device_mesh(mesh or {}, "cpu"))
    frozen, trainable = split_trainable(params, ("*",))
    step = sft_step(model_of(config), None, AdamW(lr=0.01))
    state, _ = step.update(frozen, step.init(trainable), random_batch(config, 1, 5))
    return sum(part.untyped_storage().nbytes() for part in tree.leaves(local_parts(state)))


def begun_and_merged(config: DecoderConfig, plan: Plan | None) -> tuple[Any, Any]:
    """(deltas that a rule with magnitudes begins with, weights with random deltas merged in), on a quantized base."""
    weights = random_params(config)
    names = [name for name in weights if name.endswith("_proj.weight")]
    params: Any = weights | {name: quantize(weights[name], Int8()) for name in names}
    if plan is not None:
        params = shard(params, dims(config), plan, device_mesh({"data": dist.get_world_size()}, "cpu"))
    merged = merge_trainable(params, random_deltas(weights, DORA), DORA, stored=weights)
    return DORA.init(params, 0), merged.params
