"""Losses, gradients and rewards against TRL's own trainers, run on the same tiny model and the same answers."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minitune.algorithms.objective import split_trainable
from minitune.losses.distillation import forward_kl, jensen_shannon, reverse_kl
from minitune.losses.preference import ApoDown, ApoZero, Cpo, Dpo, Hinge, Ipo, Orpo, SimPO, dpo
from minitune.losses.registry import PairLoss
from minitune.losses.unpaired import Kto
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.sgd import SGD
from minitune.steps import preference_step
from minitune.types import Batch, LogProbs, Pairs
from support.models import SMALL, random_params, reference

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL's own switch for the warning that importing trl.experimental gives

VOCAB = SMALL.vocab_size
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "activation_checkpointing": False,
    "disable_dropout": True,
    "logging_steps": 1,
}


class Peer(NamedTuple):
    """What a trainer of TRL makes of one batch, the model being in evaluation mode as `reference` leaves it."""

    model: LlamaForCausalLM
    loss: Tensor
    gradients: dict[str, Tensor]  # by Hugging Face name
    metrics: dict[str, float]  # rewards/chosen, logps/rejected, ...


def answers(prompts: list[int], lengths: list[int], seed: int) -> Batch:
    """Random rows of a prompt and an answer of these lengths, padded on the right; the answer is what is learned."""
    n, width = len(prompts), max(p + k for p, k in zip(prompts, lengths, strict=True))
    at, p, end = torch.arange(width), torch.tensor(prompts)[:, None], (torch.tensor(prompts) + torch.tensor(lengths))[:, None]
    tokens = torch.randint(1, VOCAB, (n, width), generator=torch.Generator().manual_seed(seed))
    first = torch.randint(1, VOCAB, (n, width), generator=torch.Generator().manual_seed(99))  # the prompts of every call
    tokens = torch.where(at < p, first, tokens)
    return Batch(torch.where(at < end, tokens, 0), (at < end).int().expand(n, -1), (at >= p) & (at < end))


def dpo_peer(policy: LlamaForCausalLM, frozen: LlamaForCausalLM, pairs: Pairs, folder: Path, **config: Any) -> Peer:
    """DPOTrainer's loss of the pairs, its gradients and its metrics; config: DPOConfig's fields (loss_type, beta, ...)."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(folder), **QUIET, **{"max_length": None, **config})
    trainer = DPOTrainer(policy, frozen, args, train_dataset=a_dataset(), processing_class=a_tokenizer())
    tokens, real, learned = (_stacked(x, y) for x, y in zip(pairs.chosen, pairs.rejected, strict=True))
    inputs = {"input_ids": tokens, "attention_mask": real.long(), "completion_mask": learned.long()}
    loss = trainer.compute_loss(policy, inputs)
    return _peer(policy, loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()})


def free_peer(kind: str, policy: LlamaForCausalLM, pairs: Pairs, folder: Path, **config: Any) -> Peer:
    """The same of the trainers that need no reference: kind is "cpo" or "orpo"."""
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

    args = Config(output_dir=str(folder), **QUIET, **{"max_length": 64, "remove_unused_columns": False, **config})
    trainer = Trainer(policy, args, train_dataset=a_dataset(), processing_class=a_tokenizer())
    inputs: dict[str, Tensor] = {}
    for name, rows in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        labels = torch.where(rows.loss_mask, rows.tokens, -100)
        parts = {"input_ids": rows.tokens, "attention_mask": rows.segment_ids.long(), "labels": labels}
        inputs |= {f"{name}_{part}": x for part, x in parts.items()}
    loss, metrics = trainer.get_batch_loss_metrics(policy, inputs)
    return _peer(policy, loss, metrics)


def kto_peer(
    policy: LlamaForCausalLM,
    frozen: LlamaForCausalLM,
    unpaired: Batch,
    mismatched: Batch,
    desirable: Tensor,
    folder: Path,
    **config: Any,
) -> Peer:
    """The same of KTOTrainer."""
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(output_dir=str(folder), per_device_train_batch_size=2, **QUIET, **{"max_length": None, **config})
    trainer = KTOTrainer(policy, frozen, args, train_dataset=a_dataset(), processing_class=a_tokenizer())
    inputs: dict[str, Tensor] = {"label": desirable}
    for prefix, rows in (("", unpaired), ("KL_", mismatched)):
        parts = {"input_ids": rows.tokens, "attention_mask": rows.segment_ids.long(), "completion_mask": rows.loss_mask.long()}
        inputs |= {f"{prefix}{part}": x for part, x in parts.items()}
    loss = trainer.compute_loss(policy, inputs)
    return _peer(policy, loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()})


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Words "0" to "16"; the trainers want one, though every batch here is made of ids."""
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", bos_token="1", eos_token="2")


def a_dataset() -> Any:
    """Two pairs of text, which the trainers want and never train on here."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["3 4", "5"], "chosen": [" 6 7", " 8"], "rejected": [" 9", " 10 11"]})


def _stacked(x: Tensor, y: Tensor) -> Tensor:
    width = max(x.shape[1], y.shape[1])
    return torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in (x, y)])


def _peer(model: LlamaForCausalLM, loss: Tensor, metrics: dict[str, float]) -> Peer:
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return Peer(model, loss.detach(), gradients, metrics)


# --- what minitune's losses make of the same batch, through transformers' plain logits ----------------------------------------


def sums(model: LlamaForCausalLM, rows: Batch) -> Tensor:
    """Summed log-probs of each row's answer."""
    logits = model(input_ids=rows.tokens, attention_mask=rows.segment_ids.long()).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, rows.tokens[:, 1:, None]).squeeze(-1)
    return torch.where(rows.loss_mask[:, 1:], logps, 0.0).sum(-1)


def log_probs(model: LlamaForCausalLM, pairs: Pairs) -> LogProbs:
    counts = (rows.loss_mask.sum(-1).float() for rows in pairs[:2])
    return LogProbs(sums(model, pairs.chosen), sums(model, pairs.rejected), *counts)


def a_model(seed: int) -> LlamaForCausalLM:
    return reference(SMALL, random_params(SMALL, seed))


def check(loss: Tensor, model: LlamaForCausalLM, peer: Peer) -> None:
    """The loss and its gradient by every weight are the peer's, to 1e-5 of their size."""
    torch.testing.assert_close(loss.detach(), peer.loss, rtol=1e-5, atol=1e-6)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    size = max(float(g.abs().max()) for g in peer.gradients.values())
    assert size > 1e-3
    for name, gradient in zip(named, gradients, strict=True):
        torch.testing.assert_close(gradient, peer.gradients[name], rtol=1e-5, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}")


PAIRS = Pairs(answers([3, 1, 2], [4, 2, 7], seed=1), answers([3, 1, 2], [2, 5, 3], seed=2))
REFERRING = [
    (Dpo(beta=0.3), "sigmoid"),
    (Hinge(beta=0.05), "hinge"),
    (Ipo(beta=0.2), "ipo"),
    (ApoZero(beta=0.3), "apo_zero"),
    (ApoDown(beta=0.3), "apo_down"),
]
EVEN = Pairs(answers([1, 1, 1], [4, 4, 4], seed=1), answers([1, 1, 1], [2, 5, 3], seed=2))  # see the trainers without a reference


@pytest.mark.parametrize(("loss", "loss_type"), REFERRING, ids=str)
def test_pairs_against_a_reference_cost_what_dpo_trainer_says(loss: PairLoss, loss_type: str, tmp_path: Path) -> None:
    policy, frozen, again = a_model(0), a_model(1), a_model(0)
    peer = dpo_peer(policy, frozen, PAIRS, tmp_path, loss_type=[loss_type], beta=loss.beta)
    ours, ref = log_probs(again, PAIRS), log_probs(a_model(1), PAIRS)
    check(loss(ours, ref).mean(), again, peer)
    chosen, rejected = (x.detach() for x in loss.rewards(ours, ref))
    assert float(chosen.mean()) == pytest.approx(peer.metrics["rewards/chosen"], rel=1e-5)
    assert float(rejected.mean()) == pytest.approx(peer.metrics["rewards/rejected"], rel=1e-5)
    assert float((chosen > rejected).float().mean()) == pytest.approx(peer.metrics["rewards/accuracies"])
    assert float(ours.chosen.detach().mean()) == pytest.approx(peer.metrics["logps/chosen"], rel=1e-5)


@pytest.mark.parametrize(("loss", "loss_type"), REFERRING, ids=str)
def test_a_step_of_ours_is_the_step_of_dpo_trainer(loss: PairLoss, loss_type: str, tmp_path: Path) -> None:
    """preference_step from old to new weights: its loss, its metrics, and its gradient as what SGD at rate 1 moves."""
    peer = dpo_peer(a_model(0), a_model(1), PAIRS, tmp_path, loss_type=[loss_type], beta=loss.beta)
    model, optimizer = Model(llama.FAMILY, SMALL), SGD(lr=1.0)
    params, trainable = split_trainable(random_params(SMALL, 0), ("*",))
    step = preference_step(model, None, optimizer, loss, random_params(SMALL, 1))
    (after, _), metrics = step.update(params, step.init(trainable), PAIRS)
    assert float(metrics["loss_nats"]) == pytest.approx(float(peer.loss), rel=1e-5, abs=1e-6)
    for ours, theirs in (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins"), ("accuracy", "accuracies")):
        assert float(metrics[f"reward_{ours}"]) == pytest.approx(peer.metrics[f"rewards/{theirs}"], rel=1e-5, abs=1e-6)
    size = max(float(g.abs().max()) for g in peer.gradients.values())
    assert size > 1e-3
    for name, before in trainable.items():
        torch.testing.assert_close(before - after[name], peer.gradients[name], rtol=1e-5, atol=1e-5 * size)


def test_label_smoothing_is_what_trl_calls_aot_on_one_pair_and_robust_but_for_its_weights(tmp_path: Path) -> None:
    policy, frozen, again = a_model(0), a_model(1), a_model(0)
    one = Pairs(*(Batch(*(x[:1] for x in rows)) for rows in PAIRS[:2]))
    peer = dpo_peer(policy, frozen, one, tmp_path, loss_type=["aot"], beta=0.3, label_smoothing=0.2)
    ours, ref = log_probs(again, one), log_probs(a_model(1), one)
    check(Dpo(beta=0.3, label_smoothing=0.2)(ours, ref).mean(), again, peer)

    policy, again, s = a_model(0), a_model(0), 0.2
    peer = dpo_peer(policy, a_model(1), PAIRS, tmp_path, loss_type=["robust"], beta=0.3, label_smoothing=s)
    ours, ref = log_probs(again, PAIRS), log_probs(a_model(1), PAIRS)
    four = (ours.chosen, ours.rejected, ref.chosen, ref.rejected)
    check(dpo(*four, beta=0.3, label_smoothing=-s / (1 - 2 * s)).mean(), again, peer)


@pytest.mark.parametrize(
    ("loss", "kind", "config"),
    [
        (SimPO(beta=1.5, gamma=0.6), "cpo", {"loss_type": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0}),
        (Cpo(beta=0.2, nll_weight=0.7), "cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.7}),
        (Orpo(beta=0.4), "orpo", {}),
    ],
    ids=str,
)
def test_pairs_alone_cost_what_cpo_and_orpo_trainer_say(loss: PairLoss, kind: str, config: Any, tmp_path: Path) -> None:
    """TRL's fine-tuning term is the mean over the batch's tokens, ORPO's over prompts too: with chosen answers of one length and
    prompts of one token it is the mean over pairs that it is here."""
    policy, again = a_model(0), a_model(0)
    peer = free_peer(kind, policy, EVEN, tmp_path, beta=loss.beta, **config)
    ours = log_probs(again, EVEN)
    check(loss(ours, None).mean(), again, peer)
    chosen, rejected = (x.detach() for x in loss.rewards(ours, None))
    assert float(chosen.mean()) == pytest.approx(peer.metrics["rewards/chosen"], rel=1e-5)
    assert float(rejected.mean()) == pytest.approx(peer.metrics["rewards/rejected"], rel=1e-5)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_unpaired_answers_cost_what_kto_trainer_says(seeds: tuple[int, int], tmp_path: Path) -> None:
    policy, frozen, again = a_model(seeds[0]), a_model(seeds[1]), a_model(seeds[0])
    unpaired, mismatched = answers([3, 1, 2, 2], [4, 2, 7, 1], seed=1), answers([3, 1, 2, 2], [2, 5, 3, 3], seed=2)
    desirable = torch.tensor([True, False, True, False])
    loss = Kto(beta=0.1, desirable_weight=1.0, undesirable_weight=1.2)
    knobs = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.2}
    peer = kto_peer(policy, frozen, unpaired, mismatched, desirable, tmp_path, **knobs)
    frozen = a_model(seeds[1])
    ours, ref = sums(again, unpaired), sums(frozen, unpaired).detach()
    kl = (sums(again, mismatched) - sums(frozen, mismatched)).mean().detach()
    assert max(float(kl), 0.0) == pytest.approx(peer.metrics["kl"], rel=1e-5)
    check(loss(ours, ref, desirable, kl).mean(), again, peer)
    rewards = loss.rewards(ours, ref).detach()
    assert float(rewards[desirable].mean()) == pytest.approx(peer.metrics["rewards/chosen"], rel=1e-5)
    assert float(rewards[~desirable].mean()) == pytest.approx(peer.metrics["rewards/rejected"], rel=1e-5)


@pytest.mark.parametrize("t", [1.0, 1.7])
def test_divergences_are_gkd_trainers_times_the_temperature_squared(t: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = 3 * torch.randn(2, 2, 5, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weight in (0.0, 0.3, 0.5, 1.0):
        peer = GKDTrainer.generalized_jsd_loss(student, teacher, beta=weight, temperature=t, reduction="none").sum(-1)
        if 0 < weight < 1:
            divergence = jensen_shannon(student, teacher, temperature=t, weight=weight)
        else:
            divergence = (forward_kl if weight == 0 else reverse_kl)(student, teacher, temperature=t)
        torch.testing.assert_close(divergence, t**2 * peer)
