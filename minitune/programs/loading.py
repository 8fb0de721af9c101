"""Loading of a program's model: its state without weights, then the weights."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import torch

from minitune import hardware, tree
from minitune.checkpoint.generation_config import end_ids
from minitune.data.source import Source
from minitune.errors import InputError, nearest
from minitune.io.paths import locate
from minitune.io.results import require_unharmed
from minitune.lora import check_deltas
from minitune.models.model import Model
from minitune.models.open import open as models_open
from minitune.models.open import open_config
from minitune.programs import offloading
from minitune.programs.data_paths import located
from minitune.programs.ended import Ended
from minitune.programs.log import Log
from minitune.programs.sharding import Sharding, cutting, placed, stored_weights, unread
from minitune.programs.signals import StopSignals
from minitune.programs.state import AbstractState, LoadedModel, PipelineState
from minitune.programs.state_deltas import deltas_on, open_deltas
from minitune.quant.rules import Quantization
from minitune.quant.schemes import NF4
from minitune.text.chat import open_text
from minitune.text.template import with_options
from minitune.tree import Tree
from minitune.types import Delta

NO_RULES: Mapping[str, Quantization] = MappingProxyType({})
NONE_ENDED: Mapping[str, Ended] = MappingProxyType({})


class ModelSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source of a model: a Hugging Face folder, or a shape with random weights and a tokenizer
    folder.

    dtype "auto" is bfloat16 where the device multiplies it natively, else float16 on an accelerator
    and float32 on a CPU. What trains is never in float16: its gradients are those of a scaled loss.
    """

    # Hugging Face folder, "demo", or in a load stage run/NAME; or give config
    path: str | None = None
    # shape file such as configs/models/llama-125m.toml, for a model with random weights
    config: str | None = None
    tokenizer: str | None = None  # a folder; `path` if absent
    # an adapter to put on the model: a folder of PEFT's, a run (what it saved, else its newest
    # state), or a state such as runs/lora/checkpoints/train/step-00000100
    deltas: str | None = None
    # of frozen weights and of compute, and never of what trains
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # auto: the accelerator that torch finds, else the CPU
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    # where frozen blocks lie that the device has no room for: "host", in the host's memory, or
    # "disk", in the model's files; each comes one block ahead, and nothing is computed differently
    offload: offloading.OffloadPlace | None = None
    # variables of the chat template, such as enable_thinking
    chat_template_kwargs: dict[str, Any] = {}


def abstract_state(source: ModelSource, abstract: AbstractState) -> AbstractState:
    """Abstract state with another model; InputError where its folder, tokenizer or device does not
    fit.
    """
    _require_written(source, abstract)
    offloading.refuse_random(source.offload, source.config)
    if source.path in abstract.saved:
        saved = abstract.saved[str(source.path)]
        model, text, template = saved.model, saved.tokenizer, saved.template
    else:
        model, text, template = _checked_model(source), None, None
    if text is None or template is None or source.tokenizer is not None:
        folder = _tokenizer_folder(source)
        text, template = open_text(folder, model.config.vocab_size)
    template = with_options(template._replace(options={}), source.chat_template_kwargs, "[model]")
    _check_device(source)

    # The same shapes on the meta device: stages that follow match names and shapes, and no weight
    # is read.
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    rule, trainable, base = None, {}, None
    if source.deltas is not None and source.deltas not in abstract.saved:
        rule, trainable, base = open_deltas(locate(source.deltas), params)
        check_deltas(params, trainable, source.deltas)
    adapted = frozenset(name for name, leaf in trainable.items() if isinstance(leaf, Delta))
    return AbstractState(
        abstract.data,
        model,
        params,
        adapted,
        lora=rule,
        whole=frozenset(trainable) - adapted,
        offloaded=offloading.frozen_names(source.offload, model.config, trainable),
        trained_over=base.quantization if base is not None else None,
        saved=abstract.saved,
        written=abstract.written,
        tokenizer=text,
        template=template,
    )


def _require_written(source: ModelSource, abstract: AbstractState) -> None:
    """InputError for a path run/... that no stage before writes."""
    for field in ("path", "deltas", "tokenizer"):
        path = getattr(source, field)
        if path is not None and path.startswith("run/") and path not in abstract.saved:
            names = ", ".join(abstract.saved)
            earlier = f"one of {names}" if names else "a save stage before it"
            remedy = nearest(path, [*abstract.saved]) or "; correct it"
            raise InputError(
                f"loading: model {field} {path!r} lies in the run folder, where no earlier stage "
                f"writes it, expected {earlier}{remedy}"
            )


def _checked_model(source: ModelSource) -> Model:
    """Model of a source; InputError unless its folder can be saved again and its tokenizer fits."""
    model = _model(source)
    if source.path is not None:
        end_ids(locate(source.path))
    open_text(_tokenizer_folder(source), model.config.vocab_size)
    return model


def _check_device(source: ModelSource) -> None:
    accelerator = hardware.accelerator()
    if source.device in ("auto", "cpu", accelerator):
        return
    if accelerator is None:
        present, choices = "no accelerator", "'auto' or 'cpu'"
    else:
        present, choices = (
            f"an accelerator of type {accelerator}",
            f"'auto', 'cpu' or '{accelerator}'",
        )
    raise InputError(
        f"loading: [model] device = '{source.device}', but torch finds {present}, expected "
        f"{choices} on this machine; correct it"
    )


def open_pipeline(
    source: ModelSource,
    sources: Mapping[str, Source],
    seed: int,
    folder: Path,
    log: Log,
    stopping: StopSignals,
    records: Mapping[str, dict[str, Any]],
    tf32: bool,
    *,
    tokens_at_once: int | None = None,
    first_rules: Mapping[str, Quantization] = NO_RULES,
    ended: Mapping[str, Ended] = NONE_ENDED,
    sharding: Sharding | None = None,
) -> PipelineState:
    """Load (or draw) the model and its tokenizer: the state before the first stage.

    tokens_at_once, first_rules, ended, sharding: fields of the state.

    tf32: a CUDA device may cut the factors of float32 matrix products to 10 bits of mantissa. It is
    the one setting of torch that minitune makes, and torch has it for a whole process.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    located_data = {name: located(data) for name, data in sources.items()}
    loaded = load(source, folder, seed, first_rules.get(""), log, sharding)
    say_widening(log, "model", loaded.params)
    return PipelineState(
        seed,
        folder,
        log,
        stopping,
        located_data,
        records,
        loaded,
        tokens_at_once=tokens_at_once,
        first_rules=first_rules,
        ended=ended,
        sharding=sharding,
    )


def load(
    source: ModelSource,
    run: Path,
    seed: int,
    first_rule: Quantization | None = None,
    log: Log | None = None,
    sharding: Sharding | None = None,
) -> LoadedModel:
    """Read (or draw) the weights of a model, its tokenizer and its deltas; log shows how far it is.
    With a sharding, each rank reads its part of the weights alone.

    A path run/... lies in the run folder. Weights that first_rule matches are about to be
    quantized: they stay on the disk, as `stored`, and stand in `params` on the meta device. Where
    the folder holds such a weight as NF4 and the rule makes it that, `stored` has those codes.
    """
    device, dtype = device_and_dtype(source)
    model = _model(source, run)
    model = model if sharding is None else sharding.fitted(model)
    path = _unharmed(source.path, run)
    folder = _tokenizer_folder(source, run)
    text, template = open_text(folder, model.config.vocab_size)
    off = offloading.of_model(source.offload, model.config, device, log)
    absent = {n: torch.empty(s, dtype=dtype, device="meta") for n, s in model.shapes().items()}
    waiting = first_rule.plan(absent) if first_rule is not None else {}
    kept = [name for name, scheme in waiting.items() if isinstance(scheme, NF4)]
    cut = cutting(sharding, model.config)
    stored = stored_weights(path, model, kept, seed, cut)
    shown = nullcontext(lambda: None) if log is None else log.counter("loading", len(stored))
    dense = absent.keys() - waiting.keys()
    away = offloading.offloaded(off, stored, dense, path, dtype)
    with shown as count:
        here = placed(stored, dense - away.keys(), cut, device, dtype, count)
    stored, here = unread(stored, here, path, model)
    params = {**absent, **here, **away}
    rule, trainable = None, {}
    if source.deltas is not None:
        rule, trainable = deltas_on(source.deltas, run, path, params, device)
    texts = folder, text, with_options(template, source.chat_template_kwargs, "[model]")
    ends = () if path is None else end_ids(path)
    return LoadedModel(model, params, stored, path, *texts, rule, trainable, ends, off)


def _unharmed(path: str | None, run: Path) -> Path | None:
    """Folder of a model's weights, none of whose files has changed since it was written."""
    if path is None:
        return None
    folder = locate(path, run)
    require_unharmed(folder)
    return folder


def device_and_dtype(source: ModelSource) -> tuple[torch.device, torch.dtype]:
    """(device of a model, dtype of its compute), "auto" decided."""
    device = torch.device(
        (hardware.accelerator() or "cpu") if source.device == "auto" else source.device
    )
    return device, compute_dtype(device) if source.dtype == "auto" else getattr(torch, source.dtype)


def say_widening(log: Log, label: str, leaves: Tree) -> None:
    """Say in one line of the log what becomes of bfloat16 leaves on a device that multiplies no
    bfloat16.
    """
    dense = [x for x in tree.leaves(leaves) if x.dtype == torch.bfloat16 and not x.is_meta]
    device = next(
        (x.device for x in dense if hardware.product_dtype(x.dtype, x.device) != x.dtype), None
    )
    if device is not None:
        log.say(
            f"{label}: this {device.type} multiplies no bfloat16, so weights stay in 16 bits and "
            "are widened a block at a time for float32 products; activations are float32"
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float16 on an accelerator.

    A CPU without bfloat16 computes in float32: it emulates both.
    """
    if hardware.multiplies_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if hardware.is_accelerator(device) else torch.float32


def _model(source: ModelSource, run: Path | None = None) -> Model:
    if (source.path is None) == (source.config is None):
        raise InputError(
            "loading: [model] needs exactly one of path (a Hugging Face folder) and config (a "
            "shape file with random weights)"
        )
    return (
        models_open(locate(source.path, run))
        if source.path is not None
        else open_config(locate(str(source.config)))
    )


def _tokenizer_folder(source: ModelSource, run: Path | None = None) -> Path:
    name = source.tokenizer or source.path
    if name is None:
        raise InputError(
            "loading: [model] has config but no tokenizer, expected the folder that holds the "
            "tokenizer's files"
        )
    return locate(name, run)
