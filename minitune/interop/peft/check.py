"""Refusal of deltas that no adapter of PEFT can hold."""

from collections.abc import Collection, Mapping

from minitune.errors import InputError
from minitune.interop.peft.layout import module_name
from minitune.models.fused_experts import parameter_by_weight, weights_by_parameter


def check_adapter(
    ranks: Mapping[str, int], whole: Collection[str], *, names: Collection[str], dora: bool
) -> None:
    """InputError for what PEFT can't hold: a delta and a whole tensor in one module, a part of a
    module that has other parts, a DoRA of what it takes for a parameter, experts that it joins but
    that differ; ranks: of the deltas, by weight.
    """
    _require_whole_modules(ranks, whole, names)
    parameter_of = parameter_by_weight(names)
    other = next((name for name in whole if parameter_of.get(name, name) != name), None)
    if other is not None:
        raise InputError(
            f"peft: {other} trains whole, which PEFT knows as {parameter_of[other]} alone, "
            "expected a delta on it; save it merged"
        )
    adapted = next((name for name in ranks if name in parameter_of), None)
    if dora and adapted is not None:
        raise InputError(
            f"peft: {adapted} has a DoRA, expected dora = false: PEFT adapts the feed-forward of a "
            "model with experts without; narrow the targets, drop dora, or save it merged"
        )
    _require_equal_ranks(ranks, names)


def _require_whole_modules(
    ranks: Mapping[str, int], whole: Collection[str], names: Collection[str]
) -> None:
    """InputError unless modules with a whole tensor train all of theirs whole."""
    modules = {module_name(name) for name in ranks}
    both = next((name for name in whole if module_name(name) in modules), None)
    if both is not None:
        raise InputError(
            f"peft: {both} trains whole and {module_name(both)} has a delta, expected one of them: "
            "PEFT holds no more; save it merged"
        )
    kept = {module_name(name) for name in whole}
    apart = next((name for name in names if module_name(name) in kept and name not in whole), None)
    if apart is not None:
        raise InputError(
            f"peft: {apart} does not train, but another tensor of its module trains whole, "
            "expected both: PEFT keeps modules"
        )


def _require_equal_ranks(ranks: Mapping[str, int], names: Collection[str]) -> None:
    """InputError unless all weights that PEFT joins to one parameter have the same rank."""
    for path, joined in weights_by_parameter(names).items():
        first = joined[0]
        other = next((name for name in joined if ranks.get(name) != ranks.get(first)), None)
        if other is not None:
            has, wanted = _delta_words(ranks.get(other)), _delta_words(ranks.get(first))
            raise InputError(
                f"peft: {other} has {has} and {first} {wanted}, expected one rank for all of "
                f"{path}: PEFT joins them; change targets or ranks, or save it merged"
            )


def _delta_words(rank: int | None) -> str:
    """Words for the delta of a weight: its rank, or that there is none."""
    return "no delta" if rank is None else f"a delta of rank {rank}"
