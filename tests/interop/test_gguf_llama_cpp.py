"""GGUF files in llama.cpp itself, by the package llama_cpp where it is installed: pytest -m soak tests/interop."""

import ctypes
import json
from itertools import islice
from pathlib import Path
from unittest import mock

import gguf
import pytest
import torch

from minitune.checkpoint.hf_folder import load
from minitune.interop.gguf import blocks, export, k_quants
from minitune.interop.gguf.architectures import ARCHITECTURES
from minitune.io.paths import locate
from minitune.models import rope_scaling
from minitune.models.config import DecoderConfig
from minitune.text.tokenizer import open_tokenizer
from support.families import sized
from support.gguf_tokenizers import CUTS, TEXTS, byte_level_folder, sentencepiece_folder, sentencepiece_json_folder
from support.models import DENSE, SCALINGS, YARNS, model_of, random_params
from support.served import largest_gap

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.soak

SQUARE = {
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_model": 64,
    "d_head": 16,
    "d_ff": 96,
    "vocab_size": 67,
    "max_positions": 40,
}
YARN, LONG = rope_scaling.Yarn(4.0, 13), rope_scaling.LongRope((1.0, 1.5, 2.0, 1.0) * 2, (3.0, 2.0, 1.5, 1.0) * 2, 13)
OWN = {"olmo3": {"window_rope_theta": 30.0}}  # its base is that of all layers, as llama.cpp has it
MODELS = {  # name -> (family, fields)
    **{name: (name, OWN.get(name, {})) for name in DENSE if name in ARCHITECTURES},
    **{
        f"wide heads of {name}": (name, {"d_head": 32})
        for name in ("llama", "mistral", "qwen3", "gemma", "gemma3_text", "granite")
    },
    **{f"window of {name}": (name, {"window": 5, **OWN.get(name, {})}) for name in ("gemma2", "gemma3_text", "olmo3")},
    **{
        f"scores of 27 B, {name}": (name, {"n_layers": n, "d_head": 8, "attention_scale": 16**-0.5})
        for name, n in (("gemma2", 46), ("gemma3_text", 62))
    },
    **{
        f"{kind} on {name}": (name, {"rope_scaling": SCALINGS[kind]})
        for name in ("llama", "granite")
        for kind in ("linear", "llama3")
    },
    **{
        f"linear on {name}": (name, {"rope_scaling": SCALINGS["linear"]})
        for name in ("qwen3", "gemma2", "gemma3_text", "smollm3")
    },
    **{
        f"yarn on {name}": (name, {"rope_scaling": YARN, **OWN.get(name, {})})
        for name in ("llama", "qwen2", "qwen3", "mistral", "olmo3", "granite", "smollm3")
    },
    "yarn with a magnitude": ("qwen2", {"rope_scaling": YARNS[3]}),
    "yarn with mscale": ("llama", {"rope_scaling": YARNS[2]}),
    "growing queries": (
        "ministral3",
        {"rope_scaling": rope_scaling.Yarn(4.0, 13, None, 16.0, 2.0, 1.0, 1.0, llama_4_scaling_beta=0.7)},
    ),
    "longrope on phi3": ("phi3", {"rope_scaling": LONG}),
    "longrope on llama": ("llama", {"rope_scaling": LONG}),
    "part of each head": ("phi3", {"rotary_factor": 0.5}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "biases of granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "multipliers": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_scale": 0.1, "logit_divisor": 5.0},
    ),
    "tied": ("llama", {"tie_embeddings": True}),
    "untied": ("gemma3_text", {"tie_embeddings": False}),
    "capped": ("gemma3_text", {"final_cap": 4.0}),
}


CACHE = {"type_k": 0, "type_v": 0}  # float32
AS_IN_THE_FILE = dict.fromkeys(["yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"], -1.0)
# llama.cpp looks the tanh form of gelu up in float16: a thousandth a layer.
GELU = {"gemma": 5e-3, "gemma2": 5e-3, "gemma3_text": 5e-3, "scores of 27 B, gemma2": 2e-2}


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits of llama.cpp for a text in ids."""
    sizes = {"n_ctx": len(ids), "n_batch": len(ids), "n_threads": 1}
    engine = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **sizes, **CACHE, **AS_IN_THE_FILE)
    engine.eval(ids)
    return torch.from_numpy(engine.scores[: len(ids)].copy())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    family, fields = MODELS[name]
    config = sized(family, **{**SQUARE, **fields})
    model, params = model_of(config), random_params(config)
    no_tokenizer = ({"tokenizer.ggml.model": "none"}, [])
    with mock.patch.object(export.gguf_vocabulary, "metadata", return_value=no_tokenizer):
        export.save(tmp_path / "x.gguf", params, model, export.Types("F32"), tokenizer=tmp_path, template=None, stop_ids=[])
    ids = torch.randint(0, 67, (1, 23), generator=torch.Generator().manual_seed(1))
    wanted = model.forward(params, ids)[0]
    share = GELU.get(name, GELU.get(family, 2e-4))
    torch.testing.assert_close(
        logits(tmp_path / "x.gguf", ids[0].tolist()), wanted, rtol=0, atol=share * float(wanted.abs().max())
    )


@pytest.mark.parametrize("name", [*CUTS, "sentencepiece", "sentencepiece in tokenizer.json"])
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    if name in CUTS:
        folder = byte_level_folder(tmp_path, *CUTS[name])
    else:
        folder = (sentencepiece_folder if name == "sentencepiece" else sentencepiece_json_folder)(tmp_path)
    ours = open_tokenizer(folder)
    model = model_of(sized("llama", **{**SQUARE, "n_layers": 1, "vocab_size": ours.vocab_size}))
    path = tmp_path / "x.gguf"
    notes = export.save(path, model.init(0), model, export.Types("F32"), tokenizer=folder, template=None, stop_ids=[])
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    # Behind a prefix, transformers 5 writes no second space where llama.cpp does.
    texts = TEXTS if name in CUTS else [text.lstrip() for text in TEXTS]
    if any("in front of text behind a special token" in note for note in notes):
        texts = [text for text in texts if "<|" not in text]
    assert len(texts) >= len(TEXTS) - 1
    for text in texts:
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text, parse_special=True), text


PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
PARTS |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}


def read_back(path: Path, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of a file as the gguf package dequantizes them, by their Hugging Face names."""
    found = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        parts = tensor.name.split(".")
        name = f"model.layers.{parts[1]}.{PARTS.get(parts[2])}.weight" if parts[0] == "blk" else ENDS.get(tensor.name)
        if name in params:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[name] = torch.from_numpy(values.copy()).view(params[name].shape)
    return found


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q4_K_M"])
def test_quantized_weights_are_those_that_llama_cpp_reads(kind: str, tmp_path: Path) -> None:
    """Its products round activations to 8 bits, so that only the first digits can agree."""
    config = sized("qwen3", **{**SQUARE, "d_model": 256, "d_head": 64, "d_ff": 512, "vocab_size": 256})
    model = model_of(config)
    params = {name: w if w.ndim == 1 else 0.1 * w for name, w in random_params(config).items()}
    no_tokenizer = ({"tokenizer.ggml.model": "none"}, [])
    with mock.patch.object(export.gguf_vocabulary, "metadata", return_value=no_tokenizer):
        export.save(tmp_path / "x.gguf", params, model, export.Types(kind), tokenizer=tmp_path, template=None, stop_ids=[])
    stands_for = read_back(tmp_path / "x.gguf", params)
    assert stands_for.keys() == {name for name, w in params.items() if w.ndim == 2}
    ids = torch.randint(0, 67, (1, 23), generator=torch.Generator().manual_seed(1))
    theirs = logits(tmp_path / "x.gguf", ids[0].tolist())
    ours, dense = (model.forward({**params, **weights}, ids)[0] for weights in (stands_for, {}))
    distance, lost = float((theirs - ours).norm() / ours.norm()), float((dense - ours).norm() / ours.norm())
    assert distance < 0.03
    if kind.startswith("Q4"):
        assert 3 * distance < lost


def quantized_by_llama_cpp(w: torch.Tensor, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
    """Rows as the library that llama.cpp computes with quantizes them."""
    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    block = blocks.TYPES[kind]
    encoded = torch.empty(w.shape[0], w.shape[1] // block.size * block.n_bytes, dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    ggml.ggml_quantize_chunk(block.id, w.data_ptr(), encoded.data_ptr(), 0, *w.shape, weights)
    return encoded


SHAPES = {
    "normal": lambda x: x,
    "columns of different sizes": lambda x: x * torch.exp(0.7 * x[:1].sin()),
    "heavy tails": lambda x: x * x.abs(),
    "shifted": lambda x: x + 1.5,
}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_types_lose_no_more_than_those_of_llama_cpp(kind: str, shape: str, weighed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w = SHAPES[shape](torch.randn(64, 1024, generator=generator)).contiguous()
    importance = torch.exp(1.5 * torch.randn(1024, generator=generator)) if weighed else None
    rows = None if importance is None else importance.repeat(64).view(-1, 256)
    weights = (k_quants.slope_weights if kind == "Q6_K" else k_quants.line_weights)(w.view(-1, 256), rows).view(w.shape)
    encoded = blocks.encode(w, kind, importance), quantized_by_llama_cpp(w, kind, importance)
    values = [gguf.quants.dequantize(x.numpy(), gguf.GGMLQuantizationType[kind]) for x in encoded]
    ours, theirs = (float((weights * (torch.from_numpy(value) - w).square()).sum()) for value in values)
    assert ours < 1.02 * theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixture", ["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_mixtures_are_those_that_llama_cpp_quantizes_to(family: str, mixture: str, tied: bool, tmp_path: Path) -> None:
    """Of each tensor the type, and the number of the file's."""
    sizes = {"n_layers": 11, "d_model": 256, "d_head": 64, "d_ff": 352, "vocab_size": 96, "tie_embeddings": tied}
    model = model_of(sized(family, **{**SQUARE, **sizes}))
    params = random_params(model.config)
    no_tokenizer = ({"tokenizer.ggml.model": "none"}, [])
    with mock.patch.object(export.gguf_vocabulary, "metadata", return_value=no_tokenizer):
        for kind in ("F32", mixture):
            path = tmp_path / f"{kind}.gguf"
            export.save(path, params, model, export.Types(kind), tokenizer=tmp_path, template=None, stop_ids=[])
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = export.Types(mixture).file_type, 1
    files = [tmp_path / f"{name}.gguf" for name in ("F32", "theirs", mixture)]
    assert llama_cpp.llama_model_quantize(str(files[0]).encode(), str(files[1]).encode(), ctypes.byref(options)) == 0
    theirs, ours = (gguf.GGUFReader(file) for file in files[1:])
    kinds = [{t.name: t.tensor_type.name for t in file.tensors} for file in (ours, theirs)]
    assert kinds[0] == kinds[1]
    numbers = [file.fields["general.file_type"].contents() for file in (ours, theirs)]
    assert numbers[0] == numbers[1]


def in_halves(weights: dict[str, torch.Tensor], config: DecoderConfig) -> dict[str, torch.Tensor]:
    """Weights of a Llama whose q and k have their rows as Hugging Face has them, and not as llama.cpp."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}

    def rows(name: str, w: torch.Tensor) -> torch.Tensor:
        n = heads.get(name.split(".")[-2])
        return w if n is None else w.view(n, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    return {name: rows(name, w) for name, w in weights.items()}


@pytest.mark.parametrize(
    ("kind", "gap"), [("F32", 0.0), ("F16", 0.0), ("Q8_0", 0.2), ("Q6_K", 0.2), ("Q5_K_M", 0.2), ("Q4_K_M", 0.2)]
)
def test_the_demo_answers_as_it_does_here(kind: str, gap: float, tmp_path: Path) -> None:
    """Greedy, from the text of a prompt: tokenizer, file and weights together; here with the weights that the file holds."""
    folder = locate("demo")
    (model, params), tokenizer = load("demo"), open_tokenizer(folder)
    export.save(tmp_path / "x.gguf", params, model, export.Types(kind), tokenizer=folder, template=None, stop_ids=[])
    params = {**params, **in_halves(read_back(tmp_path / "x.gguf", params), model.config)}
    engine = llama_cpp.Llama(str(tmp_path / "x.gguf"), verbose=False, n_ctx=512, n_threads=1, **CACHE)
    for row in map(json.loads, locate("demo/orders-heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]):
        text = f"{row['instruction']}\n{row['input']}"
        prompt = engine.tokenize(text.encode(), add_bos=True, special=True)
        encoded = tokenizer.encode(text, parse_special=True)
        assert prompt[-len(encoded) :] == encoded
        answer = [*islice(engine.generate(prompt, temp=0.0, repeat_penalty=1.0), 24)]
        # llama.cpp rounds activations to 8 bits where weights have 8 bits or fewer
        assert largest_gap(model, params, prompt, answer) <= gap
