"""Muon takes the steps of torch.optim.Muon on matrices and of AdamW on the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune import checkpoint, hardware, tree
from minitune.algorithms.supervised import sft
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim import muon
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients
from minitune.optim.schedules import Cosine, ScaleBySchedule
from minitune.optim.transforms import ClipByGlobalNorm, chain
from minitune.steps import train_step
from minitune.types import TrainState
from support.models import SMALL, random_batch, random_params

SHAPES = {"tall": (13, 7), "wide": (7, 13), "same": (7, 13), "square": (5, 5), "row": (1, 9), "column": (9, 1)}


def random_tree(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def steps(rule: Any, params: tree.Tree, n: int, donate: bool = True) -> tree.Tree:
    state, one = rule.init(params), torch.tensor(1.0)
    for i in range(n):
        grads = random_tree(i + 1, {name: tuple(p.shape) for name, p in params.items()})
        how = {"divisor": one, "norm": tree.norm(grads), "is_finite": one > 0, "donate": donate}
        params, state = apply_gradients(rule, grads, state, params, **how)
    return params


def torch_steps(optimizer_of: Any, params: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = optimizer_of(leaves.values())
    for i in range(n):
        grads = random_tree(i + 1, {name: tuple(p.shape) for name, p in params.items()})
        for name, leaf in leaves.items():
            leaf.grad = grads[name]
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_20_steps_are_those_of_torch_in_float32(adjust: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products are of bfloat16 everywhere; for once it is given float32."""
    how: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: False)
    ours = steps(muon.Muon(**how), random_tree(0), 20)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs = torch_steps(lambda leaves: torch.optim.Muon(leaves, **how), random_tree(0), 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_20_steps_are_those_of_torch_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: True)
    params = random_tree(0)
    ours = steps(muon.Muon(lr=0.02, adjust_lr_fn="original"), params, 20, donate=False)
    theirs = torch_steps(lambda leaves: torch.optim.Muon(leaves, lr=0.02, weight_decay=0.0), params, 20)
    moved, apart = (tree.norm(tree.map(torch.sub, theirs, other)) for other in (params, ours))
    assert float(apart) < 0.02 * float(moved)


def test_what_is_no_matrix_and_embeddings_and_head_take_adamw() -> None:
    others = {
        "norm.weight": (7,),
        "scalar": (),
        "experts": (2, 3, 5),
        "model.embed_tokens.weight": (11, 3),
        "lm_head.weight": (4, 3),
    }
    params = random_tree(0, {"w": (5, 3), **others})
    rest = {name: params[name] for name in others}
    ours = steps(muon.Muon(lr=0.01, weight_decay=0.1, adamw_lr_factor=0.5), params, 1, donate=False)
    generated = random_tree(1, {name: tuple(p.shape) for name, p in params.items()})
    adamw, one = AdamW(lr=0.005, weight_decay=0.1), torch.tensor(1.0)
    how = {"divisor": one, "norm": one, "is_finite": one > 0, "donate": False}
    rest_grads = {name: generated[name] for name in others}
    wanted, _ = apply_gradients(adamw, rest_grads, adamw.init(rest), rest, **how)
    assert {name for name in others if torch.equal(ours[name], wanted[name])} == set(others)


def test_globs_say_what_takes_adamw() -> None:
    params = random_tree(0, {"a.w": (5, 3), "b.w": (5, 3), "model.embed_tokens.weight": (11, 3)})
    rule = muon.Muon(lr=0.01, adamw=("b.*",))
    state = rule.init(params)
    assert list(state[0]) == ["a.w", "model.embed_tokens.weight"]
    assert list(state[1].mu) == ["b.w"]
    with pytest.raises(InputError, match=r"optim: muon.adamw: 'c\.\*' matches no weight; the nearest are"):
        muon.Muon(lr=0.01, adamw=("c.*",)).init(params)
    with pytest.raises(InputError, match=r"optim: muon finds no matrix .*\(norm, ...\), expected a 2-D weight .*'adamw'"):
        muon.Muon(lr=0.01).init({"norm": torch.ones(3)})


@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_singular_values_become_about_1_and_singular_vectors_stay(n: int, m: int, seed: int) -> None:
    x = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    (direction,) = muon.orthogonalized([x], 5)
    values = u.T @ direction @ v.T
    large = s > 0.05 * s.norm()  # smaller ones are on their way
    torch.testing.assert_close(values, torch.diag(values.diagonal()), rtol=0, atol=1e-9)
    assert ((values.diagonal()[large] > 0.6) & (values.diagonal()[large] < 1.3)).all()
    assert not muon.orthogonalized([torch.zeros(n, m)], 5)[0].any()


@given(seed=st.integers(0, 2**32))
def test_matrices_of_one_shape_are_each_their_own(seed: int) -> None:
    xs = [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
    together, alone = muon.orthogonalized(xs, 5), [muon.orthogonalized([x], 5)[0] for x in xs]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_matched_steps_are_as_long_as_those_of_adamw() -> None:
    params = random_tree(0, {"w": (64, 96)})
    moved = tree.map(torch.sub, steps(muon.Muon(lr=1.0), tree.map(torch.clone, params), 1), params)
    assert float(moved["w"].square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)  # what AdamW's have in training


def test_momentum_is_all_that_a_matrix_keeps() -> None:
    params = random_tree(0, {"w": (64, 96), "norm": (64,)})
    assert tree.n_bytes(muon.Muon(lr=1.0).init(params)) == 4 * 64 * 96 + 2 * 4 * 64 + 8


@pytest.mark.parametrize("lora", [None, Lora(3, 6.0, ("*_proj.weight",))], ids=["full", "lora"])
def test_a_model_trains_and_a_resumed_run_is_a_straight_one(lora: Lora | None, tmp_path: Path) -> None:
    model, params, batch = Model(llama.FAMILY, SMALL), random_params(SMALL), random_batch(SMALL, 2, 13)
    trainable = tree.map(torch.clone, params) if lora is None else lora.init(params, 0)
    optimizer = chain(ClipByGlobalNorm(1.0), muon.Muon(lr=5e-2), ScaleBySchedule(Cosine(), 20))
    step = train_step(sft(model, lora), optimizer, micro_batch=1)
    state, losses, ends = optimizer.init(trainable), [], []
    for i in range(8):
        if i == 4:
            checkpoint.save_state(tmp_path, 4, {"trainable": trainable, "opt_state": state}, {})
        (trainable, state), metrics = step.update(params, TrainState(trainable, state), batch)
        losses.append(float(metrics["loss_nats"]))
    assert losses[-1] < 0.9 * losses[0]
    ends.append(trainable)
    fresh = tree.map(torch.zeros_like, {"trainable": trainable, "opt_state": state})
    saved = checkpoint.load_state(tmp_path / "step-00000004", fresh)[0]
    trainable, state = saved["trainable"], saved["opt_state"]
    for _ in range(4):
        (trainable, state), _ = step.update(params, TrainState(trainable, state), batch)
    torch.testing.assert_close(trainable, ends[0], rtol=0, atol=0)
