"""What the backward keeps and what it computes: blocks computed again by a budget, and nothing below the first delta."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minitune import tree
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import detached_leaves, value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.planning.activations import kept_bytes, n_remat
from support.models import SMALL, random_batch, random_params
from support.programs import LORA, TRAIN, run, start

CONFIG = llama.Config(
    n_layers=5, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_ff=48, vocab_size=61, norm_eps=1e-3, tie_embeddings=False
)
RULE = Lora(4, 8.0, ("*_proj.weight",))


def kept_by_forward(model: Model, params: dict, deltas: dict, batch: object) -> int:
    """Bytes that all blocks together keep, counted over a whole forward."""
    adapted = RULE.apply(params, detached_leaves(deltas))

    def forward(x: torch.Tensor, *_: object) -> torch.Tensor:
        return model.hidden({**adapted, "model.embed_tokens.weight": x}, batch)

    return kept_bytes(forward, params["model.embed_tokens.weight"], adapted)


def test_the_bytes_that_a_function_keeps_are_those_of_its_saved_tensors() -> None:
    x, w = torch.randn(7, 5), torch.randn(5, 5)
    assert kept_bytes(lambda x, w: x @ w, x, w) == 0  # its gradient needs w alone
    assert kept_bytes(lambda x, w: (x @ w).exp() * 2.0, x, w) == 7 * 5 * 4
    assert kept_bytes(lambda x, w: (x @ w).exp().sin(), x, w) == 7 * 5 * 4  # both keep the same one
    assert kept_bytes(lambda x, w: (x @ w).sin().sin(), x, w) == 2 * 7 * 5 * 4
    assert kept_bytes(lambda x, w: remat(lambda x, w: (x @ w).sin().sin())(x, w), x, w) == 0


def test_a_budget_is_kept_with_as_few_blocks_computed_again_as_it_takes() -> None:
    params, batch = random_params(CONFIG), random_batch(CONFIG, 3, 41)
    deltas = RULE.init(params, 0)
    model = Model(llama.FAMILY, CONFIG)
    kept = [kept_by_forward(model._replace(n_remat=n), params, deltas, batch) for n in range(6)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 3 * kept[5]
    between_blocks = kept[5] - 5 * 3 * 41 * CONFIG.d_model * 4  # of the last norm, the angles and the scaled deltas
    first = (kept[1] - kept[2]) - (kept[0] - kept[1])  # what the first block keeps less: its input needs no gradient
    adapted = apply_trainable(params, detached_leaves(deltas), RULE)
    for n in range(6):
        room = kept[n] - between_blocks + (first if n == 0 else 0)
        assert n_remat(model, adapted, 3, 41, room) == n
        if n < 5:
            assert n_remat(model, adapted, 3, 41, room - 1) == n + 1
    with pytest.raises(InputError, match=r"memory: 5 blocks keep .* MiB for the backward of 3 x 41 tokens when all are computed"):
        n_remat(model, adapted, 3, 41, 5 * 3 * 41 * CONFIG.d_model * 4 - 1)


def test_any_number_of_blocks_computed_again_gives_the_same_gradient() -> None:
    params, batch = random_params(SMALL, dtype=torch.float64), random_batch(SMALL, 2, 19)
    deltas = tree.map(torch.Tensor.double, RULE.init(params, 0))
    grads = []
    for n in range(SMALL.n_layers + 1):
        objective = sft(Model(llama.FAMILY, SMALL, n_remat=n), RULE)
        grads.append(value_and_grad(lambda d, f=objective: f(d, params, batch), has_aux=True)(deltas))
    for one in grads[1:]:
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12), one, grads[0])


@pytest.mark.parametrize("remat", [False, True])
def test_no_backward_below_the_first_adapted_layer(remat: bool) -> None:
    params, batch = random_params(CONFIG), random_batch(CONFIG, 2, 33)
    flops = {}
    for first in (0, 3):
        rule = Lora(4, 8.0, tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(first, 5)))
        objective = sft(Model(llama.FAMILY, CONFIG, n_remat=5 if remat else 0), rule)
        deltas = rule.init(params, 0)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            objective(deltas, params, batch)
        with FlopCounterMode(display=False) as both:
            value_and_grad(lambda d, f=objective: f(d, params, batch), has_aux=True)(deltas)
        flops[first] = both.get_total_flops() - forward.get_total_flops()
    with FlopCounterMode(display=False) as block:
        Model(llama.FAMILY, CONFIG).hidden(params, batch)
    share = block.get_total_flops() / 5
    # three layers less to go back through: at least their activation gradients, and with remat their second forward too
    assert flops[0] - flops[3] > 2.5 * share * (2 if remat else 1)


def test_a_program_takes_a_budget_and_says_what_it_made_of_it(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    losses = {}
    for name, written in (("plain", "false"), ("all", "true"), ("some", '"2 MiB"'), ("host", '"host"')):
        summary = run(tmp_path, tiny, LORA + TRAIN + f"remat = {written}\n", name=name)
        losses[name] = (summary["steps"], (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").count("loss"))
    assert losses["plain"] == losses["all"] == losses["some"] == losses["host"]
    printed = capsys.readouterr().out
    assert "train: 1 of 2 blocks are computed again to stay within 2 MiB" in printed
    if not torch.cuda.is_available():
        assert printed.count("train: remat = 'host' is remat = true on cpu, which sends nothing to the host") == 1
    assert start(tmp_path, tiny, LORA + TRAIN + 'remat = "1 KiB"\n', name="none") == 2
    assert "take fewer rows at a time (micro_batch_size) or allow more" in capsys.readouterr().err
    for odd in ("Host", "8 GB"):
        assert start(tmp_path, tiny, LORA + TRAIN + f'remat = "{odd}"\n', name="odd") == 2
        printed = capsys.readouterr().err
        assert f"stages: train has remat = '{odd}', expected true, false, 'host', or memory such as '8 GiB'" in printed
