"""Weight decay by globs takes the steps of torch's parameter groups, whatever the rule."""

from pathlib import Path

import pytest
import torch

from minitune import tree
from minitune.errors import InputError
from minitune.optim import eight_bit, muon
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients
from minitune.optim.decay_groups import decay_groups
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, chain
from support.programs import LORA, TRAIN, run, start

FACTORS = {"*norm.weight": 0.0, "*.bias": 0.0, "embed*": 0.25}
SHAPES = {"embed.weight": (31, 7), "up.weight": (11, 7), "up.bias": (11,), "norm.weight": (7,), "down.weight": (7, 11)}


def leaves(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(optimizer: object, donate: bool) -> dict[str, torch.Tensor]:
    params, one = leaves(0), torch.tensor(1.0)
    state = optimizer.init(params)
    for i in range(5):
        how = {"divisor": one, "norm": tree.norm(leaves(i + 1)), "is_finite": one > 0, "donate": donate}
        params, state = apply_gradients(optimizer, leaves(i + 1), state, params, **how)
    return params


REFERENCES = {
    "adamw": (AdamW(lr=0.05, weight_decay=0.3), lambda groups: torch.optim.AdamW(groups, lr=0.05)),
    "sgd": (SGD(lr=0.05, momentum=0.9, weight_decay=0.3), lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", REFERENCES)
def test_steps_are_those_of_torchs_parameter_groups(kind: str, donate: bool) -> None:
    rule, reference = REFERENCES[kind]
    ours = stepped(chain(ClipByGlobalNorm(1e9), decay_groups(rule, FACTORS, list(SHAPES))), donate)
    theirs = {name: torch.nn.Parameter(w) for name, w in leaves(0).items()}
    decays = {"embed.weight": 0.25 * 0.3, "up.weight": 0.3, "down.weight": 0.3, "up.bias": 0.0, "norm.weight": 0.0}
    optimizer = reference([{"params": [theirs[name]], "weight_decay": decay} for name, decay in decays.items()])
    for i in range(5):
        for name, g in leaves(i + 1).items():
            theirs[name].grad = g
        optimizer.step()
    for name, w in theirs.items():
        torch.testing.assert_close(ours[name], w.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [eight_bit.AdamW8bit, muon.Muon])
def test_each_leaf_of_other_rules_has_the_decay_of_its_factor(kind: type) -> None:
    ours = stepped(decay_groups(kind(lr=0.05, weight_decay=0.3), FACTORS, list(SHAPES)), donate=False)
    for name, factor in (("embed.weight", 0.25), ("up.weight", 1.0), ("norm.weight", 0.0)):
        torch.testing.assert_close(ours[name], stepped(kind(lr=0.05, weight_decay=factor * 0.3), donate=False)[name])


def test_without_factors_the_rule_is_itself_and_a_glob_must_match() -> None:
    rule = AdamW(lr=0.1, weight_decay=0.1)
    assert decay_groups(rule, {}, ["a"]) is rule
    with pytest.raises(InputError, match=r"optim: decay factor: 'nrom\*' matches no weight"):
        decay_groups(rule, {"nrom*": 0.0}, ["norm.weight"])


def test_a_program_has_groups_and_check_refuses_those_that_do_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = LORA + TRAIN.replace("lr = 0.05", "lr = 0.05, weight_decay = 0.9")
    words = ("train.steps=2", "model.device=cpu")
    run(tmp_path, tiny, stages + 'decay_factors = { "*.a" = 0.0 }\n', *words, name="spared")
    refused = {
        'decay_factors = { "*.c" = 0.0 }\n': "optim: decay factor: '*.c' matches no weight",
        'lr_factors = { "*.c" = 0.0 }\n': "optim: lr factor: '*.c' matches no weight",
    }
    for line, message in refused.items():
        assert start(tmp_path, tiny, stages + line, verb=("check",)) == 2
        assert message in capsys.readouterr().err
    assert start(tmp_path, tiny, LORA + TRAIN + 'decay_factors = { "*.b" = 0.0 }\n', verb=("check",)) == 2
    assert "has decay_factors and optimizer.weight_decay = 0" in capsys.readouterr().err
