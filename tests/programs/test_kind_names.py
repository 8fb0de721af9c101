"""Kinds of other tools: one that a message offers exists and does the same, and no other is guessed."""

import msgspec
import pytest

from minitune.errors import InputError, nearest
from minitune.io.toml_messages import types_at
from minitune.programs import program
from minitune.programs.kind_names import ABSENT, KINDS, RATES, example_table, suggest_kind
from support.paths import ROOT

pytestmark = pytest.mark.fast
LORA = ROOT / "programs/lora.toml"


def kinds_of(op: str, key: str) -> list[str]:
    """Kinds that stand under a key of a stage."""
    kinds = types_at(program.Program, {"stage": [{"op": op}]}, ("stage", 0, key))
    return [str(kind.tag) for kind in kinds if isinstance(kind, msgspec.inspect.StructType)]


LOSSES, OPTIMIZERS, SCHEDULES = (kinds_of("train", key) for key in ("loss", "optimizer", "schedule"))
SCHEMES = kinds_of("quantize", "scheme")


def test_each_kind_that_is_offered_exists_and_each_name_stands_once() -> None:
    here = {*LOSSES, *OPTIMIZERS, *SCHEDULES, *SCHEMES}
    assert {kind for kind, _, _ in KINDS} | {beside for *_, beside in ABSENT} <= here
    assert set(RATES) == set(OPTIMIZERS)
    names = [name for _, _, names in KINDS for name in names.split()] + [name for _, names, _ in ABSENT for name in names.split()]
    assert len(names) == len(set(names)) > 80
    assert here.isdisjoint(names)


@pytest.mark.parametrize(
    ("value", "known", "end"),
    [
        ("sigmoid", LOSSES, '; sigmoid is "dpo" here'),
        ("torchtune.rlhf.loss.RSOLoss", LOSSES, '; torchtune.rlhf.loss.RSOLoss is "hinge" here'),
        ("jsd", LOSSES, '; jsd is "jensen_shannon" here'),
        ("kd_loss", LOSSES, '; kd_loss is "forward_kl" here'),
        ("torch.optim.AdamW", OPTIMIZERS, '; torch.optim.AdamW is "adamw" here'),
        ("adamw-8bit", OPTIMIZERS, '; adamw-8bit is "adamw8bit" here'),
        ("paged_adamw_8bit", OPTIMIZERS, '; paged_adamw_8bit is "adamw8bit" here, which is not paged'),
        ("fp8", SCHEMES, '; fp8 is "float8" here'),
        ("8da4w", SCHEMES, "; 8da4w is not there: 8-bit activations go with 8-bit weights"),
        ("awq", SCHEMES, "; awq is not there: int4 with method = "),
        *((kind, LOSSES, f"; {kind} is not there") for kind in ("robust", "exo_pair", "nca_pair")),
        *((kind, OPTIMIZERS, f"; {kind} is not there") for kind in ("adafactor", "lion")),
        ("sigmiod", LOSSES, ""),  # no kind here is near, and none is guessed
        ("hinje", LOSSES, "; did you mean 'hinge'?"),
        ("lion", LOSSES, ""),  # an optimizer, where a loss is asked for
        ("sigmoid", OPTIMIZERS, ""),
    ],
)
def test_a_kind_is_answered_by_what_does_the_same(value: str, known: list[str], end: str) -> None:
    assert suggest_kind(value, known).startswith(end)
    assert bool(suggest_kind(value, known)) == bool(end)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=torch.optim.AdamW", r'expected table; write \{ kind = "adamw", lr = 1e-4 \}$'),
        ("train.optimizer=lion", "expected table; lion is not there$"),
        ("train.loss=sigmoid", r'expected table; write \{ kind = "dpo" \}$'),
        ('train.loss={ kind = "sigmoid" }', 'train.loss.kind is "sigmoid", expected one of .*; sigmoid is "dpo" here$'),
        ('train.loss={ kind = "robust" }', "robust is not there$"),
    ],
)
def test_a_program_says_so(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        program.load(LORA, [override])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_example_of_an_optimizer_is_one_that_loads(kind: str) -> None:
    table = example_table("kind", kind, OPTIMIZERS)
    program.load(LORA, [f"train.optimizer={table}"])


@pytest.mark.parametrize(
    ("name", "known"), [("rpo_alpha", "neftune_alpha"), ("profiler", "compiled"), ("safetensors", "after"), ("sigmoid", "simpo")]
)
def test_a_word_that_shares_letters_but_no_meaning_is_no_guess(name: str, known: str) -> None:
    assert nearest(name, [known]) == ""


@pytest.mark.parametrize(
    ("name", "known"),
    [("rl", "lr"), ("rnk", "rank"), ("loar", "lora"), ("thinking", "enable_thinking")],
)
def test_a_misspelled_word_is_one(name: str, known: str) -> None:
    assert nearest(name, ["other", known]) == f"; did you mean {known!r}?"
