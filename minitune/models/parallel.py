"""Which models ranks may share: what axes of a mesh (context, tensor, expert) ask of a config."""

import math
from collections.abc import Mapping

from minitune.errors import InputError
from minitune.models.config import DecoderConfig
from minitune.sharding.context import check_heads
from minitune.sharding.experts import check_axis, check_experts
from minitune.sharding.mesh import check_dealt_out
from minitune.sharding.tensor_parallel import AXIS

# meanings of dims whose parts ranks compute with, or gather whole as that of the embedding
SHARED_DIMS = ("heads", "d_ff", "vocab")


def check_sharing(config: DecoderConfig, plan: Mapping[str, str], mesh: Mapping[str, int]) -> None:
    """InputError for a mesh whose ranks can't share rows and linear maps of this model by the plan;
    plan: meaning of a dim -> axis, mesh: axis -> ranks along it.
    """
    check_axis(plan, mesh)
    n = mesh.get(AXIS, 1)
    if n > 1:
        _check_cuts(plan, n)
        _check_maps(config, plan)
        _check_key_heads(config, n)
    check_heads(config.n_heads // n, mesh.get("context", 1))
    if config.experts is not None:
        check_experts(config.experts.n_experts, mesh.get("expert", 1))


def _check_cuts(plan: Mapping[str, str], n: int) -> None:
    """InputError for a plan by which ranks would share tokens and have no heads of their own."""
    if plan.get("heads") != AXIS:
        raise InputError(
            f"sharding: the mesh has {n} ranks on the axis tensor, expected a plan with "
            'heads = "tensor", as plan = "tp_fsdp" has; take that, or put the ranks on another axis'
        )
    wrong = [dim for dim, axis in plan.items() if axis == AXIS and dim not in SHARED_DIMS]
    if wrong:
        raise InputError(
            f'sharding: the plan has {wrong[0]} = "tensor", expected only {", ".join(SHARED_DIMS)} '
            f'there, by which ranks share linear maps; put {wrong[0]} on another axis, as "data"'
        )


def _check_maps(config: DecoderConfig, plan: Mapping[str, str]) -> None:
    """InputError for a model with a map that has no part for each rank."""
    instead = 'take plan = "fsdp", or "cp" for long rows'
    if config.fused:
        raise InputError(
            "sharding: this model has queries, keys and values in one weight, and gate and up in "
            f"another, expected one each, which the axis tensor cuts by heads; {instead}"
        )
    if config.qk_norm == "projection":
        raise InputError(
            "sharding: this model norms the queries of all heads together, expected no norm or "
            f"one of each head, because a rank of the axis tensor has some heads; {instead}"
        )
    if config.experts is not None and plan.get("d_ff") == AXIS:
        raise InputError(
            'sharding: the plan has d_ff = "tensor" and the model has experts, which are no maps '
            'that ranks share, expected d_ff on another axis; write d_ff = "data"'
        )


def _check_key_heads(config: DecoderConfig, n: int) -> None:
    """InputError for heads that are not as many on each of n ranks."""
    heads, keys = config.n_heads, config.n_kv_heads
    things = f"{heads} heads of queries and {keys} of keys"
    check_dealt_out(AXIS, n, things, math.gcd(heads, keys))
