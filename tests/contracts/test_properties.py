"""What must hold for every input: sums, chunks, packing, recomputation, purity."""

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import seeds, tree
from minitune.algorithms.objective import apply_trainable, split_trainable
from minitune.algorithms.supervised import sft
from minitune.autodiff.remat import remat
from minitune.autodiff.value_and_grad import accumulate, value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.token import CrossEntropy, cross_entropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.nn import head as nn_head
from minitune.nn.attention.attention import attention
from minitune.nn.attention.key_range import KeyRange, causal, document_keys, document_positions
from minitune.nn.head import token_losses
from minitune.optim.adamw import AdamState, AdamW
from minitune.optim.schedules import Constant, Cosine, ScaleBySchedule
from minitune.optim.sgd import SGD
from minitune.optim.transforms import ClipByGlobalNorm, ScaleByGlob, chain
from minitune.steps import eval_step, sft_step, train_step
from minitune.types import Adapted, Batch, Delta, Mean, TrainState
from support.closeness import assert_trees_close
from support.models import SMALL, configs, randn, random_batch, random_deltas, random_params

pytestmark = pytest.mark.fast

SEEDS = st.integers(0, 2**32)
TARGETS = ("*.self_attn.*_proj.weight", "*.mlp.*_proj.weight")


# trees


def nested(x: torch.Tensor) -> tree.Tree:
    return {
        "w": Delta(x, x + 1),
        "list": [x + 2, None, ({"deep": x + 3},)],
        "state": AdamState(torch.tensor(3), {"w": x}, None),
    }


def test_tree_paths_name_leaves_and_rebuild_inverts_leaves() -> None:
    t = nested(torch.zeros(1))
    assert [path for path, _ in tree.items(t)] == ["w.a", "w.b", "list.0", "list.2.0.deep", "state.step", "state.mu.w"]
    back = tree.rebuild(t, tree.leaves(t))
    assert type(back["w"]) is Delta
    assert type(back["state"]) is AdamState
    assert all(x is y for x, y in zip(tree.leaves(back), tree.leaves(t), strict=True))


def test_tree_errors_name_the_path() -> None:
    x = torch.zeros(1)
    with pytest.raises(TypeError, match=r"tree: w\.b is a tensor in one tree and dict in another"):
        tree.map(torch.add, {"w": Delta(x, x)}, {"w": Delta(x, {})})
    with pytest.raises(TypeError, match=r"tree: w is dict of 1 \(b\) in one tree, expected dict of 1 \(a\)"):
        tree.map(torch.add, {"w": {"a": x}}, {"w": {"b": x}})
    with pytest.raises(TypeError, match=r"tree: w\.1 is a int, expected a tensor, dict, tuple or None"):
        tree.leaves({"w": (x, 3)})
    with pytest.raises(TypeError, match="fewer leaves than the 2"):
        tree.rebuild([x, x], [x])
    with pytest.raises(TypeError, match="more leaves than the 1"):
        tree.rebuild([x], [x, x])
    with pytest.raises(TypeError, match="norm of a tree without leaves"):
        tree.norm({})


def test_a_glob_that_matches_nothing_names_the_nearest_weights() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert tree.select(names, ["*.mlp.*", "lm_head*"], "lora") == names[1:]
    with pytest.raises(
        InputError, match=r"lora: '\*\.self_atn\.q_proj\.weight' matches no weight; the nearest are .*self_attn\.q_proj"
    ):
        tree.select(names, ["*.mlp.*", "*.self_atn.q_proj.weight"], "lora")
    with pytest.raises(InputError, match="lora: the list of globs is empty, expected at least one"):
        tree.select(names, [], "lora")


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("q_proj", r"the nearest are a.[01].q_proj.weight, a.[01].q_proj.weight; write '\*.q_proj.weight'"),
        ("q_prj.weight", r"the nearest are a.[01].q_proj.weight, .*; write '\*.q_proj.weight'"),
        ("*.q_prj.*", r"the nearest are a.[01].q_proj.weight, a.[01].q_proj.weight$"),
        ("all-linear", r"; write '\*_proj.weight'$"),
        ("nothing", r"the nearest are "),
    ],
)
def test_a_glob_without_a_match_is_answered_by_its_last_segment(glob: str, message: str):
    names = ["embed_tokens.weight", "a.0.q_proj.weight", "a.0.k_norm.weight", "a.1.q_proj.weight", "a.1.k_norm.weight"]
    with pytest.raises(InputError, match=message):
        tree.select(names, [glob], "lora")


@given(values=st.lists(st.floats(-50, 50), min_size=1, max_size=6))
def test_tree_norm_is_the_norm_of_all_elements(values: list[float]) -> None:
    x = torch.tensor(values)
    wanted = torch.cat([x, x[:1] * 2]).norm()
    torch.testing.assert_close(tree.norm({"a": x, "b": (x[:1] * 2,)}), wanted)


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    draws = {seeds.derive(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a1"), (0,)]}
    assert len(draws) == 6
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=seeds.generator(7, "w", 2))
    assert torch.equal(first, torch.rand(3, generator=seeds.generator(7, "w", 2)))
    assert torch.equal(before, torch.random.get_rng_state())


# gradients


def test_value_and_grad_is_pure_gives_zeros_for_unused_leaves_and_passes_aux() -> None:
    params = {"used": randn(3), "unused": randn(2)}
    copies = tree.map(torch.clone, params)

    def objective(p: tree.Tree) -> tuple[Mean, dict[str, torch.Tensor]]:
        return Mean(p["used"].square().sum(), torch.tensor(4.0)), {"first": p["used"][0] * 1}

    (mean, aux), grads = value_and_grad(objective, has_aux=True)(params)
    torch.testing.assert_close(grads, {"used": 2 * params["used"], "unused": torch.zeros(2, dtype=torch.float64)})
    assert not any(x.requires_grad for x in tree.leaves((mean, aux, grads)))
    assert all(x.grad is None and not x.requires_grad for x in params.values())
    torch.testing.assert_close(params, copies, rtol=0, atol=0)
    zeros = value_and_grad(lambda p: Mean(torch.tensor(1.0), torch.tensor(1.0)))(params)[1]
    assert all(not x.any() for x in tree.leaves(zeros))


def test_value_and_grad_names_a_leaf_that_is_no_float() -> None:
    with pytest.raises(TypeError, match=r"grad: x\.0 is torch\.int64, expected a floating-point tensor"):
        value_and_grad(lambda p: Mean(p, p))({"x": (torch.tensor(1),)})


@settings(max_examples=5)
@given(config=configs(), seed=SEEDS)
def test_vmap_of_value_and_grad_equals_a_loop(config: llama.Config, seed: int) -> None:
    params, batch = random_params(config, seed, torch.float64), random_batch(config, 3, 9, seed)
    for wrap in (lambda f: f, remat):
        model = Model(llama.FAMILY, config, wrap)

        def one(p: tree.Tree, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, m: Model = model) -> tree.Tree:
            row = Batch(tokens[None], ids[None], mask[None])
            return value_and_grad(lambda q: Mean.of(m.token_losses(q, row, CrossEntropy()), row.target_mask()))(p)

        batched = torch.func.vmap(one, in_dims=(None, 0, 0, 0))(params, *batch)
        for i in range(3):
            wanted = one(params, *(x[i] for x in batch))
            assert_trees_close(tree.map(lambda x, i=i: x[i], batched), wanted, 1e-11)


def test_a_hessian_vector_product_of_a_recomputed_function_is_right() -> None:
    x, v = randn(5, seed=1), randn(5, seed=2)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.roll(1)).square()

    def through(g: object) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(g(leaf).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first @ v, leaf)[0]

    torch.testing.assert_close(through(remat(f)), through(f))
    nested_func = torch.func.grad(lambda x: torch.func.grad(lambda y: remat(f)(y).sum())(x) @ v)(x)
    torch.testing.assert_close(nested_func, through(f))


def test_remat_takes_trees_gives_none_to_what_needs_no_gradient_and_keeps_nothing_inside() -> None:
    kept: list[int] = []
    x, w = randn(4, 3).requires_grad_(), {"frozen": randn(3, 3), "trained": randn(3, 3, seed=1).requires_grad_()}

    def f(w: tree.Tree, x: torch.Tensor, nothing: None) -> torch.Tensor:
        return (x @ w["frozen"]).tanh() @ w["trained"]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = remat(f)(w, x, None)
    assert set(kept) == {t.data_ptr() for t in (x, *w.values())}
    grads = torch.autograd.grad(y.sum(), [x, w["trained"]])
    wanted = torch.autograd.grad(f(w, x, None).sum(), [x, w["trained"]])
    torch.testing.assert_close(grads, wanted)


@given(n=st.integers(1, 13), micro=st.integers(1, 13), seed=SEEDS, p=st.floats(0.0, 1.0))
def test_k_micro_batches_equal_one_for_any_mask(n: int, micro: int, seed: int, p: float) -> None:
    x, mask = randn(n, 5, seed=seed), torch.rand(n, 5, generator=torch.Generator().manual_seed(seed)) < p
    params = {"w": randn(5, seed=seed + 1)}

    def evaluate(rows: tuple[torch.Tensor, torch.Tensor]) -> tree.Tree:
        return value_and_grad(lambda q: Mean.of((rows[0] * q["w"]).sin(), rows[1]))(params)

    whole = evaluate((x, mask))
    accumulated = accumulate(evaluate, zip(x.split(micro), mask.split(micro), strict=True))
    torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 9])
def test_accumulate_holds_two_gradients_at_most_whatever_the_number_of_micro_batches(k: int) -> None:
    made: list[weakref.ref] = []
    alive: list[int] = []

    def evaluate(i: int) -> tree.Tree:
        fresh = {"w": torch.full((5,), float(i)), "v": torch.ones(3)}
        made.extend(weakref.ref(x) for x in fresh.values())
        alive.append(sum(ref() is not None for ref in made))
        return fresh

    total = accumulate(evaluate, range(k))
    torch.testing.assert_close(total, {"w": torch.full((5,), k * (k - 1) / 2), "v": torch.full((3,), float(k))})
    assert max(alive) <= 4  # leaves that evaluate made: the first tree, until it is summed, and the newest


def test_accumulate_refuses_an_empty_list() -> None:
    with pytest.raises(TypeError, match="no micro-batch to accumulate"):
        accumulate(lambda i: i, [])


# operations


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One head, one query at a time, in plain sums."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, n, t in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:3])).tolist():
        visible = [s for s in range(k.shape[2]) if mask[b, 0, t, s]]
        scores = torch.stack([q[b, n, t] @ k[b, n // group, s] / q.shape[-1] ** 0.5 for s in visible])
        out[b, n, t] = (scores.softmax(0)[:, None] * v[b, n // group, visible]).sum(0)
    return out


@settings(max_examples=10)
@given(b=st.integers(1, 2), k=st.integers(1, 3), g=st.integers(1, 3), t=st.integers(1, 7), e=st.integers(1, 5), seed=SEEDS)
def test_attention_equals_plain_sums_with_its_gradients(b: int, k: int, g: int, t: int, e: int, seed: int) -> None:
    qkv = [randn(b, h, t, e, seed=seed + i).requires_grad_() for i, h in enumerate((k * g, k, k))]
    ids = 1 + (torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) < 0.3).cumsum(1)
    for keys in (causal(t, ids.device), document_keys(ids)):
        wanted = naive_attention(*qkv, keys.mask(t).expand(b, -1, -1, -1))
        actual = attention(*qkv, keys)
        torch.testing.assert_close(actual, wanted)
        weight = randn(*actual.shape, seed=seed + 9)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), qkv) for y in (actual, wanted)))
        if isinstance(keys.first, torch.Tensor):
            last = keys.last.expand(b, -1)
            batched = torch.func.vmap(lambda *x: attention(*(y[None] for y in x[:3]), KeyRange(*(y[None] for y in x[3:])))[0])
            torch.testing.assert_close(batched(*qkv, keys.first, last), wanted)


def test_documents_and_positions_by_hand() -> None:
    ids = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert document_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert document_keys(ids).mask(6)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@given(n=st.integers(1, 9), v=st.integers(2, 19), seed=SEEDS, scale=st.sampled_from([1.0, 1e3]))
def test_cross_entropy_equals_its_formula_and_is_finite_in_bfloat16(n: int, v: int, seed: int, scale: float) -> None:
    logits, targets = scale * randn(n, v, seed=seed), torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    wanted = torch.logsumexp(logits, -1) - logits[torch.arange(n), targets]
    torch.testing.assert_close(cross_entropy(logits, targets), wanted)
    half = cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cross_entropy(logits.bfloat16().double(), targets).float(), rtol=1e-5, atol=1e-4)


@given(
    b=st.integers(1, 3), t=st.integers(1, 11), v=st.integers(2, 17), chunk=st.integers(1, 40), seed=SEEDS, p=st.floats(0.0, 1.0)
)
def test_the_chunked_head_equals_the_whole_one(b: int, t: int, v: int, chunk: int, seed: int, p: float) -> None:
    hidden, head = randn(b, t, 5, seed=seed).requires_grad_(), randn(v, 5, seed=seed + 1).requires_grad_()
    delta = Delta(randn(2, 5, seed=seed + 2).requires_grad_(), randn(v, 2, seed=seed + 3).requires_grad_())
    generator = torch.Generator().manual_seed(seed)
    targets, mask = torch.randint(0, v, (b, t), generator=generator), torch.rand(b, t, generator=generator) < p
    logits = hidden @ (head + delta.b @ delta.a).T
    wanted = torch.where(mask, cross_entropy(logits, targets), 0.0)
    weight = randn(b, t, seed=seed + 4)
    leaf = Adapted(head, *delta)
    leaves = [hidden, *tree.leaves(leaf)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn_head, "HEAD_CHUNK", chunk * v)
        patch.setattr(nn_head, "HEAD_ROWS", 1)
        actual = token_losses(cross_entropy, hidden, targets, mask, leaf)
        torch.testing.assert_close(actual, wanted)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (actual, wanted)))
        rows = torch.func.vmap(lambda h, y, m: token_losses(cross_entropy, h[None], y[None], m[None], leaf)[0])
        torch.testing.assert_close(rows(hidden, targets, mask), wanted)


def test_the_head_never_holds_whole_logits() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))
            return out

    hidden, head = randn(2, 50, 3).requires_grad_(), randn(101, 3)
    targets, mask = torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(nn_head, "HEAD_CHUNK", 7 * 101)
        patch.setattr(nn_head, "HEAD_ROWS", 1)
        nats = token_losses(cross_entropy, hidden, targets, mask, head)
        torch.autograd.grad(nats.sum(), hidden)
    assert max(sizes) == 7 * 101


# packing


@settings(max_examples=10)
@given(config=configs(scaling="llama3"), seed=SEEDS, lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_packed_equals_unpacked(config: llama.Config, seed: int, lengths: list[int]) -> None:
    params, model = random_params(config, seed, torch.float64), Model(llama.FAMILY, config)
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in lengths]
    packed = Batch(
        F.pad(torch.cat(documents), (0, 3))[None],
        F.pad(torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]), (0, 3))[None].int(),
        torch.ones(1, sum(lengths) + 3, dtype=torch.bool),
    )

    def objective(batches: list[Batch]) -> tree.Tree:
        def total(p: tree.Tree) -> Mean:
            means = [Mean.of(model.token_losses(p, b, CrossEntropy()), b.target_mask()) for b in batches]
            return Mean(*(torch.stack(parts).sum() for parts in zip(*means, strict=True)))

        return value_and_grad(total)(params)

    alone = [Batch(d[None], torch.ones(1, len(d), dtype=torch.int32), torch.ones(1, len(d), dtype=torch.bool)) for d in documents]
    (actual, actual_grads), (wanted, wanted_grads) = objective([packed]), objective(alone)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    assert_trees_close(actual_grads, wanted_grads, 1e-10)


def test_a_document_does_not_see_its_neighbours() -> None:
    params, model = random_params(SMALL), Model(llama.FAMILY, SMALL)
    batch = random_batch(SMALL, 1, 21)
    logits = model.forward(params, batch.tokens, segment_ids=batch.segment_ids)
    first = batch.segment_ids == 1
    changed = torch.where(first, (batch.tokens + 1) % SMALL.vocab_size, batch.tokens)
    others = model.forward(params, changed, segment_ids=batch.segment_ids)
    assert torch.equal(logits[~first], others[~first])
    assert not torch.equal(logits[first], others[first])


def test_labels_never_cross_documents_or_padding() -> None:
    every = torch.ones(1, 6, dtype=torch.bool)
    batch = Batch(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[1, 1, 2, 2, 0, 0]]), every)
    assert batch.target_mask().tolist() == [[False, True, False, True, False, False]]


# steps


def step_parts(seed: int = 0, n_rows: int = 6) -> tuple[Model, dict[str, torch.Tensor], Lora, dict[str, Delta], Batch]:
    params = random_params(SMALL, seed)
    rule = Lora(rank=3, alpha=6.0, targets=TARGETS)
    return Model(llama.FAMILY, SMALL), params, rule, random_deltas(params, rule, seed), random_batch(SMALL, n_rows, 13, seed)


def trainables(
    params: dict[str, torch.Tensor], rule: Lora, deltas: dict[str, Delta]
) -> Iterator[tuple[tree.Tree, tree.Tree, Lora | None]]:
    """(params, trainable, rule) of every kind of training."""
    yield params, deltas, rule
    yield (*split_trainable(params, ("*",)), None)
    frozen, norms = split_trainable(params, ("*norm.weight",))
    yield frozen, {**deltas, **norms}, rule


@pytest.mark.parametrize("kind", range(3))
def test_a_step_is_pure_and_donation_changes_only_where_the_result_lies(kind: int) -> None:
    model, params, rule, deltas, batch = step_parts()
    params, trainable, lora = list(trainables(params, rule, deltas))[kind]
    optimizer = chain(ClipByGlobalNorm(1.0), AdamW(lr=0.1), ScaleBySchedule(Cosine(), 5))
    state = optimizer.init(trainable)
    whole = {name: w for name, w in params.items() if not w.is_meta}
    before = copy.deepcopy((whole, trainable, state, batch))
    results = []
    for donate in (False, True):
        step = train_step(sft(model, lora), optimizer, micro_batch=4, donate=donate)
        given_trainable, given_state = copy.deepcopy((trainable, state))
        for _ in range(3):
            (new, new_state), metrics = step.update(params, TrainState(given_trainable, given_state), batch)
            pointers = [x.data_ptr() for x in tree.leaves((given_trainable, given_state))]
            assert ([x.data_ptr() for x in tree.leaves((new, new_state))] == pointers) == donate
            given_trainable, given_state = new, new_state
        results.append((new, new_state, metrics))
    assert_same((whole, trainable, state, batch), before)
    assert_same(results[0], results[1])
    moved = tree.map(lambda x, y: (x - y).abs().max(), results[0][0], trainable)
    assert all(float(m) > 0 for m in tree.leaves(moved))


def assert_same(actual: tree.Tree, wanted: tree.Tree) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True), actual, wanted)


@settings(max_examples=6)
@given(seed=SEEDS, micro=st.integers(1, 7))
def test_a_step_in_micro_batches_equals_the_step_on_the_whole_batch(seed: int, micro: int) -> None:
    model, params, rule, deltas, batch = step_parts(seed)
    optimizer = SGD(lr=0.1)  # proportional to the gradient: Adam would hide its scale
    state = optimizer.init(deltas)
    wanted = sft_step(model, rule, optimizer).update(params, TrainState(deltas, state), batch)
    accumulated = train_step(sft(model, rule), optimizer, micro_batch=micro).update(params, TrainState(deltas, state), batch)
    assert_trees_close(accumulated[0].trainable, wanted[0].trainable, 1e-6)
    assert_trees_close(accumulated[1], wanted[1], 1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_vmap_over_a_step_takes_the_steps_of_a_loop(dora: bool) -> None:
    model, params, _, _, batch = step_parts()
    rule = Lora(rank=3, alpha=6.0, targets=TARGETS, dora=dora)
    optimizer = chain(ClipByGlobalNorm(1.0), AdamW(lr=0.1), ScaleByGlob({"*.b": 3.0}))
    alone = [rule.init(params, seed) for seed in (0, 1)]

    def step(deltas: tree.Tree, state: tree.Tree) -> tree.Tree:
        return sft_step(model, rule, optimizer).update(params, TrainState(deltas, state), batch)

    stacked = [tree.map(lambda *x: torch.stack(x), *trees) for trees in (alone, [optimizer.init(d) for d in alone])]
    batched = torch.func.vmap(step)(*stacked)
    for i, deltas in enumerate(alone):
        assert_trees_close(tree.map(lambda x, i=i: x[i], batched), step(deltas, optimizer.init(deltas)), 1e-6)


def test_the_logged_loss_is_the_mean_that_was_differentiated() -> None:
    model, params, rule, deltas, batch = step_parts()
    optimizer = SGD(lr=1.0)
    (new, _), metrics = sft_step(model, rule, optimizer).update(params, TrainState(deltas, optimizer.init(deltas)), batch)
    mask = batch.target_mask()
    params64, deltas64 = tree.map(torch.Tensor.double, params), tree.map(torch.Tensor.double, deltas)

    def mean(d: tree.Tree) -> torch.Tensor:
        logits = model.forward(rule.apply(params64, d), batch.tokens, segment_ids=batch.segment_ids)
        return F.cross_entropy(logits[:, :-1][mask[:, 1:]], batch.tokens[:, 1:][mask[:, 1:]])

    grads, loss = torch.func.grad_and_value(mean)(deltas64)
    assert float(metrics["loss_nats"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(tree.norm(grads)), rel=1e-4)
    assert int(metrics["target_tokens"]) == int(mask.sum())
    assert_trees_close(tree.map(torch.sub, deltas, new), tree.map(torch.Tensor.float, grads), 1e-4)


def test_a_step_without_targets_or_with_a_non_finite_gradient_changes_nothing() -> None:
    model, params, rule, deltas, batch = step_parts()
    optimizer = chain(AdamW(lr=0.1, weight_decay=0.1), ScaleBySchedule(Constant(), 5))
    state = optimizer.init(deltas)
    nothing = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    broken = {**params, "model.norm.weight": torch.full_like(params["model.norm.weight"], torch.nan)}
    for p, b in ((params, nothing), (broken, batch)):
        (new, new_state), metrics = sft_step(model, rule, optimizer).update(p, TrainState(deltas, state), b)
        assert metrics["skipped"] == 1
        assert_same((new, new_state), (deltas, state))
    assert sft_step(model, rule, optimizer).update(params, TrainState(deltas, state), batch)[1]["skipped"] == 0


def test_an_eval_step_gives_the_mean_without_a_graph() -> None:
    model, params, rule, deltas, batch = step_parts()
    objective = sft(model, rule)
    mean, extras = eval_step(objective)(deltas, params, batch)
    assert extras == {}
    assert not mean.total.requires_grad
    (wanted, _), _ = value_and_grad(objective, has_aux=True)(deltas, params, batch)
    torch.testing.assert_close(mean, wanted)


@given(values=st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=9))
def test_mean_ignores_what_is_masked_even_nan(values: list[tuple[float, bool]]) -> None:
    x, mask = torch.tensor([v for v, _ in values]), torch.tensor([m for _, m in values])
    mean = Mean.of(torch.where(mask, x, torch.nan), mask)
    assert float(mean.value()) == pytest.approx(float(x[mask].mean()) if mask.any() else 0.0, abs=1e-5)


# trainable trees


def test_deltas_without_a_rule_are_refused() -> None:
    params = random_params(SMALL)
    deltas = Lora(2, 2.0, ("lm_head.weight",)).init(params, 0)
    with pytest.raises(TypeError, match=r"lm_head\.weight is a Delta, expected a Lora rule for it"):
        apply_trainable(params, deltas, None)


def test_training_whole_keeps_float32_copies_and_frees_the_originals() -> None:
    params = random_params(SMALL, dtype=torch.bfloat16)
    frozen, trainable = split_trainable(params, ("*norm.weight",))
    assert all(w.dtype == torch.float32 for w in trainable.values())
    assert all(frozen[name].is_meta == name.endswith("norm.weight") for name in params)
    # a processor without bfloat16 instructions computes with the float32 copies, which are the same numbers
    applied = apply_trainable(frozen, trainable, None)
    assert_same({name: w.to(torch.bfloat16) for name, w in applied.items()}, params)
    with pytest.raises(InputError, match="is trained whole, but the trainable tree does not hold it"):
        sft(Model(llama.FAMILY, SMALL), None)({}, frozen, random_batch(SMALL, 1, 5))
