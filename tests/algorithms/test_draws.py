"""Dropout of low-rank changes and NEFTune's noise: functions of seeds, the same in any part, order and recomputation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from minitune import tree
from minitune.algorithms import sweep
from minitune.algorithms.objective import apply_trainable
from minitune.algorithms.preference import pair_logps, preference
from minitune.algorithms.supervised import sft
from minitune.algorithms.unpaired import unpaired_preference
from minitune.autodiff.value_and_grad import per_example, value_and_grad
from minitune.errors import InputError
from minitune.interop.peft.layout import Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.lora import Lora
from minitune.losses.preference import Dpo
from minitune.losses.token import CrossEntropy
from minitune.losses.unpaired import Kto
from minitune.models import Model
from minitune.models.draws import Draws
from minitune.models.families import llama
from minitune.nn.attention.key_range import document_lengths
from minitune.nn.dropout import dropped, row_seeds, seeded, uniform
from minitune.optim.adamw import AdamW
from minitune.steps import eval_step, sft_step, train_step
from minitune.types import Dropout, Pairs, UnpairedBatch
from support.closeness import assert_trees_close, distance
from support.models import SMALL, randn, random_batch, random_params, reference
from support.programs import LORA, TRAIN, rows_without_time, run, run_killed, start, weights

TARGETS = ("*.self_attn.*_proj.weight", "*.mlp.*_proj.weight")
RULE = Lora(3, 5.0, TARGETS, dropout=0.3)
MODEL = Model(llama.FAMILY, SMALL)
NOISY = MODEL._replace(neftune_alpha=7.0)


def trained(rule: Lora, params: dict, dtype: torch.dtype = torch.float64) -> dict:
    return tree.map(lambda x: x.to(dtype) + 0.3 * randn(*x.shape, seed=x.numel(), dtype=dtype), rule.init(params, 0))


def wide_params() -> dict:
    return random_params(SMALL, dtype=torch.float64)


def gradients(model: Model, batch: object, rule: Lora = RULE) -> dict:
    params = wide_params()
    return value_and_grad(sft(model, rule), has_aux=True)(trained(rule, params), params, batch)[1]


def test_the_share_that_is_dropped_is_the_rate_and_the_mean_is_kept() -> None:
    seeds = row_seeds(seeded(torch.zeros(31), 5, 7).seeds, 31, "a")
    for rate in (0.02, 0.1, 0.5, 0.93):
        x = dropped(torch.ones(31, 257, 101, dtype=torch.float64), Dropout(seeds, torch.tensor(rate)))
        n_kept = int((x != 0).sum())
        deviation = (rate * (1 - rate) * x.numel()) ** 0.5
        assert abs(n_kept - (1 - rate) * x.numel()) < 4.5 * deviation
        assert float(x.max()) == pytest.approx(1 / (1 - rate), rel=3e-4)  # the rate is one of 2^16
    everything = torch.ones(31, 3, 5)
    assert dropped(everything, Dropout(seeds, torch.tensor(0.0))).equal(everything)


def test_draws_of_other_rows_weights_steps_and_seeds_are_not_related() -> None:
    def draws(seed: int = 0, step: int = 0, name: str = "a", row: int = 0) -> torch.Tensor:
        own = seeded(torch.zeros(3), seed, step).seeds
        return uniform(row_seeds(own, 3, name), 64, 64)[row].flatten()

    others = [draws(), draws(seed=1), draws(step=1), draws(name="b"), draws(row=1), draws(row=2)]
    others += [row[0].flatten() for row in uniform(row_seeds(seeded(torch.zeros(1), 0, 0).seeds, 2, "a"), 64, 64).split(1)][1:]
    correlation = torch.corrcoef(torch.stack(others)) - torch.eye(len(others))
    assert float(correlation.abs().max()) < 4.5 / 64  # 4.5 standard deviations of two unrelated rows
    for one in others:
        steps = torch.linspace(-1, 1, len(one))
        assert float((one.sort().values - steps).abs().max()) < 2 * 2.2 / 64  # Kolmogorov and Smirnov, at 1e-4
        neighbours = torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1]
        assert abs(float(neighbours)) < 4.5 / 64


def test_a_row_draws_the_same_in_any_company_and_with_any_padding() -> None:
    own = row_seeds(seeded(torch.zeros(5), 3, 4).seeds, 5, "w")
    rate, x = torch.tensor(0.4), randn(5, 11, 7)
    whole = dropped(x, Dropout(own, rate))
    assert dropped(x[2:4], Dropout(own[2:4], rate)).equal(whole[2:4])
    assert dropped(F.pad(x, (0, 0, 0, 3)), Dropout(own, rate))[:, :11].equal(whole)
    assert uniform(own[2:4], 9, 7).equal(uniform(own, 11, 7)[2:4, :9])


def test_dropout_in_a_step_equals_peft_given_the_same_masks(tmp_path: Path) -> None:
    params, batch = random_params(SMALL), random_batch(SMALL, 3, 13, packed=False)
    batch = batch._replace(segment_ids=torch.ones_like(batch.segment_ids))  # transformers sees no padding here
    trainable, rows = trained(RULE, params, torch.float32), seeded(batch, 2, 9)
    save_adapter(tmp_path, trainable, RULE, base=Base("base"), names=params)
    loss, grads = value_and_grad(sft(MODEL, RULE), has_aux=True)(trainable, params, rows)

    model = PeftModel.from_pretrained(reference(SMALL, params), tmp_path, is_trainable=True)
    n_masked = 0
    for name, module in model.named_modules():
        if name.endswith(".lora_dropout.default"):
            assert module.p == 0.3  # what the adapter's file says
            weight = name.removeprefix("base_model.model.").removesuffix(".lora_dropout.default") + ".weight"
            dropout = Dropout(row_seeds(rows.seeds, 3, weight), torch.tensor(0.3))
            module.forward = lambda x, dropout=dropout: x * dropped(torch.ones_like(x), dropout)
            n_masked += 1
    assert n_masked == len(trainable)
    nats = F.cross_entropy(model(batch.tokens).logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    total = (nats * batch.target_mask()[:, 1:]).sum()
    total.backward()
    assert float(loss[0].total) == pytest.approx(float(total.detach()), rel=1e-5)
    theirs = dict(model.named_parameters())
    for name, delta in grads.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        for part, mine in (("lora_A", delta.a), ("lora_B", delta.b)):
            assert distance(mine, theirs[f"{module}.{part}.default.weight"].grad) < 1e-5, name
    assert load_adapter(tmp_path, names=params)[0].dropout == 0.3


def test_noise_on_embedded_tokens_is_that_of_its_definition_for_every_document() -> None:
    params, batch = wide_params(), random_batch(SMALL, 4, 13)
    rows = seeded(batch, 1, 2)
    seen = NOISY._replace(draws=Draws(rows.seeds)).hidden(params, batch)

    noise = uniform(row_seeds(rows.seeds, 4, "neftune"), 13, SMALL.d_model)
    for i in range(4):
        for document in batch.segment_ids[i].unique():
            at = batch.segment_ids[i] == document
            size = 7.0 / (int(at.sum()) * SMALL.d_model) ** 0.5
            noise[i, at] *= size if document > 0 else 0.0
    # the same tokens as rows of an embedding of their own, which then holds the noise
    table = params["model.embed_tokens.weight"][batch.tokens] + noise
    numbers = torch.arange(4 * 13).view(4, 13)
    given = {**params, "model.embed_tokens.weight": table.flatten(0, 1)}
    assert distance(seen, MODEL.hidden(given, batch._replace(tokens=numbers))) < 1e-6
    assert distance(seen, MODEL.hidden(params, batch)) > 1e-2
    assert int(document_lengths(batch.segment_ids).max()) < 13 or bool((batch.segment_ids == 1).all(1).any())


def test_draws_are_the_same_recomputed_and_in_micro_batches() -> None:
    rows = seeded(random_batch(SMALL, 5, 13), 0, 3)
    wanted = gradients(NOISY, rows)
    again = gradients(NOISY._replace(n_remat=2), rows)
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=0.0, atol=0.0), again, wanted)
    params = wide_params()
    start, optimizer = trained(RULE, params), AdamW(lr=1e-2, eps=1e-3)
    states = []
    for micro_batch in (None, 1, 2):
        step = train_step(sft(NOISY, RULE), optimizer, micro_batch=micro_batch)
        states.append(step.update(params, step.init(start), rows)[0].trainable)
    assert_trees_close(states[1], states[0], 1e-12)
    assert_trees_close(states[2], states[0], 1e-12)
    other = train_step(sft(NOISY, RULE), optimizer).update(params, step.init(start), seeded(rows.rows, 0, 4))[0]
    with pytest.raises(AssertionError):
        assert_trees_close(other.trainable, states[0], 1e-4)


def test_draws_are_those_of_each_row_under_vmap() -> None:
    params, rows = wide_params(), seeded(random_batch(SMALL, 4, 9), 0, 3)
    trainable, objective = trained(RULE, params), sft(NOISY, RULE)

    def of_row(leaves: dict, row: object) -> object:
        return objective(leaves, params, tree.map(lambda x: x[None], row))[0]

    _, each = per_example(of_row, chunk=3)(trainable, rows)
    for i in range(4):
        row = tree.map(lambda x, i=i: x[i : i + 1], rows)
        wanted = value_and_grad(objective, has_aux=True)(trainable, params, row)[1]
        assert_trees_close(tree.map(lambda x, i=i: x[i], each), wanted, 1e-10)


def test_nothing_is_drawn_in_an_evaluation_and_a_training_without_seeds_is_refused() -> None:
    params, batch = wide_params(), random_batch(SMALL, 3, 13)
    trainable = trained(RULE, params)
    plain = sft(MODEL, Lora(3, 5.0, TARGETS))(trainable, params, batch)[0]
    assert eval_step(sft(NOISY, RULE))(trainable, params, batch)[0].total.equal(plain.total)
    for objective, what in ((sft(MODEL, RULE), "lora.dropout = 0.3"), (sft(NOISY, None), "neftune_alpha = 7.0")):
        with pytest.raises(TypeError, match=rf"objective: {what} is drawn from seeds .*expected dropout.seeded\("):
            value_and_grad(objective, has_aux=True)(trainable if "lora" in what else {}, params, batch)
    step = sft_step(MODEL, RULE, AdamW(lr=1e-2))
    with pytest.raises(TypeError, match=r"objective: lora\.dropout"):
        step.update(params, step.init(trainable), batch)


def test_the_reference_and_the_drift_see_no_dropout_and_the_policy_does() -> None:
    params, quiet = wide_params(), Lora(3, 5.0, TARGETS)
    trainable, start = trained(RULE, params), RULE.init(params, 1)
    pairs = Pairs(random_batch(SMALL, 3, 13, seed=1), random_batch(SMALL, 3, 11, seed=2))
    rows = seeded(pairs, 0, 5)
    _, metrics = preference(NOISY, RULE, Dpo(beta=0.5), start)(trainable, params, rows)

    policy = pair_logps(NOISY._replace(draws=Draws(rows.seeds, (0.3,))), apply_trainable(params, trainable, RULE), pairs)
    frozen = pair_logps(MODEL, apply_trainable(params, start, quiet), pairs)
    torch.testing.assert_close(metrics["reward_chosen"].value(), 0.5 * (policy.chosen - frozen.chosen).mean())
    torch.testing.assert_close(metrics["reward_rejected"].value(), 0.5 * (policy.rejected - frozen.rejected).mean())

    unpaired = UnpairedBatch(*pairs[:2], torch.tensor([True, False, True]))
    drift = [
        unpaired_preference(model, rule, Kto(), start)(trainable, params, batch)[1]["kl_nats"].value()
        for model, rule, batch in ((NOISY, RULE, seeded(unpaired, 0, 5)), (MODEL, quiet, unpaired))
    ]
    assert drift[0].equal(drift[1])


def test_each_adapter_of_a_sweep_drops_what_it_drops_alone() -> None:
    params, rules = wide_params(), [RULE, Lora(2, 3.0, TARGETS, dropout=0.0), Lora(1, 3.0, TARGETS, dropout=0.6)]
    each = [trained(rule, params) for rule in rules]
    batches = [seeded(random_batch(SMALL, 3, 9, seed=i), i, 4) for i in range(3)]
    together = tree.map(lambda *x: torch.stack(x), *batches)
    objective = sweep.adapters_objective(NOISY, CrossEntropy(), rules)
    mean, grads = value_and_grad(objective)(sweep.stack(each), params, together)
    for i, (rule, own, batch) in enumerate(zip(rules, each, batches, strict=True)):
        (alone, _), wanted = value_and_grad(sft(NOISY, rule), has_aux=True)(own, params, batch)
        torch.testing.assert_close(mean.total[i], alone.total)
        assert_trees_close(sweep.adapter(grads, i, rule), wanted, 1e-10)
    with pytest.raises(TypeError, match=r"objective: lora.dropout = 0.6"):
        value_and_grad(objective)(sweep.stack(each), params, together.rows)


def test_experts_and_heads_are_refused_and_check_says_so(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    params = {"lm_head.weight": torch.zeros(5, 3), "model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(5, 3)}
    for name in params:
        with pytest.raises(InputError, match=rf"lora: {name} is adapted with dropout = 0.1, expected 0 for experts"):
            Lora(1, 1.0, (name,), dropout=0.1).init(params, 0)
    assert start(tmp_path, tiny, LORA.replace("rank = 2", "rank = 2\ndropout = 1.0") + TRAIN, verb=("check",)) == 2
    assert "dropout" in capsys.readouterr().err


def test_a_run_with_dropout_and_noise_that_is_killed_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = LORA.replace("rank = 2", "rank = 2\ndropout = 0.2") + TRAIN + "neftune_alpha = 5.0\n"
    words = ("train.save_every=3", "train.steps=7", "train.micro_batch_size=2", "model.device=cpu")
    run(tmp_path, tiny, stages, *words, name="straight")
    run_killed(tmp_path, tiny, stages, *words, after_step=5, monkeypatch=monkeypatch)
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "killed")


def test_a_sweep_and_pairs_train_with_dropout(tiny: Path, tmp_path: Path) -> None:
    dropping = LORA.replace("rank = 2", "rank = 2\ndropout = 0.1")
    held = 'evaluate = { data = "heldout", every = 2 }\n'
    swept = dropping + TRAIN + held + 'sweep = { "lora.dropout" = [0.0, 0.5], "optimizer.lr" = [0.01, 0.05] }\n'
    assert len(run(tmp_path, tiny, swept, name="swept")["train"]["adapters"]) == 4
    pairs = dropping + TRAIN.replace('"train"\nsteps', '"pairs"\nsteps') + 'loss = { kind = "dpo" }\nneftune_alpha = 5.0\n'
    run(tmp_path, tiny, pairs, name="pairs")
