"""Bytes in memory where nothing is to train: held-out loss and answers, before a weight is read."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune import tree
from minitune.algorithms.objective import apply_trainable
from minitune.inference.generate import STRIDE
from minitune.models import decoder
from minitune.planning.alike import first_alike
from minitune.planning.forward import StepForward, constant_parts, head_bytes, reduced, step_forward
from minitune.planning.memory import peak_memory
from minitune.planning.offloading import arriving_bytes
from minitune.planning.step_spec import BATCH_BYTES_PER_TOKEN, Parts, StepSpec


def evaluation_memory(step: StepSpec, n_rows: int, n_tokens: int) -> Parts:
    """Bytes of what is in memory at the fullest moment of held-out loss on n_rows rows of n_tokens,
    beside the state of the step."""
    return {**peak_memory(step), **_loss_memory(step, n_rows, n_tokens)}


def loss_memory(step: StepSpec) -> Parts:
    """Bytes at the fullest moment of the losses of the step's rows, where nothing is to train."""
    return {**_constant_parts(step), **_loss_memory(step, step.n_rows, step.n_tokens)}


def answer_memory(step: StepSpec, n_new: int) -> Parts:
    """Bytes at the fullest moment of answering the step's rows with n_new tokens each.

    That is while the prompts are read, or at the logits of their last tokens.
    """
    # rows that ranks share in training are whole on each of them
    step = step._replace(mesh=step.mesh._replace(shares_rows=False))
    config, like = step.model.config, step.params["model.embed_tokens.weight"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward = _without_gradients(step, step.n_rows, step.n_tokens)
        element = torch.empty((), dtype=like.dtype, device=step.device)
        n_slots = -(-(step.n_tokens + n_new) // STRIDE) * STRIDE
        cache = decoder.empty_caches(config, step.n_rows, n_slots, element)
        x_bytes = tree.n_bytes(forward.x)
    logits = step.n_rows * config.vocab_size * (forward.x.element_size() + 4)  # and as float32
    return {
        **_constant_parts(step),
        "cache": tree.n_bytes(cache),
        "batch": step.n_rows * step.n_tokens * BATCH_BYTES_PER_TOKEN + forward.shared_bytes,
        "transient": max([logits, *(block.transient for block in forward.blocks)]),
        "activations": x_bytes,
    }


def _constant_parts(step: StepSpec) -> Parts:
    """Parts that are in memory while nothing trains."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = constant_parts(step, _without_gradients(step, 1, 1), 0)
    return {**parts, "gathered": arriving_bytes(step)}


def _loss_memory(step: StepSpec, n_rows: int, n_tokens: int) -> Parts:
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward = _without_gradients(step, n_rows, n_tokens)
        x_bytes = tree.n_bytes(forward.x)
        logits_bytes = head_bytes(forward)[1]
    return {
        "batch": n_rows * n_tokens * BATCH_BYTES_PER_TOKEN + forward.shared_bytes,
        "copies": 0,
        "gradients": 0,
        "transient": max([logits_bytes, *(block.transient for block in forward.blocks)]),
        "activations": x_bytes,
    }


def _without_gradients(step: StepSpec, n_rows: int, n_tokens: int) -> StepForward:
    """Forward of a step alone over n_rows rows of n_tokens, on fake tensors."""
    alike = first_alike(step.model, step.params, step.trainable)
    step = reduced(step, alike)
    with torch.no_grad():
        params = apply_trainable(step.params, step.trainable, step.lora)
    model = step.model._replace(n_remat=0)
    step = step._replace(params=params, trainable={}, model=model, offloaded=False)
    step = step._replace(n_rows=n_rows, n_tokens=n_tokens, n_micro_batches=1, rounded=())
    return step_forward(step, alike)
