"""The snippets of docs/research.md stay short, and compute what they say."""

import pytest
import torch

from minitune import tree
from minitune.autodiff.value_and_grad import value_and_grad
from support.pages import blocks_of, executed
from support.paths import ROOT

PAGE = ROOT / "docs/research.md"
SNIPPETS = [block.text for block in blocks_of(PAGE, "python")]


@pytest.fixture(scope="module")
def names() -> dict:
    """Names that the page's snippets define, run in order."""
    torch.manual_seed(0)
    return executed(PAGE)


def test_every_example_is_short() -> None:
    assert len(SNIPPETS) == 6
    for snippet in SNIPPETS[1:]:
        lines = [line for line in snippet.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
        assert len(lines) <= 15, snippet


def test_per_example_gradients_are_those_of_a_loop(names: dict) -> None:
    for i in range(6):
        row = tree.map(lambda x, i=i: x[i : i + 1], names["batch"])
        alone = value_and_grad(lambda d, row=row: names["sft"](d, names["params"], row)[0])(names["deltas"])[1]
        for a, b in zip(tree.leaves(alone), tree.leaves(names["per_example"]), strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert names["influence"].shape == (6,)
    assert int(names["influence"].argmax()) == 0  # nothing helps a row as the row itself does
    assert float(names["influence"][0]) == pytest.approx(float(tree.norm(names["test_row"])) ** 2, rel=1e-4)


def test_the_new_loss_learns(names: dict) -> None:
    assert names["losses"][0] == pytest.approx(1.0, abs=1e-3)
    assert names["losses"][-1] < 0.2
    assert float(names["metrics"]["reward_accuracy"]) == 1.0


def test_task_arithmetic_adds_the_products(names: dict) -> None:
    lora, params = names["lora"], names["params"]
    deltas, trained = names["deltas"], names["trained"]
    changes = {n: deltas[n].b @ deltas[n].a + 0.5 * trained[n].b @ trained[n].a for n in deltas}
    merged = {n: params[n] + lora.alpha / lora.rank * change for n, change in changes.items()}
    wanted = names["model"].forward({**params, **merged}, names["tokens"])
    torch.testing.assert_close(names["logits"], wanted, rtol=0, atol=1e-4)
    base = names["model"].forward(params, names["tokens"])
    torch.testing.assert_close(names["forgotten"], base, rtol=0, atol=1e-3)
    assert float((wanted - base).abs().max()) > 0.1


def test_a_block_of_ones_own_is_the_one_that_everything_runs(names: dict) -> None:
    model, params, vector = names["steered_model"], names["steered_params"], names["vector"]
    plain, logits, tokens = names["model"].forward(params, names["tokens"]), names["steered_logits"], names["tokens"]
    assert float((logits - plain).abs().max()) > 0.1

    # the training forward has the same logits, and its gradient is theirs
    def loss(vector: torch.Tensor) -> torch.Tensor:
        logits = model.forward({**params, "model.layers.3.steer": vector}, tokens)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    leaf = vector["model.layers.3.steer"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    actual = names["gradient_of_vector"]["model.layers.3.steer"]
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))

    # decoding with a cache chooses what the whole forward chooses
    rows = tokens
    for step in range(4):
        rows = torch.cat([rows, model.forward(params, rows)[:, -1:].argmax(-1)], dim=1)
        assert rows[:, tokens.shape[1] + step].tolist() == [row[step] for row in names["answer"]]


def test_the_hessian_vector_product_is_the_slope_of_the_gradient(names: dict) -> None:
    params, sft = ({n: w.double() for n, w in names["params"].items()}, names["sft"])
    deltas, direction = (tree.map(torch.Tensor.double, names[key]) for key in ("deltas", "direction"))
    eps = 1e-5

    def gradient(sign: int) -> list[torch.Tensor]:
        moved = tree.map(lambda x, v: x + sign * eps * v, deltas, direction)
        return tree.leaves(value_and_grad(lambda d: sft(d, params, names["batch"])[0])(moved)[1])

    slopes = [(up - down) / (2 * eps) for up, down in zip(gradient(1), gradient(-1), strict=True)]
    scale = max(float(s.abs().max()) for s in slopes)
    for product, slope in zip(tree.leaves(names["hessian_vector"]), slopes, strict=True):
        torch.testing.assert_close(product.double(), slope, rtol=0, atol=2e-3 * scale)
