"""Metrics of a model on labelled batches, beside plain sums over its logits."""

import math

import pytest
import torch

from minitune.inference.score import TokenMetrics, token_metrics
from support.models import SMALL, model_of, random_batch, random_params


def test_token_metrics_are_sums_over_the_targets_of_all_batches() -> None:
    model, params = model_of(SMALL), random_params(SMALL, dtype=torch.float64)
    batches = [random_batch(SMALL, 3, 11, seed=1), random_batch(SMALL, 2, 7, seed=2)]
    nats, hits = [], []
    for batch in batches:
        mask = batch.target_mask()
        logits = model.forward(params, batch.tokens, segment_ids=batch.segment_ids)
        logps = logits.log_softmax(-1)
        # the logits before a token are what predicts it
        for b, t in mask.nonzero().tolist():
            target = batch.tokens[b, t]
            nats.append(-float(logps[b, t - 1, target]))
            hits.append(int(logits[b, t - 1].argmax() == target))
    metrics = token_metrics(model, params, batches)
    assert metrics.n_targets == len(nats) > 10
    assert metrics.loss_nats == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    assert metrics.accuracy == sum(hits) / len(hits)
    assert metrics.perplexity == pytest.approx(math.exp(metrics.loss_nats))


def test_perplexity_stays_a_float_and_no_batch_is_refused() -> None:
    assert math.isfinite(TokenMetrics(1e4, 0.0, 3).perplexity)
    with pytest.raises(TypeError, match="scoring: no batch to measure on, expected at least one"):
        token_metrics(model_of(SMALL), {}, [])
