"""Mixtures of K types in GGUF files, and the importance of columns that their errors are weighed by."""

from pathlib import Path
from typing import Any
from unittest import mock

import gguf as reference
import pytest
import torch
from torch import Tensor

from minitune.algorithms.importance import column_importance
from minitune.errors import InputError
from minitune.interop.gguf import blocks, export
from minitune.interop.gguf.architectures import architecture
from minitune.interop.gguf.export import Types
from minitune.models import Model
from minitune.types import Batch
from support.families import sized
from support.models import model_of, random_batch, random_params
from support.models import reference as in_transformers

SIZES = {"n_layers": 16, "n_heads": 4, "n_kv_heads": 2, "d_model": 256, "d_head": 64, "d_ff": 512, "vocab_size": 67}


def saved(path: Path, model: Model, types: Types, **options: Any) -> dict[str, Any]:
    """Tensors of the file by name, and its file type under that name."""
    no_tokenizer = ({"tokenizer.ggml.model": "none"}, [])
    params = options.pop("params", None) or random_params(model.config)
    with mock.patch.object(export.gguf_vocabulary, "metadata", return_value=no_tokenizer):
        export.save(path, params, model, types, tokenizer=path.parent, template=None, stop_ids=[], **options)
    reader = reference.GGUFReader(path)
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    return tensors | {"general.file_type": reader.fields["general.file_type"].contents()}


MORE = {0, 1, 4, 7, 10, 13, 14, 15}  # of 16 layers: the first and last two, and every third between them


@pytest.mark.parametrize(
    ("mixture", "number", "most", "values", "downs"),
    [
        ("Q4_K_S", 14, "Q4_K", dict.fromkeys(range(4), "Q5_K"), dict.fromkeys(range(2), "Q5_K")),
        ("Q4_K_M", 15, "Q4_K", dict.fromkeys(MORE, "Q6_K"), dict.fromkeys(MORE, "Q6_K")),
        ("Q5_K_S", 16, "Q5_K", {}, {}),
        ("Q5_K_M", 17, "Q5_K", dict.fromkeys(MORE, "Q6_K"), dict.fromkeys(MORE, "Q6_K")),
        ("Q6_K", 18, "Q6_K", {}, {}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_mixtures_are_those_of_llama_cpp(
    mixture: Any, number: int, most: str, values: dict[int, str], downs: dict[int, str], tied: bool
) -> None:
    model = model_of(sized("llama", **SIZES, tie_embeddings=tied))
    arch, _ = architecture(model)
    types = Types(mixture)
    assert types.file_type == number
    for name in model.shapes():
        if name.endswith("norm.weight"):
            continue
        parts = name.split(".")
        wanted = most
        if parts[-2] == "v_proj":
            wanted = values.get(int(parts[2]), most)
        if parts[-2] == "down_proj":
            wanted = downs.get(int(parts[2]), most)
        if parts[-2] == ("embed_tokens" if tied else "lm_head"):
            wanted = "Q6_K"
        assert types.kind(name, model.config, arch) == wanted, name


def test_exceptions_stand_above_a_mixture_and_rows_that_do_not_fit_below_it(tmp_path: Path) -> None:
    model = model_of(sized("qwen3", **{**SIZES, "n_layers": 2, "d_ff": 96}))
    types = Types("Q5_K_M", {"*.0.self_attn.v_proj.weight": "F16", "lm_head.weight": "Q8_0"})
    tensors = saved(tmp_path / "x.gguf", model, types)
    assert tensors.pop("general.file_type") == 17
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items() if len(tensor.shape) == 2}
    usual = {f"attn_{part}": "Q5_K" for part in ("q", "k", "output")} | {"ffn_gate": "Q5_K", "ffn_up": "Q5_K"}
    assert kinds == {
        "token_embd.weight": "Q5_K",
        "output.weight": "Q8_0",
        **{f"blk.{i}.{name}.weight": kind for i in range(2) for name, kind in usual.items()},
        "blk.0.attn_v.weight": "F16",
        "blk.1.attn_v.weight": "Q6_K",
        **{f"blk.{i}.ffn_down.weight": kind for i, kind in enumerate(("Q5_1", "Q8_0"))},
    }


def test_a_70b_of_llama_keeps_more_bits_of_the_values() -> None:
    for family, layers, heads, kind in (("llama", 80, 2, "Q5_K"), ("llama", 80, 4, "Q4_K"), ("qwen3", 80, 2, "Q4_K")):
        model = model_of(sized(family, **{**SIZES, "n_layers": layers, "n_kv_heads": heads}))
        name = "model.layers.11.self_attn.v_proj.weight"
        assert Types("Q4_K_M").kind(name, model.config, architecture(model)[0]) == kind


def test_importance_is_the_mean_square_of_what_each_linear_layer_of_transformers_is_given() -> None:
    config = sized("qwen3", **{**SIZES, "n_layers": 2, "d_model": 48, "d_ff": 40})
    params, model = random_params(config), model_of(config)
    theirs, seen = in_transformers(config, params), dict[str, list[Tensor]]()
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: seen.setdefault(f"{name}.weight", []).append(x[0]))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 67, shape, generator=generator) for shape in ((2, 9), (1, 13))]
    batches = [Batch(x, torch.ones_like(x), torch.ones_like(x).bool()) for x in tokens]
    with torch.no_grad():
        for batch in batches:
            theirs(batch.tokens)
    ours = column_importance(model, params, batches)
    assert ours.keys() == seen.keys()
    for name, inputs in seen.items():
        rows = torch.cat([x.flatten(0, 1) for x in inputs])
        assert len(rows) == 31
        torch.testing.assert_close(ours[name], rows.square().mean(0), rtol=1e-4, atol=1e-6)


def test_padding_has_no_importance_and_no_column_is_without_any() -> None:
    config = sized("llama", **{**SIZES, "n_layers": 1, "d_model": 48, "d_ff": 40, "tie_embeddings": True})
    params, model = random_params(config), model_of(config)
    batch = random_batch(config, 2, 9)
    padded = batch._replace(
        **{name: torch.nn.functional.pad(getattr(batch, name), (0, 5)) for name in ("tokens", "segment_ids", "loss_mask")}
    )
    ours, wanted = (column_importance(model, params, [one]) for one in (padded, batch))
    assert "model.embed_tokens.weight" not in ours
    for name, importance in wanted.items():
        torch.testing.assert_close(ours[name], importance, rtol=1e-5, atol=0)
    down = "model.layers.0.mlp.down_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    dead = {**params, up: torch.cat([torch.zeros(3, 48), params[up][3:]])}
    importance = column_importance(model, dead, [batch])[down]
    torch.testing.assert_close(importance[:3], torch.full((3,), 1e-6 * float(importance.mean())), rtol=1e-3, atol=0)
    none = column_importance(model, {**params, up: torch.zeros(40, 48)}, [batch])[down]
    assert torch.equal(none, torch.ones(40))
    with pytest.raises(InputError, match="importance: no row of data to calibrate on, expected at least one"):
        column_importance(model, params, [])


def test_a_file_weighs_errors_by_the_importance_of_its_columns(tmp_path: Path) -> None:
    model = model_of(sized("llama", **{**SIZES, "n_layers": 1, "vocab_size": 16}))
    params = random_params(model.config)
    importance = {name: torch.rand(w.shape[1]) for name, w in params.items() if "proj" in name}
    tensors = saved(tmp_path / "x.gguf", model, Types("Q5_K"), params=params, importance=importance)
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_output", "self_attn.o_proj")):
        name = f"model.layers.0.{ours}.weight"
        wanted, plain = (blocks.encode(params[name], "Q5_K", one) for one in (importance[name], None))
        stored = torch.from_numpy(tensors[f"blk.0.{theirs}.weight"].data.copy())
        assert torch.equal(stored, wanted)
        assert not torch.equal(stored, plain)
