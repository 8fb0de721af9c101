"""One step of an optimizer is its update, however it is computed, and no device waits for the host."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minitune import hardware, tree
from minitune.algorithms.supervised import sft
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim import adamw, eight_bit, muon, rounding, transforms
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients, apply_gradients_each, scratch_bytes
from minitune.optim.schedules import Cosine, ScaleBySchedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, ScaleByGlob, chain
from minitune.steps import train_step
from minitune.types import Delta, TrainState
from support.allocation import AllocatedBytes
from support.models import SMALL, random_batch, random_params


def random_tree(seed: int, dtype: torch.dtype = torch.float32) -> tree.Tree:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 5), "norm.weight": (7,), "scalar": ()}
    plain = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return {**plain, "d": Delta(*(torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in "ab"))}


def chains(lr: float, clip: float, factor: float, weight_decay: float) -> dict[str, object]:
    adam, schedule = AdamW(lr=lr, weight_decay=weight_decay), ScaleBySchedule(Cosine(2, end=0.1), 9)
    parts = ClipByGlobalNorm(clip), adam, ScaleByGlob({"*.b": factor}), schedule
    return {"bare": adam, "chained": chain(*parts), "twice clipped": chain(ClipByGlobalNorm(2 * clip), *parts)}


def taken(optimizer: object, n: int, divisor: float, by_update: bool, donate: bool, dtype: torch.dtype) -> tree.Tree:
    """(params, state) after n steps, by `apply_gradients` or by its definition."""
    params = random_tree(0, dtype)
    state = optimizer.init(params)
    for i in range(n):
        grads = random_tree(i + 1, dtype)
        mean = tree.map(lambda g: g / divisor, grads)
        if by_update:
            updates, state = optimizer.update(mean, state, params)
            params = tree.add(params, updates)
        else:
            places = [x.data_ptr() for x in tree.leaves((params, state))]
            by = torch.tensor(divisor, dtype=dtype)
            params, state = apply_gradients(
                optimizer, grads, state, params, divisor=by, norm=tree.norm(mean), is_finite=torch.tensor(True), donate=donate
            )
            assert (places == [x.data_ptr() for x in tree.leaves((params, state))]) == donate
    return params, state


@settings(max_examples=10)
@given(
    lr=st.floats(1e-4, 0.1), clip=st.floats(0.1, 9), factor=st.floats(0, 9), decay=st.floats(0, 0.5), divisor=st.floats(0.5, 99),
    wide=st.booleans(), donate=st.booleans(),
)  # fmt: skip
def test_a_fused_step_is_the_update_that_is_added(
    lr: float, clip: float, factor: float, decay: float, divisor: float, wide: bool, donate: bool
) -> None:
    dtype = torch.float64 if wide else torch.float32
    for optimizer in chains(lr, clip, factor, decay).values():
        fused, wanted = (taken(optimizer, 5, divisor, by_update, donate, dtype) for by_update in (False, True))
        # torch's kernel takes the learning rate in float32
        torch.testing.assert_close(fused, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [4, 2**20])
def test_bfloat16_weights_take_the_step_of_their_float32_copies_and_are_rounded_once(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of a leaf the kernel is given at a time."""
    monkeypatch.setattr(adamw, "FUSED_ELEMENTS", {"cpu": limit})
    optimizer = chains(0.01, 0.5, 3.0, 0.1)["chained"]
    params = random_tree(0, torch.bfloat16)
    copies, state, one = tree.map(torch.Tensor.float, params), optimizer.init(params), torch.tensor(1.0)
    theirs = optimizer.init(copies)
    assert {x.dtype for x in tree.leaves(state[1].mu)} == {torch.float32}
    for i in range(3):
        grads = random_tree(i + 1, torch.bfloat16)
        same = {"divisor": torch.tensor(7.0), "norm": tree.norm(grads) / 7, "is_finite": one > 0, "donate": True}
        copies, theirs = apply_gradients(optimizer, tree.map(torch.Tensor.float, grads), theirs, copies, **same)
        copies = tree.map(lambda x: x.bfloat16().float(), copies)
        params, state = apply_gradients(optimizer, grads, state, params, **same)
        torch.testing.assert_close(tree.map(torch.Tensor.float, params), copies, rtol=0, atol=0)
        torch.testing.assert_close(state, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bare", "chained", "twice clipped"])
def test_donated_and_pure_steps_are_the_same_to_the_last_bit(name: str) -> None:
    optimizer = chains(0.01, 0.5, 3.0, 0.1)[name]
    donated, wanted = (taken(optimizer, 4, 3.0, False, donate, torch.float32) for donate in (True, False))
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), donated, wanted)


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.1), SGD(lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: object, donate: bool) -> None:
    params, broken = random_tree(0), tree.map(lambda x: x * torch.nan, random_tree(1))
    state = optimizer.init(params)
    given_ = tree.map(torch.clone, (params, state))
    one = torch.tensor(1.0)
    new = apply_gradients(optimizer, broken, state, params, divisor=one, norm=one, is_finite=torch.tensor(False), donate=donate)
    torch.testing.assert_close(new, given_, rtol=0, atol=0)


def test_gradients_that_share_memory_are_each_their_own() -> None:
    grad, optimizer = torch.full((3, 4), 2.0), chain(ClipByGlobalNorm(0.1), AdamW(lr=0.1))
    params = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4), "c": torch.zeros(4, 3)}
    grads = {"a": grad, "b": grad, "c": torch.tensor(2.0).expand(4, 3)}
    one = torch.tensor(1.0)
    new, state = apply_gradients(
        optimizer, grads, optimizer.init(params), params, divisor=one, norm=tree.norm(grads), is_finite=one > 0, donate=True
    )
    torch.testing.assert_close(torch.cat([x.flatten() for x in new.values()]), torch.full((36,), -0.1))
    torch.testing.assert_close(state[1].mu["b"], torch.full((3, 4), 0.1 * 2 * 0.1 / 12), rtol=1e-4, atol=0)
    assert torch.equal(grad, torch.full((3, 4), 2.0))


OPTIONS = {
    "adamw": (AdamW(lr=1e-2), torch.float32),
    "8-bit moments": (eight_bit.AdamW8bit(lr=1e-2), torch.float32),
    "bfloat16 parameters": (chain(AdamW(lr=1e-2), rounding.RoundStochastically(0)), torch.bfloat16),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("donate", [False, True])
def test_every_option_trains_a_model_and_donation_changes_nothing_but_where_it_lies(name: str, donate: bool) -> None:
    optimizer, dtype = OPTIONS[name]
    model, params, batch = Model(llama.FAMILY, SMALL), random_params(SMALL), random_batch(SMALL, 2, 13)
    trainable = {path: w.to(dtype, copy=True) for path, w in params.items()}
    state, losses = optimizer.init(trainable), []
    step = train_step(sft(model, None), optimizer, micro_batch=1, donate=donate)
    pure = train_step(sft(model, None), optimizer, micro_batch=1)
    for _ in range(6):
        wanted, _ = pure.update(params, TrainState(trainable, state), batch)
        (trainable, state), metrics = step.update(params, TrainState(trainable, state), batch)
        tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), (trainable, state), tuple(wanted))
        losses.append(float(metrics["loss_nats"]))
    assert losses[-1] < 0.9 * losses[0]


# an accelerator, simulated: its queue would wait at any of these
READS = ("aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


class RefusesToWait(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name().split(".")[0] not in READS, f"{function.name()} reads a value on the host"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "is_asynchronous", lambda device: True)


def every_way() -> dict[str, tuple[Any, torch.dtype]]:
    clip, schedule = ClipByGlobalNorm(0.5), ScaleBySchedule(Cosine(2, end=0.1), 9)
    chained = {kind.__name__: chain(clip, kind(lr=0.01), schedule) for kind in (AdamW, eight_bit.AdamW8bit, muon.Muon)}
    momentum = chain(clip, SGD(lr=0.01, momentum=0.9), ScaleByGlob({"*.b": 3.0}))
    rounds = {f"{name}, rounded": chain(*way.parts, rounding.RoundStochastically(3)) for name, way in chained.items()}
    ways = {name: (way, torch.float32) for name, way in {**chained, "SGD": momentum, "own": Halves()}.items()}
    return {**ways, **{name: (way, torch.bfloat16) for name, way in rounds.items()}}


class Halves:
    """An optimizer that declares nothing about itself."""

    def init(self, params: tree.Tree) -> tree.Tree:
        return tree.map(torch.zeros_like, params)

    def update(self, grads: tree.Tree, state: tree.Tree, params: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
        return tree.map(lambda g, s: -0.5 * g - 0.1 * s, grads, state), tree.map(torch.add, state, grads)


def big_tree(seed: int, dtype: torch.dtype) -> tree.Tree:
    generator = torch.Generator().manual_seed(seed)
    return {**random_tree(seed, dtype), "big": torch.randn(65, 67, generator=generator).to(dtype)}


@pytest.mark.parametrize("name", every_way())
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.usefixtures("asynchronous")
def test_no_step_on_an_accelerator_reads_a_value_on_the_host(name: str, finite: bool, donate: bool) -> None:
    """And one that is not finite changes nothing."""
    optimizer, dtype = every_way()[name]
    params, one = big_tree(0, dtype), torch.tensor(1.0)
    state = optimizer.init(params)
    before = tree.map(torch.clone, (params, state))
    grads = big_tree(1, dtype) if finite else tree.map(lambda x: x * torch.nan, big_tree(1, dtype))
    how = {"divisor": one, "norm": tree.norm(grads), "is_finite": torch.isfinite(tree.norm(grads)), "donate": donate}
    with RefusesToWait():
        after = apply_gradients(optimizer, grads, state, params, **how)
    same = [torch.equal(x, y) for x, y in zip(tree.leaves(after), tree.leaves(before), strict=True)]
    assert not any(same[: len(tree.leaves(params))]) if finite else all(same)


def test_the_simulation_refuses_what_a_cpu_does() -> None:
    params, one = big_tree(0, torch.float32), torch.tensor(1.0)
    optimizer = AdamW(lr=0.1)
    state = optimizer.init(params)
    with RefusesToWait(), pytest.raises(AssertionError, match="reads a value on the host"):
        apply_gradients(optimizer, params, state, params, divisor=one, norm=one, is_finite=one > 0, donate=False)


@pytest.mark.parametrize("name", [name for name in every_way() if "rounded" not in name])
def test_a_step_on_an_accelerator_is_the_step_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, dtype = every_way()[name]
    one, ends = torch.tensor(2.0), []
    for selects in (False, True):
        monkeypatch.setattr(hardware, "is_asynchronous", lambda device, selects=selects: selects)
        params = big_tree(0, dtype)
        state = optimizer.init(params)
        for i in range(3):
            grads = big_tree(i + 1, dtype)
            how = {"divisor": one, "norm": tree.norm(grads) / 2, "is_finite": one > 0, "donate": True}
            params, state = apply_gradients(optimizer, grads, state, params, **how)
        ends.append((params, state))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("name", every_way())
@pytest.mark.parametrize("selects", [False, True])
def test_members_of_stacked_trees_take_the_steps_that_they_take_alone(
    name: str, selects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in the middle is not finite, and stays."""
    monkeypatch.setattr(hardware, "is_asynchronous", lambda device: selects)
    optimizer, dtype = every_way()[name]
    alone, grads = [big_tree(i, dtype) for i in range(3)], [big_tree(9 + i, dtype) for i in range(3)]
    stacked, stacked_grads = (tree.map(lambda *x: torch.stack(x), *trees) for trees in (alone, grads))
    states, own_states = ([optimizer.init(params) for params in alone] for _ in "ab")
    norms, is_finite = torch.stack([tree.norm(g) for g in grads]), torch.tensor([True, False, True])
    how = {"divisor": torch.ones(3), "norm": norms, "is_finite": is_finite}
    apply_gradients_each([optimizer] * 3, stacked_grads, states, stacked, **how)
    for i in range(3):
        one = {"divisor": torch.tensor(1.0), "norm": norms[i], "is_finite": is_finite[i], "donate": True}
        wanted = apply_gradients(optimizer, grads[i], own_states[i], alone[i], **one)
        torch.testing.assert_close((tree.map(lambda x, i=i: x[i], stacked), states[i]), wanted, rtol=0, atol=0)


def test_an_accelerator_without_float64_is_never_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusesFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            assert all(x.dtype != torch.float64 for x in tree.leaves(result if isinstance(result, torch.Tensor) else None))
            return result

    monkeypatch.setattr(hardware, "widest_float", lambda device: torch.float32)
    monkeypatch.setattr(hardware, "is_asynchronous", lambda device: True)
    for optimizer, dtype in every_way().values():
        params = big_tree(0, dtype)
        state, one = optimizer.init(params), torch.tensor(1.0)
        with RefusesFloat64():
            apply_gradients(optimizer, params, state, params, divisor=one, norm=one, is_finite=one > 0, donate=False)


def test_a_transform_that_declares_nothing_is_applied_by_its_definition_and_planned_for() -> None:
    params, grads, one = big_tree(0, torch.float32), big_tree(1, torch.float32), torch.tensor(1.0)
    how = {"divisor": one, "norm": one, "is_finite": one > 0}
    new, state = apply_gradients(Halves(), grads, Halves().init(params), params, donate=False, **how)
    torch.testing.assert_close(new, tree.map(lambda p, g: p - 0.5 * g, params, grads))
    torch.testing.assert_close(state, grads)
    assert scratch_bytes(Halves(), Halves().init(params), params) == 3 * tree.n_bytes(params)


def test_slices_of_any_size_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [way for name, (way, _) in every_way().items() if name in ("SGD", "AdamW8bit", "Muon")]
    for optimizer in ways:
        ends = []
        for limit in (256, 2**20):
            monkeypatch.setattr(transforms, "SLICE_ELEMENTS", {"cpu": limit})
            params, grads, one = big_tree(0, torch.float32), big_tree(1, torch.float32), torch.tensor(1.0)
            how = {"divisor": one, "norm": tree.norm(grads), "is_finite": one > 0, "donate": True}
            ends.append(apply_gradients(optimizer, grads, optimizer.init(params), params, **how))
        torch.testing.assert_close(*ends)


RULES = {
    "AdamW": AdamW(lr=0.01),
    "AdamW8bit": eight_bit.AdamW8bit(lr=0.01, weight_decay=0.1),
    "Muon": muon.Muon(lr=0.01, weight_decay=0.1),
    "SGD": SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("shapes", [[(70, 60)] * 3, [(40, 96), (128, 40)]], ids=["alike", "of two shapes"])
@pytest.mark.parametrize("name", RULES)
def test_a_donated_step_allocates_what_is_planned_for(
    name: str, shapes: list[tuple[int, int]], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "SLICE_ELEMENTS", {"cpu": 2048})
    monkeypatch.setattr(adamw, "FUSED_ELEMENTS", {"cpu": 8192})
    monkeypatch.setattr(eight_bit, "SMALLEST", 1024)
    optimizer = chain(RULES[name], rounding.RoundStochastically(0)) if rounds else RULES[name]
    generator, one = torch.Generator().manual_seed(0), torch.tensor(1.0)
    params = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    params = tree.map(lambda x: x.to(torch.bfloat16 if rounds else torch.float32), params)
    grads, state = tree.map(torch.clone, params), optimizer.init(params)
    with AllocatedBytes() as allocated:
        apply_gradients(optimizer, grads, state, params, divisor=one, norm=one, is_finite=one > 0, donate=True)
    planned = scratch_bytes(optimizer, optimizer.init(params), params)
    # beside them stand step counts and a table of 256 codes
    assert 0.4 * planned < allocated.peak < planned + 8192
