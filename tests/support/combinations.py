"""What ranks can train together: every combination of ways that may be mixed, and those that may not, with the reason.

PYTHONPATH=tests python -m support.combinations      writes the table of docs/sharding.md anew
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import msgspec

from minitune.optim.sgd import SGD
from support.families import config_of
from support.paths import ROOT
from support.sharded import Case

PAGE = ROOT / "docs/sharding.md"
COMMAND = "PYTHONPATH=tests python -m support.combinations"
HEADING = "## What goes together\n"

MESHES: dict[str, dict[str, int]] = {
    "dp": {"data": 2},
    "fsdp": {"data": 2},
    "hsdp": {"replica": 2, "data": 2},
    "cp": {"data": 2, "context": 2},
}
CONFIG = msgspec.structs.replace(config_of("llama"), n_layers=2, d_model=64, d_ff=128, d_head=16)


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
        n_remat = {"no block": 0, "every block": CONFIG.n_layers}[self.recomputed]
        is_packed = self.rows == "packed"
        how: Any = {"base": self.base, "is_packed": is_packed, "optimizer": SGD(lr=0.5)}
        return Case(CONFIG, self.loss, self.trains, 2, n_remat, **how)

    def refused(self) -> str:
        """Reason why this may not be mixed; empty if it may."""
        if self.trains == "full" and self.base != "dense":
            return "codes of a quantized weight don't train; train deltas beside them, or a dense base"
        return ""


KINDS = {
    "plan": tuple(MESHES),
    "trains": ("lora", "dora", "full"),
    "loss": ("sft", "dpo", "kd"),
    "base": ("dense", "int8", "nf4"),
    "rows": ("packed", "one document"),
    "recomputed": ("no block", "every block"),
}


def allowed() -> list[Combination]:
    """Every combination that may be mixed."""
    return [one for one in (Combination(*choices) for choices in product(*KINDS.values())) if not one.refused()]


def pairs_of(one: Combination) -> set[tuple[Any, ...]]:
    """Choices of any two kinds in a combination."""
    return {(*first, *second) for first, second in combinations(one._asdict().items(), 2)}


def covering(every: Sequence[Combination]) -> Iterator[Combination]:
    """Few of them, in which any two choices that go together meet."""
    missing = set().union(*map(pairs_of, every))
    while missing:
        best = max(every, key=lambda one: len(pairs_of(one) & missing))
        missing -= pairs_of(best)
        yield best


def table() -> str:
    """Section of the page."""
    every, few = allowed(), len([*covering(allowed())])
    words = {"trains": "what trains", "loss": "losses", "base": "frozen weights", "rows": "rows", "recomputed": "recomputed"}
    rows = [f"| {words.get(kind, kind)} | {', '.join(f'`{choice}`' for choice in choices)} |" for kind, choices in KINDS.items()]
    refused = sorted({one.refused() for one in (Combination(*choices) for choices in product(*KINDS.values()))} - {""})
    return "\n".join(
        [
            f"This section is written by `{COMMAND}` from the table that the tests use.",
            "",
            "| kind | choices |",
            "|---|---|",
            *rows,
            "",
            f"Any choice goes with any other: {len(every)} combinations take the step of one process, to 2e-6 of the largest",
            f"number of each leaf. The usual tests run {few} of them, in which every two choices meet, and `pytest -m soak` all.",
            "Not among them:",
            "",
            *(f"- `full` with `int8` or `nf4`: {reason}." for reason in refused),
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
