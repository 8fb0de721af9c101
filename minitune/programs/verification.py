"""Verification of what was written: opened by an independent reader, compared with minitune, and
recorded beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from minitune import __version__
from minitune.algorithms.objective import apply_trainable
from minitune.errors import InputError
from minitune.interop import artefacts
from minitune.interop.artefacts import ADAPTER_CONFIG, CONFIG, FORMATS, FormatName
from minitune.interop.verify import Figures, OurModel, agreement, our_answers
from minitune.io.json_file import read_json_object
from minitune.io.paths import locate
from minitune.io.results import write_beside
from minitune.programs.loading import ModelSource, load
from minitune.programs.state import LoadedModel
from minitune.quant.schemes import dequantize
from minitune.text.chat import encode_prompt
from minitune.text.template import Template
from minitune.text.tokenizer import Tokenizer
from minitune.types import Params

FILE = "verify.json"
PROMPTS = ("Who are you?", "Write one sentence about the sea.")


class Questions(NamedTuple):
    """Texts that both are asked."""

    prompts: Sequence[str]
    max_new_tokens: int


class Reference(NamedTuple):
    """Model that an artefact is held against, and what turns texts into its tokens."""

    subject: OurModel
    tokenizer: Tokenizer
    template: Template
    same_weights: bool  # as the artefact stores, and not what they were rounded from


def opened(path: str, deltas: str | None, *, same_weights: bool) -> Reference:
    """Model folder as minitune reads it, with an adapter on it."""
    source = ModelSource(path=path, deltas=deltas, dtype="float32", device="cpu")
    loaded = load(source, Path("run"), seed=0)
    params = apply_trainable(loaded.params, loaded.trainable, loaded.lora)
    return _reference(loaded, params, deltas or path, same_weights=same_weights)


def as_stored(loaded: LoadedModel, name: str) -> Reference:
    """Model of a program, its codes decoded; name: what the figures call it."""
    codes = {n: w for n, w in loaded.params.items() if not isinstance(w, Tensor)}
    whole = {n: dequantize(w, torch.float32) for n, w in codes.items()}
    dense = {n: w for n, w in loaded.stored.items() if isinstance(w, Tensor)}
    params = {n: w.detach().to("cpu", torch.float32) for n, w in {**dense, **whole}.items()}
    return _reference(loaded, params, name, same_weights=True)


def base_of_adapter(folder: Path) -> Path:
    """Folder of the base that an adapter names; InputError if it is not on this machine."""
    base = read_json_object(folder / ADAPTER_CONFIG, "verify").get("base_model_name_or_path")
    if isinstance(base, str) and (locate(base) / CONFIG).is_file():
        return locate(base)
    raise InputError(
        f"verify: {folder} is an adapter on {base}, no folder here, expected its base; download it "
        "to that place"
    )


def _reference(loaded: LoadedModel, params: Params, name: str, *, same_weights: bool) -> Reference:
    subject = OurModel(loaded.model, params, name)
    return Reference(subject, loaded.tokenizer, loaded.template, same_weights)


def verify(
    path: Path, name: FormatName, reference: Reference, asked: Questions, base: Path | None = None
) -> Figures:
    """Figures of an artefact, which disagrees if `agrees` is False; base: the folder below an
    adapter.

    InputError for a file that the reader can't open.
    """
    prompts = [_encoded(text, reference) for text in asked.prompts]
    room = reference.subject.model.config.max_positions - max(map(len, prompts))
    n_new = min(asked.max_new_tokens, room)
    if n_new < 1:
        limit = reference.subject.model.config.max_positions
        raise InputError(
            f"verify: the longest prompt leaves no room for an answer in {limit} tokens, expected "
            "shorter ones; give another prompt"
        )
    answers, logits = our_answers(reference.subject, prompts, n_new)
    try:
        reader = artefacts.open_reader(path, name, base)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        packages = ", ".join(FORMATS[name].packages)
        raise InputError(
            f"verify: {packages} can't open {path} ({reason}), expected a reader that knows this "
            "model; save it in another format"
        ) from None
    return Figures(
        artefact=str(path),
        format=name,
        reader=reader.described,
        against=reference.subject.name,
        minitune=__version__,
        bound=artefacts.bound(path, name, same_weights=reference.same_weights),
        agreement=agreement(reader, prompts, answers, logits),
    )


def write_figures(path: Path, figures: Figures) -> Path:
    """File with the figures: verify.json in a folder, NAME.verify.json beside a file."""
    text = msgspec.json.format(msgspec.json.encode(as_record(figures)), indent=2) + b"\n"
    return write_beside(path, FILE, text)


def as_record(figures: Figures) -> dict[str, Any]:
    """Figures by name, in one table."""
    record: dict[str, Any] = msgspec.to_builtins(figures)
    return {**record.pop("agreement"), **record, "agrees": figures.agrees}


def require_agreement(figures: Figures) -> None:
    """InputError if an artefact differs from minitune by more than its format allows."""
    if figures.agrees:
        return
    measured = figures.agreement
    if measured.logits_error > figures.bound:
        found = f"logits differ by {measured.logits_error:.2e} of the largest"
    else:
        found = f"greedy text differs where our token leads by {measured.greedy_margin:.2e}"
    raise InputError(
        f"verify: {figures.artefact} is not what minitune computes: {found}, expected at most "
        f"{figures.bound:.0e} of {figures.format}; is {figures.against} the model that it was "
        "made of? Else report it with the file of figures"
    )


def _encoded(text: str, reference: Reference) -> list[int]:
    """Tokens of a prompt: as a message where the template takes one, else as they are."""
    message = {"role": "user", "content": text}
    try:
        return list(encode_prompt(reference.tokenizer, reference.template, [message]))
    except InputError:
        return reference.tokenizer.encode(text, parse_special=False)
