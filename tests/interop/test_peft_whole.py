"""Adapters of PEFT that reach embedding and head, or the base itself: each opens as in PEFT, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from minitune.algorithms.objective import apply_trainable
from minitune.errors import InputError
from minitune.interop.peft.load import load_adapter
from minitune.lora import check_deltas
from minitune.types import Delta
from support.closeness import distance
from support.families import sized
from support.models import model_of, random_batch, random_params, reference

ATOL = 1e-5  # of the largest logit
WARNED = ("Model has `tie_word_embeddings=True`", "Could not find a config file", "Setting `save_embedding_layers`")
pytestmark = pytest.mark.filterwarnings(*(f"ignore:{text}" for text in (*WARNED, "PiSSA changes", "OLoRA changes")))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def moved(model: Any) -> Any:
    """The model with all that trains moved away from where it began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in (x for x in model.parameters() if x.requires_grad):
            x += 0.3 * torch.randn(x.shape, generator=generator)
    return model.eval()


def saved(
    folder: Path, tied: bool = False, save: dict[str, Any] | None = None, **fields: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and weights of a base, on which PEFT has saved an adapter."""
    config = sized("llama", tie_embeddings=tied)
    params = random_params(config)
    fields = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    moved(get_peft_model(reference(config, params), LoraConfig(**fields))).save_pretrained(folder, **(save or {}))
    return config, params


def compare(config: Any, params: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Trainable of an adapter, after its logits were found equal to PEFT's and unlike the base's."""
    tokens = random_batch(config, 2, 13).tokens
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(reference(config, params), folder).eval()(tokens).logits
    rule, trainable, _ = load_adapter(folder, names=params)
    check_deltas(params, trainable, "here")
    model = model_of(config)
    assert distance(model.forward(apply_trainable(params, trainable, rule), tokens), wanted) <= ATOL
    assert distance(model.forward(params, tokens), wanted) > 1000 * ATOL
    return trainable


OPENED: dict[str, dict[str, Any]] = {
    "a delta on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a DoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "copies of both ends": {"save": {"save_embedding_layers": True}},
    "copies of tied ends": {"save": {"save_embedding_layers": True}, "tied": True},
    "rsLoRA with the head whole": {"modules_to_save": ["lm_head"], "use_rslora": True},
    "modules that hold modules": {"modules_to_save": ["mlp"]},
}  # fmt: skip


@pytest.mark.parametrize("name", OPENED)
def test_an_adapter_that_reaches_the_ends_is_read(name: str, tmp_path: Path) -> None:
    config, params = saved(tmp_path, **OPENED[name])
    trainable = compare(config, params, tmp_path)
    whole = {n for n, leaf in trainable.items() if not isinstance(leaf, Delta)}
    expected = {"rsLoRA with the head whole": {HEAD}, "modules that hold modules": {n for n in params if ".mlp." in n}}
    assert whole == expected.get(name, set())


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_that_is_not_the_bases_takes_its_place(tied: bool, tmp_path: Path) -> None:
    config, params = saved(tmp_path, tied=tied, save={"save_embedding_layers": True})
    path = tmp_path / "adapter_model.safetensors"
    ends = [f"base_model.model.{name}" for name in (EMBEDDING, HEAD)]
    changed = {n: w + 0.5 if n in ends else w for n, w in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    trainable = compare(config, params, tmp_path)
    whole = {n for n, leaf in trainable.items() if not isinstance(leaf, Delta)}
    assert whole == {EMBEDDING, *([] if tied else [HEAD])}


def test_a_copy_beneath_a_delta_or_of_another_size_is_refused(tmp_path: Path) -> None:
    _, params = saved(tmp_path, target_modules=["q_proj", "lm_head"])
    path, key = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    save_file({**tensors, key: tensors[key] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds lm_head.weight beside a delta on it, expected the base's own weight there"):
        load_adapter(tmp_path, names=params)
    save_file({**tensors, key: tensors[key][1:].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds lm_head.weight \[\d+, \d+\], expected .* its vocabulary was resized; merge it"):
        load_adapter(tmp_path, names=params)


BOTH = r"apart from the .*, which this model ties to it; expected one .*; merge it with PEFT, set tie_word_embeddings = false in"
PARTED = {
    "both ends whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, f"trains {EMBEDDING} {BOTH}"),
    "the head whole": ({"modules_to_save": ["lm_head"]}, f"trains {HEAD} {BOTH}"),
    "a delta on the head": ({"target_modules": ["q_proj", "lm_head"]}, f"trains {HEAD} {BOTH}"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTED)
def test_ends_that_the_model_ties_are_not_parted(name: str, tmp_path: Path) -> None:
    fields, message = PARTED[name]
    _, params = saved(tmp_path, tied=True, **fields)
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path, names=params)


def test_a_delta_on_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    _, params = saved(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match=r"embed_tokens\.lora_embedding_A, a delta on the embedding, expected it trained"):
        load_adapter(tmp_path, names=params)


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_read_once_it_is_converted(way: str, tmp_path: Path) -> None:
    config = sized("llama")
    params = random_params(config)
    model = get_peft_model(reference(config, params), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=way))
    model.save_pretrained(tmp_path / "initial")
    moved(model).save_pretrained(tmp_path / "changed")
    with pytest.raises(InputError, match=rf"init_lora_weights = '{way}', which changes the weights of the base, expected .*"):
        load_adapter(tmp_path / "changed", names=params)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    compare(config, params, tmp_path / "converted")


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    _, params = saved(tmp_path, save={"safe_serialization": False})
    assert (tmp_path / "adapter_model.bin").is_file()
    with pytest.raises(InputError, match=r"holds adapter_model.bin, which is pickled and not read, expected .*; convert it"):
        load_adapter(tmp_path, names=params)
