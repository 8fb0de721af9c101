"""Names of other tools: every key that a message offers exists, and can be typed."""

import pytest

from minitune.errors import InputError
from minitune.programs import program
from minitune.programs.field_names import KEYS, NO_KEYS, SENTENCES, suggest
from support.paths import ROOT
from support.programs import fields_beside

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("key", sorted({key for key, _, _ in KEYS}))
def test_a_key_that_is_offered_exists(key: str) -> None:
    assert key.rpartition(".")[2] in fields_beside(key)


def test_a_key_that_does_not_exist_is_found() -> None:
    assert "rnk" not in fields_beside("lora.rnk")
    assert "rank" in fields_beside("lora.rank")


def test_each_name_of_other_tools_has_one_meaning_in_a_table() -> None:
    """A second key for a name is of another table, and the last word of the first is not there."""
    names = [name for *_, names in (*KEYS, *NO_KEYS) for name in names.split()]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"max_seq_length", "max_seq_len"}
    for name in twice:
        first, second = [key for key, _, names in KEYS if name in names.split()]
        assert first.rpartition(".")[2] not in fields_beside(second)
    assert set(names) == set(SENTENCES)
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
        (
            "max_steps_per_epoch",
            "; max_steps_per_epoch is train.steps here: theirs are those of one epoch",
        ),
        ("load_best_model_at_end", "; load_best_model_at_end is train.evaluate.keep here"),
        ("lmbda", "; the share of answers that a student writes is not there"),
        ("adapter", '; adapter is model.deltas here: of a folder; "lora" is a stage'),
        ("precompute_ref_log_probs", '; precompute_ref_log_probs is train.reference here: reference = "cached"'),
        ("bias", "; bias is lora.train here"),
        ("cpo_alpha", "; cpo_alpha is train.loss.nll_weight here"),
        ("gamma_beta_ratio", "; gamma_beta_ratio is train.loss.gamma here: of simpo, in nats: that ratio times beta"),
        ("batch_size", "; batch_size is train.batch_size here"),
        ("epochs", "; epochs is train.epochs here"),
        ("dtype", "; dtype is model.dtype here"),
        ("tokenizer", "; tokenizer is model.tokenizer here"),
        ("apply_lora_to_mlp", "; apply_lora_to_mlp is lora.targets here"),
        ("conversation_column", "; conversation_column is data.train.columns here"),
        ("prompt_template", "; texts are written by the model's chat template"),
        ("num_cycles", "; half a wave is the only cosine"),
        ("fused", "; the optimizer is fused wherever torch has it"),
        ("max_prompt_length", "; seq_len holds prompt and answer together"),
        ("padding_free", "; padding_free is data.train.packed here"),
        ("group_by_length", "; rows come in a random order"),
        ("push_to_hub", '; [[stage]] op = "upload" with repo'),
        ("deepspeed", "; a launcher says the ranks"),
        ("init_lora_weights", "; deltas begin as in LoRA"),
        ("rpo_alpha", "; fine-tuning beside the preference is not there for dpo"),
        ("max_seq_length", "; max_seq_length is data.train.seq_len here"),
        ("rnk", "; did you mean 'rank'?"),
        ("nothing like it", ""),
    ],
)
def test_a_name_is_answered_by_what_it_is_here(name: str, end: str) -> None:
    assert suggest(name, ["rank", "alpha"]).startswith(end)
    assert bool(suggest(name, ["rank", "alpha"])) == bool(end)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "harness.max_seq_length=512",
            "is unknown, .*; max_seq_length is harness.max_length here: tokens$",
        ),
        ("harness.seq_length=512", "; seq_length is data.train.seq_len here"),
        ("batch_size=4", "batch_size is unknown, .*; batch_size is train.batch_size here"),
        (
            "tokenizer.max_seq_len=4",
            "; tokenizer is model.tokenizer here: .* its max_seq_len is data.train.seq_len$",
        ),
    ],
)
def test_the_hint_looks_at_the_stage_that_it_stands_in(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        program.load(ROOT / "programs/harness.toml", [override])
