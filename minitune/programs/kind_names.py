"""Kinds of a loss, an optimizer, a schedule and a scheme as other tools name them, and those here.

Only a kind that does the same has a name here; of any other a message says that it is not there.
"""

from collections.abc import Sequence

from minitune.errors import nearest
from minitune.io.toml_writing import inline_text

# fmt: off
# (kind here, what a reader must know of it, the kinds elsewhere)
KINDS = (
    ("dpo", "", "sigmoid dpoloss"),
    ("hinge", "", "rso rsoloss"),
    ("ipo", "", "ipoloss"),
    ("apo_zero", "", "apo"),
    ("simpo", "", "simpoloss"),
    ("jensen_shannon", "", "jsd js"),
    ("forward_kl", "", "kl kd_loss kldiv forwardklloss forwardklwithchunkedoutputloss"),
    ("reverse_kl", "", "rkl reversekl reverseklloss"),
    ("symmetric_kl", "", "symmetricklloss"),
    ("cross_entropy", "",
        "nll ce sft crossentropyloss linearcrossentropyloss cewithchunkedoutputloss"),
    ("adamw", "",
        "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused"),
    ("adamw", "with weight_decay = 0", "adam"),
    ("adamw", "which is not paged", "paged_adamw paged_adamw_32bit pagedadamw"),
    ("adamw8bit", "", "adamw_8bit adamw_bnb_8bit adamw_torch_8bit adam8bit"),
    ("adamw8bit", "which is not paged", "paged_adamw_8bit pagedadamw8bit"),
    ("cosine", "", "get_cosine_schedule_with_warmup cosine_with_warmup"),
    ("cosine", "with end = a share of the peak", "cosine_with_min_lr"),
    ("linear", "", "get_linear_schedule_with_warmup linear_with_warmup"),
    ("constant", "with warmup_steps", "constant_with_warmup"),
    ("wsd", "", "warmup_stable_decay"),
    ("inverse_sqrt", "", "inverse_sqrt_with_warmup inverse_square_root"),
    ("float8", "", "fp8 float8_e4m3fn float8_dynamic"),
    ("int4", "which rounds weights alone", "int4_weight_only int4_wo w4a16"),
    ("int8", "which rounds weights alone", "int8_weight_only int8_wo w8a16"),
    ("nf4", "", "bnb_4bit bitsandbytes 4bit"),
    ("nvfp4", "which rounds weights alone", "nvfp4a16"),
    ("mxfp4", "which rounds weights alone", "mxfp4a16"),
)
# (what is said of kinds that are not there, their names, a kind that stands in the same place)
ABSENT = (
    ("", "robust exo_pair nca_pair bco bco_pair sppo_hard aot aot_pair aot_pairs "
        "discopop sigmoid_norm grpo ppo", "dpo"),
    ("", "adafactor lion lion_8bit lion_32bit paged_lion paged_lion_8bit adagrad rmsprop lamb lars "
        "galore_adamw lomo adalomo sophia shampoo schedule_free_adamw grokadamw apollo_adamw",
        "adamw"),
    ("", "polynomial cosine_with_restarts reduce_lr_on_plateau rex one_cycle", "cosine"),
    ("8-bit activations go with 8-bit weights: int8, and activations = \"int8\" in export",
        "8da4w int8dynactint4weightquantizer w4a8", "int4"),
    ("int4 with method = { kind = \"gptq\" } is calibrated on data too",
        "awq hqq aqlm autoround", "int4"),
    ("", "fp4 int2 int3", "int4"),
)
# fmt: on
RATES = {"adamw": "1e-4", "adamw8bit": "1e-4", "muon": "0.02", "sgd": "0.1"}  # lr of an example


def _elsewhere() -> dict[str, tuple[str, str]]:
    """Kind elsewhere -> (kind here, what a reader must know of it)."""
    return {name: (kind, note) for kind, note, names in KINDS for name in names.split()}


def _absent() -> dict[str, tuple[str, str]]:
    """Kind that is not there -> (what is said of it, a kind that stands in the same place)."""
    return {name: (note, beside) for note, names, beside in ABSENT for name in names.split()}


ELSEWHERE, NOT_THERE = _elsewhere(), _absent()


def suggest_kind(value: str, known: Sequence[str]) -> str:
    """End of a message about an unknown kind: what it is here, that it is not there, or the kind
    that it may be a misspelling of.
    """
    kind, note = _here(value, known)
    if kind is not None:
        return f"; {value} is {inline_text(kind)} here{f', {note}' if note else ''}"
    said, beside = NOT_THERE.get(_plain(value), ("", ""))
    if beside in known:
        return f"; {value} is not there{f': {said}' if said else ''}"
    return nearest(value, known)


def example_table(field: str, value: str, known: Sequence[str]) -> str | None:
    """Table that is meant by a kind that stands alone, { kind = "dpo" }; None for no kind.

    field: the key that the kind stands under.
    """
    kind, _ = _here(value, known)
    if kind is None:
        return None
    rate = f", lr = {RATES[kind]}" if kind in RATES else ""
    return f"{{ {field} = {inline_text(kind)}{rate} }}"


def _here(value: str, known: Sequence[str]) -> tuple[str | None, str]:
    """(a kind of those known that does the same, what a reader must know of it), or (None, "")."""
    plain = _plain(value)
    if plain in known:
        return plain, ""
    kind, note = ELSEWHERE.get(plain, (None, ""))
    return (kind, note) if kind in known else (None, "")


def _plain(value: str) -> str:
    """Name of a kind without case and the modules before it: adamw of torch.optim.AdamW."""
    return value.casefold().rpartition(".")[2].replace("-", "_")
