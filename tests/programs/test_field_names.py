"""Names of other tools: every key that a message offers exists, and can be typed."""

import msgspec
import pytest

from minitune.io.toml_messages import types_at
from minitune.programs.field_names import KEYS, NO_KEYS, SENTENCES, suggest
from minitune.programs.program import Program
from minitune.programs.stages.stage import Stage

pytestmark = pytest.mark.fast
OPS = {stage.__struct_config__.tag for stage in Stage.__args__}


def fields(key: str) -> list[str]:
    """Names of the keys that stand beside a key of the table, in whatever struct can hold it."""
    head, *rest = key.split(".")
    path: tuple[str | int, ...] = (head, *rest)
    raw: dict = {}
    if head in OPS:
        path, raw = ("stage", 0, *rest), {"stage": [{"op": head}]}
    kinds = types_at(Program, raw, path[:-1])
    return [field.encode_name for kind in kinds if isinstance(kind, msgspec.inspect.StructType) for field in kind.fields]


@pytest.mark.parametrize("key", sorted({key for key, _, _ in KEYS}))
def test_a_key_that_is_offered_exists(key: str) -> None:
    assert key.rpartition(".")[2] in fields(key)


def test_a_key_that_does_not_exist_is_found() -> None:
    assert "rnk" not in fields("lora.rnk")
    assert "rank" in fields("lora.rank")


def test_each_name_of_other_tools_has_one_meaning() -> None:
    names = [name for *_, names in (*KEYS, *NO_KEYS) for name in names.split()]
    assert len(names) == len(set(names)) == len(SENTENCES)
    assert len(names) > 150
    assert all(name == name.casefold().replace("-", "_") for name in names)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gradient_accumulation_steps", "; gradient_accumulation_steps is train.micro_batch_size here: batch_size counts the"),
        ("--gradient-accumulation-steps", "; gradient_accumulation_steps is train.micro_batch_size here"),
        ("r", "; r is lora.rank here"),
        ("lr", "; lr is train.optimizer.lr here"),
        ("trust_remote_code", "; no code of a model folder is ever run"),
        ("rnk", "; did you mean 'rank'?"),
        ("nothing like it", ""),
    ],
)
def test_a_name_is_answered_by_what_it_is_here(name: str, end: str) -> None:
    assert suggest(name, ["rank", "alpha"]).startswith(end)
    assert bool(suggest(name, ["rank", "alpha"])) == bool(end)
