"""The value that flows through the stages of a program, and how the first one comes to be."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from minitune import chat, checkpoint, data, models, paths, tokenizer
from minitune.interop import peft
from minitune.log import Log
from minitune.lora import Lora, check_deltas
from minitune.paths import locate
from minitune.types import InputError, Params, Trainable


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop and its state is on disk
    """SIGTERM or SIGINT arrived and the state of `step` was saved in `folder`."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped at step {step}, saved in {folder}")
        self.step, self.folder = step, folder


class ModelSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the model comes from: a Hugging Face folder, or a shape with random weights and a tokenizer folder."""

    path: str | None = None
    config: str | None = None
    tokenizer: str | None = None  # a folder; `path` if absent
    deltas: str | None = None  # a folder with a PEFT adapter to put on the model
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of frozen weights and of compute: as stored on a GPU, float32 on a CPU
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"


class World(NamedTuple):
    """What flows through the stages of a program."""

    seed: int
    folder: Path  # the run folder, runs/<name>
    log: Log
    stopping: Callable[[], bool]  # True once SIGTERM or SIGINT has been seen
    data: Mapping[str, data.Source]
    records: Mapping[str, dict[str, Any]]  # by stage name: what summary.json is made of
    model: models.Model
    params: Params
    stored: torch.dtype  # of the weights on disk, which is what a save goes back to
    source: Path | None  # the Hugging Face folder that the weights came from
    tokenizer_folder: Path
    tokenizer: tokenizer.Tokenizer
    template: chat.Template
    lora: Lora | None
    trainable: Trainable

    def record(self, label: str, values: dict[str, Any]) -> "World":
        """This world with one more stage's record."""
        return self._replace(records={**self.records, label: values})


def check(source: ModelSource, sources: Mapping[str, data.Source], stages: Sequence[Any]) -> list[str]:
    """Lines that say what a program would work on; InputError for whatever would stop it later. Reads no weight."""
    model = _model(source)
    if source.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "world: [model] device = 'cuda', but torch finds no CUDA device; expected 'auto' or 'cpu' on this machine"
        )
    text = tokenizer.open_tokenizer(_tokenizer_folder(source))
    template = chat.open_template(_tokenizer_folder(source), text)
    n_params = sum(torch.Size(shape).numel() for shape in model.shapes().values())
    if text.vocab_size > model.config.vocab_size:
        raise InputError(
            f"world: the tokenizer in {_tokenizer_folder(source)} has {text.vocab_size} tokens, more than the model's "
            f"{model.config.vocab_size}; are they of two models?"
        )
    lines = [f"model: {n_params:,} parameters, vocabulary {model.config.vocab_size:,}, template: {template.origin}"]
    for name, one in sources.items():
        next(iter(data.read_rows(Path(locate(one.path)))))
        lines.append(f"data: {name} is {locate(one.path)}")
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    for stage in stages:
        asked = getattr(stage, "data", None)
        if asked is not None and asked not in sources:
            near = get_close_matches(asked, sources, n=1, cutoff=0.0) or ["no [data] at all"]
            raise InputError(
                f"world: stage {stage.label} asks for data {asked!r}, expected a [data] table; did you mean {near[0]!r}?"
            )
        stage.check(params)
        lines.append(f"stage: {stage.label}")
    return lines


def open_world(
    source: ModelSource,
    sources: Mapping[str, data.Source],
    seed: int,
    folder: Path,
    log: Log,
    stopping: Callable[[], bool],
    records: Mapping[str, dict[str, Any]],
) -> World:
    """Load (or draw) the model and its tokenizer: the world before the first stage."""
    model = _model(source)
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu") if source.device == "auto" else torch.device(source.device)
    )
    path = locate(source.path) if source.path is not None else None
    located = {name: msgspec.structs.replace(one, path=str(locate(one.path))) for name, one in sources.items()}
    text = tokenizer.open_tokenizer(_tokenizer_folder(source))
    template = chat.open_template(_tokenizer_folder(source), text)
    for one in located.values():  # every line is read before a weight is: a bad one costs seconds, not a run
        data.prepare(one, text, template, paths.cache())
    raw = checkpoint.load_params(path, model.shapes()) if path is not None else model.init(seed)
    stored = next(iter(raw.values())).dtype
    dtype = (torch.float32 if device.type == "cpu" else stored) if source.dtype == "auto" else getattr(torch, source.dtype)
    params = {name: w.to(device, dtype) for name, w in raw.items()}
    rule, deltas = None, {}
    if source.deltas is not None:
        rule, loaded = peft.load(locate(source.deltas))
        check_deltas(params, loaded, source.deltas)
        deltas = {name: type(delta)(delta.a.to(device), delta.b.to(device)) for name, delta in loaded.items()}
    return World(
        seed=seed,
        folder=folder,
        log=log,
        stopping=stopping,
        data=located,
        records=records,
        model=model,
        params=params,
        stored=stored,
        source=path,
        tokenizer_folder=_tokenizer_folder(source),
        tokenizer=text,
        template=template,
        lora=rule,
        trainable=deltas,
    )


def _model(source: ModelSource) -> models.Model:
    if (source.path is None) == (source.config is None):
        raise InputError(
            "world: [model] needs exactly one of path (a Hugging Face folder) and config (a shape file with random weights)"
        )
    return models.open(locate(source.path)) if source.path is not None else models.open_config(locate(str(source.config)))


def _tokenizer_folder(source: ModelSource) -> Path:
    name = source.tokenizer or source.path
    if name is None:
        raise InputError("world: [model] has config but no tokenizer, expected the folder that holds the tokenizer's files")
    return locate(name)
