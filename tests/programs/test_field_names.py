"""Names of other tools: every key that a message offers exists, and can be typed."""

import pytest

from minitune.programs.field_names import KEYS, NO_KEYS, SENTENCES, suggest
from support.programs import fields_beside

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("key", sorted({key for key, _, _ in KEYS}))
def test_a_key_that_is_offered_exists(key: str) -> None:
    assert key.rpartition(".")[2] in fields_beside(key)


def test_a_key_that_does_not_exist_is_found() -> None:
    assert "rnk" not in fields_beside("lora.rnk")
    assert "rank" in fields_beside("lora.rank")


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
