"""The snippets of docs/research.md stay short, and compute what they say."""

import json
from collections.abc import Callable, Iterable

import pytest
import torch

from minitune import tree
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.text.chat import open_text
from minitune.types import Deltas
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
    assert len(SNIPPETS) == 10
    for snippet in SNIPPETS[1:]:
        lines = [line for line in snippet.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
        assert len(lines) <= 15, snippet


def test_per_example_gradients_are_those_of_a_loop(names: dict) -> None:
    for i in range(6):
        row = tree.map(lambda x, i=i: x[i : i + 1], names["batch"])
        alone = value_and_grad(lambda d, row=row: names["objective"](d, names["params"], row)[0])(names["deltas"])[1]
        for a, b in zip(tree.leaves(alone), tree.leaves(names["gradients"]), strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert names["influence"].shape == (6,)
    assert int(names["influence"].argmax()) == 0  # nothing helps a row as the row itself does
    assert float(names["influence"][0]) == pytest.approx(float(tree.norm(names["test_row"])) ** 2, rel=1e-4)


def logits_of(names: dict, deltas: Deltas) -> torch.Tensor:
    """Logits [B, T - 1, V] that predict the tokens after the first, made at once."""
    return names["model"].forward(names["lora"].apply(names["params"], deltas), names["tokens"])[:, :-1]


def gradients_of(names: dict, loss: Callable[[Deltas], torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in tree.leaves(names["deltas"])]
    return list(torch.autograd.grad(loss(tree.rebuild(names["deltas"], leaves)), leaves))


def mean_loss(names: dict) -> Callable[[Deltas], torch.Tensor]:
    targets = names["tokens"][:, 1:].flatten()
    return lambda deltas: torch.nn.functional.cross_entropy(logits_of(names, deltas).flatten(0, 1), targets)


def assert_leaves_close(actual: tree.Tree, wanted: Iterable[torch.Tensor], atol: float) -> None:
    for x, y in zip(tree.leaves(actual), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_a_file_becomes_a_batch_of_its_answers(names: dict) -> None:
    rows = names["orders"]
    assert rows.tokens.shape == (2, 256)
    lines = (ROOT / "minitune/demo/orders-heldout.jsonl").read_text("utf-8").splitlines()
    answers = {json.loads(line)["output"] for line in lines}
    tokenizer, _ = open_text(ROOT / "minitune/demo/model")
    found = 0
    for tokens, segments, mask in zip(rows.tokens, rows.segment_ids, rows.target_mask(), strict=True):
        for segment in range(1, int(segments.max()) + 1):
            ids = tokens[(segments == segment) & mask].tolist()
            assert tokenizer.decode(ids[:-1], skip_special=False) in answers  # the last one ends the turn
            found += len(ids)
    assert found == int(names["n_targets"]) > 0


def test_the_token_loss_is_its_formula_over_whole_logits(names: dict) -> None:
    def focal(deltas: Deltas) -> torch.Tensor:
        p = logits_of(names, deltas).softmax(-1).gather(-1, names["tokens"][:, 1:, None])
        return (-((1 - p) ** 2) * p.log()).mean()

    torch.testing.assert_close(names["focal_metrics"]["loss_nats"], focal(names["deltas"]), rtol=1e-4, atol=0)
    leaves = [x.clone().requires_grad_() for x in tree.leaves(names["deltas"])]
    focal(tree.rebuild(names["deltas"], leaves)).backward()
    torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.0).step()
    # a gradient near zero may have either sign, and Adam's first step is that sign
    apart = [(x - y).abs() > 1e-5 for x, y in zip(tree.leaves(names["focal_state"].trainable), leaves, strict=True)]
    assert sum(int(x.sum()) for x in apart) < 1e-3 * sum(x.numel() for x in apart)


def test_the_objective_weighs_rows(names: dict) -> None:
    def weighted(deltas: Deltas) -> torch.Tensor:
        logps = logits_of(names, deltas).log_softmax(-1).gather(-1, names["tokens"][:, 1:, None]).squeeze(-1)
        return -(logps.sum(1) * names["weights"]).sum() / (23 * names["weights"].sum())

    torch.testing.assert_close(names["report"]["loss_nats"], weighted(names["deltas"]), rtol=1e-4, atol=0)
    assert float(names["report"]["weighted_tokens"]) == 23 * 4.75
    grads = gradients_of(names, weighted)
    wanted = [x - 0.1 * g for x, g in zip(tree.leaves(names["deltas"]), grads, strict=True)]
    assert_leaves_close(names["moved"].trainable, wanted, 1e-5)


def test_the_optimizer_is_lion(names: dict) -> None:
    grads = gradients_of(names, mean_loss(names))
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    clipped = [g * min(1.0, 1 / norm) for g in grads]
    trained, (_, momentum) = names["lion_state"]
    assert_leaves_close(momentum, [0.01 * g for g in clipped], 1e-6)
    moves = [x - y for x, y in zip(tree.leaves(trained), tree.leaves(names["deltas"]), strict=True)]
    for move, g in zip(moves, clipped, strict=True):
        sure = g.abs() > 1e-6
        torch.testing.assert_close(move[sure], -1e-3 * g[sure].sign(), rtol=0, atol=1e-6)


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
    params, objective = ({n: w.double() for n, w in names["params"].items()}, names["objective"])
    deltas, direction = (tree.map(torch.Tensor.double, names[key]) for key in ("deltas", "direction"))
    eps = 1e-5

    def gradient(sign: int) -> list[torch.Tensor]:
        moved = tree.map(lambda x, v: x + sign * eps * v, deltas, direction)
        return tree.leaves(value_and_grad(lambda d: objective(d, params, names["batch"])[0])(moved)[1])

    slopes = [(up - down) / (2 * eps) for up, down in zip(gradient(1), gradient(-1), strict=True)]
    scale = max(float(s.abs().max()) for s in slopes)
    for product, slope in zip(tree.leaves(names["hessian_vector"]), slopes, strict=True):
        torch.testing.assert_close(product.double(), slope, rtol=0, atol=2e-3 * scale)
