"""Preference, distillation and quantization-aware objectives: what they compute, against plain sums over whole logits."""

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import tree
from minitune.algorithms.distillation import Teacher, distillation
from minitune.algorithms.objective import answer_logps, apply_trainable, split_trainable
from minitune.algorithms.preference import pair_logps, preference
from minitune.algorithms.quantization_aware import quantization_aware
from minitune.algorithms.supervised import sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.autodiff.value_and_grad import value_and_grad
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, SymmetricKL
from minitune.losses.registry import PairLoss
from minitune.losses.unpaired import Kto
from minitune.models import Model
from minitune.models.families import llama
from minitune.nn import head
from minitune.optim.adamw import AdamW
from minitune.optim.sgd import SGD
from minitune.quant.schemes import NF4, Int8, quantize
from minitune.steps import dpo_step, kd_step, sft_step, train_step
from minitune.types import Batch, Pairs, TeacherBatch, TrainState, UnpairedBatch
from support.independent import members
from support.models import SMALL, configs, random_batch, random_params

pytestmark = pytest.mark.fast

LORA = Lora(rank=3, alpha=6.0, targets=("*_proj.weight",))


def answers(config: llama.Config, n_rows: int, length: int, seed: int) -> Batch:
    """Rows of one document each: a prompt, then an answer of at least one token, then padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (n_rows, length), generator=generator)
    prompt = torch.randint(1, length - 1, (n_rows, 1), generator=generator)
    end = prompt + 1 + (torch.rand(n_rows, 1, generator=generator) * (length - prompt)).long()
    at = torch.arange(length)
    return Batch(tokens, (at < end).to(torch.int32), (at >= prompt) & (at < end))


def pairs(config: llama.Config, n_rows: int, seed: int) -> Pairs:
    return Pairs(answers(config, n_rows, 9, seed), answers(config, n_rows, 13, seed + 1))


def moved(params: dict, seed: int = 5) -> dict:
    """Deltas that change the model."""
    generator = torch.Generator().manual_seed(seed)
    deltas = LORA.init(params, 0)
    return {name: d._replace(b=0.3 * torch.randn(d.b.shape, generator=generator).to(d.b)) for name, d in deltas.items()}


def plain_logps(model: Model, params: dict, rows: Batch) -> torch.Tensor:
    """Each row alone, without padding, through whole logits."""
    sums = []
    for tokens, segments, mask in zip(*rows, strict=True):
        n = int((segments > 0).sum())
        logp = model.forward(params, tokens[None, :n])[0].log_softmax(-1)
        picked = logp[torch.arange(n - 1), tokens[1:n]]
        sums.append(picked[mask[1:n]].sum())
    return torch.stack(sums)


@settings(max_examples=8)
@given(config=configs("default"), n=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_one_forward_over_pairs_gives_every_answers_own_log_prob(config: llama.Config, n: int, seed: int) -> None:
    model, params = Model(llama.FAMILY, config), random_params(config, seed, torch.float64)
    both, adapted = pairs(config, n, seed), LORA.apply(params, moved(random_params(config, seed)))
    logps = pair_logps(model, adapted, both)
    torch.testing.assert_close(logps.chosen, plain_logps(model, adapted, both.chosen))
    torch.testing.assert_close(logps.rejected, plain_logps(model, adapted, both.rejected))
    assert logps.n_chosen.tolist() == both.chosen.target_mask().sum(1).tolist()
    assert logps.n_rejected.tolist() == both.rejected.target_mask().sum(1).tolist()


def test_a_preference_step_starts_at_log_2_and_the_three_references_agree() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    both, optimizer = pairs(SMALL, 5, 0), SGD(lr=0.1)
    start, fresh = moved(params), LORA.init(params, 0)

    def stepped(start: tree.Tree, rows: Pairs, reference: tree.Tree | None) -> tuple[tree.Tree, dict]:
        step = dpo_step(model, LORA, optimizer, reference)
        (new, _), metrics = step.update(params, step.init(start), rows)
        return new, metrics

    _, first = stepped(fresh, both, {})
    assert float(first["loss_nats"]) == pytest.approx(0.693147, abs=1e-6)
    assert float(first["reward_accuracy"]) == 0.0
    assert int(first["pairs"]) == 5
    _, same = stepped(start, both, start)
    assert float(same["loss_nats"]) == pytest.approx(0.693147, abs=1e-6)
    # the model without deltas, a frozen tree of whole weights, and log-probs that were computed before
    live, metrics = stepped(start, both, {})
    with torch.no_grad():
        reference_logps = pair_logps(model, params, both)
    cached = both._replace(reference=torch.stack([reference_logps.chosen, reference_logps.rejected], 1))
    kept, again = stepped(start, cached, None)
    for a, b in zip(tree.leaves(live), tree.leaves(kept), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert float(metrics["loss_nats"]) == pytest.approx(float(again["loss_nats"]), abs=1e-6)
    assert float(metrics["reward_margin"]) == pytest.approx(
        float(metrics["reward_chosen"] - metrics["reward_rejected"]), abs=1e-5
    )
    merged = LORA.merge(params, start)
    frozen, whole = split_trainable(params, ("*",))
    copy = {name: w.clone() for name, w in params.items()}
    trained = {name: merged[name].clone() for name in whole}
    step = dpo_step(model, None, optimizer, copy)
    _, full = step.update(frozen, step.init(trained), both)
    assert float(full["loss_nats"]) == pytest.approx(float(metrics["loss_nats"]), abs=1e-5)
    with pytest.raises(TypeError, match="preference has nothing frozen to compare with"):
        stepped(start, both, None)


@pytest.mark.parametrize("kind", members(PairLoss))
def test_micro_batches_of_pairs_are_one_batch_and_steps_raise_the_margin(kind: type) -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    both, optimizer, trainable = pairs(SMALL, 5, 3), AdamW(lr=1e-2), LORA.init(params, 0)
    objective = preference(model, LORA, kind(), {})
    whole, split = (train_step(objective, optimizer, micro_batch=n) for n in (5, 2))
    state = optimizer.init(trainable)
    one, two = (step.update(params, TrainState(trainable, state), both)[1] for step in (whole, split))
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    first = one
    for _ in range(30):
        (trainable, state), one = whole.update(params, TrainState(trainable, state), both)
    assert float(one["loss_nats"]) < float(first["loss_nats"])
    assert float(one["reward_margin"]) > float(first["reward_margin"])


def test_kto_raises_desirable_answers_above_undesirable_ones() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    rows, others = answers(SMALL, 6, 11, 0), answers(SMALL, 6, 11, 1)
    unpaired = UnpairedBatch(rows, others, torch.tensor([True, False, True, True, False, False]))
    optimizer, trainable = AdamW(lr=1e-2), LORA.init(params, 0)
    step = train_step(unpaired_preference(model, LORA, Kto(), {}), optimizer, micro_batch=6)
    state = optimizer.init(trainable)
    (trainable, state), first = step.update(params, TrainState(trainable, state), unpaired)
    assert float(first["loss_nats"]) == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert int(first["answers"]) == 6
    assert float(first["kl_nats"]) == 0.0
    for _ in range(30):
        (trainable, state), last = step.update(params, TrainState(trainable, state), unpaired)
    assert float(last["reward_desirable"]) > 0.1 > -0.1 > float(last["reward_undesirable"])
    with torch.no_grad():
        reference_logps = torch.stack([answer_logps(model, params, one) for one in (rows, others)], 1)
    evaluate = value_and_grad(
        lambda t: unpaired_preference(model, LORA, Kto(), None)(t, params, unpaired._replace(reference=reference_logps))[0]
    )
    live = value_and_grad(lambda t: unpaired_preference(model, LORA, Kto(), {})(t, params, unpaired)[0])
    for a, b in zip(tree.leaves(evaluate(trainable)), tree.leaves(live(trainable)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


DIVERGENCES = [ForwardKL, ReverseKL, SymmetricKL, JensenShannon]


@settings(max_examples=12)
@given(
    length=st.integers(2, 11),
    chunk=st.sampled_from([1, 2, 3, 5, 1000]),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(DIVERGENCES),
)
def test_distillation_by_chunks_equals_whole_logits_for_every_length(length: int, chunk: int, seed: int, kind: type) -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL, seed, torch.float64)
    big = llama.Config(**{**{f: getattr(SMALL, f) for f in SMALL.__struct_fields__}, "d_model": 20, "n_layers": 3})
    teacher = Teacher(Model(llama.FAMILY, big), random_params(big, seed + 1, torch.float64))
    batch, loss = random_batch(SMALL, 2, length, seed), kind(temperature=1.7, ratio=0.6)
    objective = distillation(model, None, loss, teacher)
    frozen, whole = split_trainable(params, ("*",))
    frozen = {name: w.double() for name, w in frozen.items()}
    whole = {name: params[name] for name in whole}

    def plain(trainable: dict) -> torch.Tensor:
        student = model.forward(trainable, batch.tokens, segment_ids=batch.segment_ids).roll(1, 1)[batch.target_mask()]
        teacher_logits = teacher.model.forward(teacher.params, batch.tokens, segment_ids=batch.segment_ids).roll(1, 1)[
            batch.target_mask()
        ]
        return loss(student, batch.tokens[batch.target_mask()], teacher_logits).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "HEAD_CHUNK", chunk * SMALL.vocab_size)
        patch.setattr(head, "HEAD_ROWS", 1)
        (mean, _), grads = value_and_grad(lambda t: objective(t, frozen, batch), has_aux=True)(whole)
    fresh = {name: w.clone().requires_grad_() for name, w in params.items()}
    total = plain(fresh)
    torch.testing.assert_close(mean.total, total.detach())
    assert int(mean.weight) == int(batch.target_mask().sum())
    wanted = torch.autograd.grad(total, list(fresh.values()), allow_unused=True, materialize_grads=True)
    for name, grad in zip(fresh, wanted, strict=True):
        torch.testing.assert_close(grads[name], grad)


def test_what_a_teacher_said_before_teaches_as_the_teacher_does() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    teacher, batch = Teacher(model, random_params(SMALL, 7)), random_batch(SMALL, 3, 11)
    loss = ForwardKL(temperature=2.0, ratio=0.7)
    logps = (model.forward(teacher.params, batch.tokens, segment_ids=batch.segment_ids).roll(1, 1) / 2.0).log_softmax(-1)
    deltas = moved(params)
    live = distillation(model, LORA, loss, teacher)(deltas, params, batch)[0]
    bounds = []
    for k in (1, 4, SMALL.vocab_size):
        top, ids = logps.topk(k)
        taught = TeacherBatch(batch, ids, top)
        bounds.append(distillation(model, LORA, loss, None)(deltas, params, taught)[0])
    assert [float(b.weight) for b in bounds] == [float(live.weight)] * 3
    assert float(bounds[0].total) < float(bounds[1].total) < float(bounds[2].total)
    torch.testing.assert_close(bounds[2].total, live.total, rtol=1e-5, atol=1e-5)


def test_a_distillation_step_moves_the_student_to_the_teacher() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    teacher, batch, optimizer = Teacher(model, random_params(SMALL, 7)), random_batch(SMALL, 4, 13), AdamW(lr=2e-2)
    frozen, trainable = split_trainable(params, ("*",))
    state, losses = optimizer.init(trainable), []
    step = kd_step(model, None, optimizer, teacher)
    for _ in range(40):
        (trainable, state), metrics = step.update(frozen, TrainState(trainable, state), batch)
        losses.append(float(metrics["loss_nats"]))
    assert losses[-1] < 0.2 * losses[0]
    assert int(metrics["target_tokens"]) == int(batch.target_mask().sum())


def test_quantization_aware_gradients_are_those_at_the_rounded_weights() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    batch = random_batch(SMALL, 2, 9)
    frozen, whole = split_trainable(params, ("*",))

    def coarse(w: torch.Tensor) -> torch.Tensor:
        return w + ((w * 4).round() / 4 - w).detach()

    plain = sft(model, None)
    aware = quantization_aware(plain, lambda t: tree.map(coarse, t))
    evaluate = value_and_grad(lambda t: aware(t, frozen, batch)[0])
    there = value_and_grad(lambda t: plain(t, frozen, batch)[0])
    actual, wanted = evaluate(whole), there(tree.map(lambda w: coarse(w).detach(), whole))
    for a, b in zip(tree.leaves(actual), tree.leaves(wanted), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(actual[0].total, there(whole)[0].total)


def test_a_weight_that_trains_whole_must_be_in_the_tree() -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    frozen, whole = split_trainable(params, ("*norm.weight",))
    with pytest.raises(InputError, match=r"model\.norm\.weight is trained whole, but the trainable tree does not hold it"):
        apply_trainable(frozen, {name: w for name, w in whole.items() if name != "model.norm.weight"}, None)
    with pytest.raises(TypeError, match="is a Delta, expected a Lora rule"):
        apply_trainable(params, LORA.init(params, 0), None)
    optimizer = SGD(lr=0.1)
    step = sft_step(model, None, optimizer)
    (new, _), _ = step.update(frozen, step.init(whole), random_batch(SMALL, 2, 9))
    assert not torch.equal(new["model.norm.weight"], whole["model.norm.weight"])
    assert F.cosine_similarity(new["model.norm.weight"], whole["model.norm.weight"], dim=0) > 0.5


@pytest.mark.parametrize("rows", [12, 17, 23])
def test_heads_that_are_padded_differently_are_cut_to_the_smaller(rows: int) -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL, 0, torch.float64)
    other = msgspec.structs.replace(SMALL, vocab_size=rows)
    teacher = Teacher(Model(llama.FAMILY, other), random_params(other, 1, torch.float64))
    n, loss = min(rows, SMALL.vocab_size), ForwardKL(temperature=2.0, ratio=0.7)
    batch = random_batch(SMALL, 3, 9)._replace(tokens=random_batch(SMALL, 3, 9).tokens % 12)

    mean, grads = value_and_grad(lambda p: distillation(model, None, loss, teacher)(p, params, batch)[0])(params)

    def plain(p: tree.Tree) -> torch.Tensor:
        ours, theirs = (
            one.forward(w, batch.tokens, segment_ids=batch.segment_ids)[:, :-1, :n]
            for one, w in ((model, p), (teacher.model, teacher.params))
        )
        return loss(ours, batch.tokens[:, 1:], theirs)[batch.target_mask()[:, 1:]].sum()

    torch.testing.assert_close(mean.total, plain(params))
    wanted = torch.func.grad(plain)(params)
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), grads, wanted)


@pytest.mark.parametrize("scheme", [Int8(), NF4()], ids=lambda scheme: type(scheme).__name__)
def test_codes_that_are_to_train_whole_are_refused(scheme: Int8 | NF4) -> None:
    params: dict = random_params(msgspec.structs.replace(SMALL, d_ff=32))
    name = "model.layers.0.mlp.up_proj.weight"
    params[name] = quantize(params[name], scheme)
    kind = type(params[name]).__name__
    with pytest.raises(InputError, match=rf"up_proj.weight \[32, 12\] is a {kind}, expected a dense weight.*; train deltas"):
        split_trainable(params, ("*",))
