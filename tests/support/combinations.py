"""What ranks can train together: every combination of ways that may be mixed, and those that may not, with the reason.

PYTHONPATH=tests python -m support.combinations      writes the table of docs/sharding.md anew
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import msgspec

from minitune.optim.sgd import SGD
from support.experts import small_experts
from support.families import config_of
from support.paths import ROOT
from support.sharded import Case

PAGE = ROOT / "docs/sharding.md"
COMMAND = "PYTHONPATH=tests python -m support.combinations"
HEADING = "## What goes together\n"
# distance of ranks to float64, in units of that of one process: both add up, in other orders. Of all 144 combinations of
# tp_fsdp and ep half are below 1, and the worst is 2.0
ROUNDING_RATIO = 4

MESHES: dict[str, dict[str, int]] = {
    "dp": {"data": 2},
    "fsdp": {"data": 2},
    "hsdp": {"replica": 2, "data": 2},
    "cp": {"data": 2, "context": 2},
    "tp_fsdp": {"data": 2, "tensor": 2},
    "ep": {"data": 2, "expert": 2},
}
# as many ranks as show what is shared: the usual tests are quicker with them
FEW_RANKS: dict[str, dict[str, int]] = {**MESHES, "tp_fsdp": {"data": 1, "tensor": 2}, "ep": {"data": 1, "expert": 2}}
# maps into the residual stream have 128 columns, a block of NF4 for each of two ranks
SIZES: dict[str, Any] = {"n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "d_model": 64, "d_ff": 128, "d_head": 16}
CONFIG = msgspec.structs.replace(config_of("llama"), **SIZES)
EXPERTS = msgspec.structs.replace(small_experts("qwen2_moe").experts, n_experts=4, d_ff=32, d_shared=96)
# a block without experts, and one with
MIXTURE = msgspec.structs.replace(config_of("qwen2_moe"), **SIZES, experts=EXPERTS)


class Refusal(NamedTuple):
    """Choices that may not be mixed."""

    choices: str  # as the page names them
    because: str
    said: str  # words of the error


CODES_THAT_TRAIN = Refusal(
    "`full` with `int8` or `nf4`",
    "codes of a quantized weight don't train; train deltas beside them, or a dense base",
    "expected a dense weight, because codes don't train",
)


class Combination(NamedTuple):
    """One choice of each kind."""

    plan: str
    trains: str
    loss: str
    base: str
    rows: str
    recomputed: str

    def case(self) -> Case:
        """Training of a small model in this way."""
        config = MIXTURE if self.plan == "ep" else CONFIG
        n_remat = {"no block": 0, "every block": config.n_layers}[self.recomputed]
        is_packed = self.rows == "packed"
        how: Any = {"base": self.base, "is_packed": is_packed, "optimizer": SGD(lr=0.5)}
        return Case(config, self.loss, self.trains, 2, n_remat, **how)

    def refused(self) -> Refusal | None:
        """Reason why this may not be mixed; None if it may."""
        if self.trains == "full" and self.base != "dense":
            return CODES_THAT_TRAIN
        return None


KINDS = {
    "plan": tuple(MESHES),
    "trains": ("lora", "dora", "full"),
    "loss": ("sft", "dpo", "kd"),
    "base": ("dense", "int8", "nf4"),
    "rows": ("packed", "one document"),
    "recomputed": ("no block", "every block"),
}


def every() -> Iterator[Combination]:
    """Every combination, those that may not be mixed among them."""
    return (Combination(*choices) for choices in product(*KINDS.values()))


def allowed() -> list[Combination]:
    """Every combination that may be mixed."""
    return [one for one in every() if one.refused() is None]


def pairs_of(one: Combination) -> set[tuple[Any, ...]]:
    """Choices of any two kinds in a combination."""
    return {(*first, *second) for first, second in combinations(one._asdict().items(), 2)}


def covering(those: Sequence[Combination]) -> Iterator[Combination]:
    """Few of them, in which any two choices that go together meet."""
    missing = set().union(*map(pairs_of, those))
    while missing:
        best = max(those, key=lambda one: len(pairs_of(one) & missing))
        missing -= pairs_of(best)
        yield best


def table() -> str:
    """Section of the page."""
    n_allowed, few = len(allowed()), len([*covering(allowed())])
    words = {"trains": "what trains", "loss": "losses", "base": "frozen weights", "rows": "rows", "recomputed": "recomputed"}
    rows = [f"| {words.get(kind, kind)} | {', '.join(f'`{choice}`' for choice in choices)} |" for kind, choices in KINDS.items()]
    refusals = sorted({one for one in (each.refused() for each in every()) if one is not None})
    return "\n".join(
        [
            f"This section is written by `{COMMAND}` from the table that the tests use.",
            "",
            "| kind | choices |",
            "|---|---|",
            *rows,
            "",
            f"Any choice goes with any other, but for those below: {n_allowed} combinations take the",
            "step of one process. From what float64 computes of it they are at most",
            f"{ROUNDING_RATIO} times as far as one process in float32 is. The usual tests run {few} of",
            "them, in which every two choices meet, and `pytest -m soak` all.",
            "`ep` is run on a mixture of experts, the others on a Llama.",
            "",
            "Refused before a step begins:",
            "",
            *(f"- {one.choices}: {one.because}." for one in refusals),
            "",
        ]
    )


def written(page: str) -> str:
    """Page with the section written anew."""
    head, _, rest = page.partition(HEADING)
    _, following, tail = rest.partition("\n## ")
    return f"{head}{HEADING}{table()}{following}{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), encoding="utf-8")
