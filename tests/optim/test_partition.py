"""A partition gives each leaf to one rule, and each rule takes the steps that it takes alone."""

import pytest
import torch

from minitune import tree
from minitune.errors import InputError
from minitune.optim import eight_bit
from minitune.optim.adamw import AdamW
from minitune.optim.apply import apply_gradients
from minitune.optim.partition import partition
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, ScaleByGlob, chain
from minitune.types import Delta

RULES = {"*norm*": AdamW(lr=0.1), "*.b": eight_bit.AdamW8bit(lr=0.02), "*": SGD(lr=0.5, momentum=0.9)}


def random_tree(seed: int) -> tree.Tree:
    generator = torch.Generator().manual_seed(seed)
    norm, w, a, b = (torch.randn(shape, generator=generator) for shape in ((7,), (3, 5), (2, 3), (65, 64)))
    return {"norm.weight": norm, "w": w, "delta": Delta(a, b)}


@pytest.mark.parametrize("donate", [False, True])
def test_each_leaf_takes_the_step_of_its_rule(donate: bool) -> None:
    rules, params, one = partition(RULES), random_tree(0), torch.tensor(1.0)
    optimizer = chain(ClipByGlobalNorm(0.5), rules, ScaleByGlob({"w": 3.0}))
    state, by_update, other = optimizer.init(params), random_tree(0), optimizer.init(params)
    for i in range(3):
        grads = random_tree(i + 1)
        how = {"divisor": one, "norm": tree.norm(grads), "is_finite": one > 0, "donate": donate}
        params, state = apply_gradients(optimizer, grads, state, params, **how)
        updates, other = optimizer.update(grads, other, by_update)
        by_update = tree.add(by_update, updates)
        torch.testing.assert_close((params, state), (by_update, other), rtol=1e-5, atol=1e-6)
    sgd = chain(SGD(lr=0.5, momentum=0.9), ScaleByGlob({"w": 3.0}))
    alone, own, clip = {"w": random_tree(0)["w"]}, sgd.init({"w": params["w"]}), ClipByGlobalNorm(0.5)
    for i in range(3):
        clipped = clip.update(random_tree(i + 1), (), None)[0]
        updates, own = sgd.update({"w": clipped["w"]}, own, alone)
        alone = tree.add(alone, updates)
    torch.testing.assert_close(params["w"], alone["w"])


def test_a_leaf_that_no_glob_matches_is_named() -> None:
    with pytest.raises(InputError, match=r"optim: no glob of the partition matches 'w' \(only \*norm\*\); end it with '\*'"):
        partition({"*norm*": SGD(lr=0.1)}).init(random_tree(0))
