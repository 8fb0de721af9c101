"""What is saved loads in transformers 4.57 too, with equal logits; that runs in a process of its own, beside the current one."""

import os
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitune import checkpoint, models
from minitune.models.config import DecoderConfig
from support.closeness import distance
from support.experts import WITH_EXPERTS, small_experts
from support.families import MECHANISMS, sized
from support.models import model_of, random_batch, random_params
from support.scripts import run_script

ATOL = 1e-5  # of the largest logit
VARIABLE = "TRANSFORMERS_4"  # a folder with transformers 4.57 and what it needs in other versions; see CONTRIBUTING.md
ABSENT = ("ministral3",)  # families that 4.57 does not have
CASES = {name: sized(family, **fields) for name, (family, fields, _) in MECHANISMS.items() if family not in ABSENT}
CASES |= {name: small_experts(name) for name in WITH_EXPERTS}
CLAMP = msgspec.structs.replace(CASES["gpt_oss"].experts, limit=7.0)  # no number of the config there
CASES["gpt_oss"] = msgspec.structs.replace(CASES["gpt_oss"], experts=CLAMP)


def logits_of_4(root: Path, name: str) -> dict[str, torch.Tensor]:
    """What transformers 4.57 computes from root/name/CASE; it saves each model in root/theirs/CASE."""
    run_script("transformers_4", str(root), name, PYTHONPATH=os.environ[VARIABLE])
    return {case: load_file(root / f"{name} {case}")["logits"] for case in CASES}


def moderate(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Wide matrices made smaller: a softmax that is nearly one-hot turns the last bit of an angle into the fifth digit."""
    return {n: w * min(1.0, 3 / w.shape[-1] ** 0.5) if w.ndim == 2 else w for n, w in params.items()}


def save(folder: Path, config: DecoderConfig, params: dict[str, torch.Tensor], source: Path | None) -> None:
    checkpoint.save_folder(folder, params, model_of(config), checkpoint.FolderExtras(folder, [2], source=source))


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder; CONTRIBUTING.md says how to make one")
def test_saved_folders_have_equal_logits_in_transformers_4_57(tmp_path: Path) -> None:
    tokens = random_batch(sized("llama"), 2, 34).tokens
    save_file({"tokens": tokens}, tmp_path / "tokens")
    params = {case: moderate(random_params(config)) for case, config in CASES.items()}
    wanted = {case: model_of(config).forward(params[case], tokens) for case, config in CASES.items()}
    for case, config in CASES.items():
        save(tmp_path / "made anew" / case, config, params[case], None)
    logits = logits_of_4(tmp_path, "made anew")
    assert {case: d for case in CASES if (d := distance(logits[case], wanted[case])) > ATOL} == {}
    for case, config in CASES.items():  # what it saves is read, and its config.json passed through
        model = models.open(tmp_path / "theirs" / case)
        assert model == model_of(config), case
        again = checkpoint.load_params(tmp_path / "theirs" / case, model.shapes())
        assert all(torch.equal(again[name], w) for name, w in params[case].items()), case
        save(tmp_path / "passed through" / case, config, again, tmp_path / "theirs" / case)
    logits = logits_of_4(tmp_path, "passed through")
    assert {case: d for case in CASES if (d := distance(logits[case], wanted[case])) > ATOL} == {}
