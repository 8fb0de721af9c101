"""Programs of ExecuTorch in its own runtime and in its TextLLMRunner: logits, greedy text, metadata, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitune.__main__ import main
from minitune.checkpoint import FolderExtras, save_folder
from minitune.errors import InputError
from minitune.inference.generate import greedy
from minitune.interop import executorch
from minitune.interop.graphs import quiet
from minitune.interop.readers.executorch import open_executorch
from minitune.io import paths
from minitune.models import FAMILIES, Model, block
from minitune.quant.schemes import NF4, Int4, Int8, Scheme, quantize
from minitune.quant.tensors import QInt4
from minitune.text.tokenizer import open_tokenizer
from minitune.types import Params
from support.experts import WITH_EXPERTS
from support.families import GROWING, config_of, sized
from support.models import SCALINGS, model_of, random_params
from support.pages import execute, file_of, snippets_about
from support.paths import ROOT
from support.quantized import dense, folder_of, int4, int8

pytestmark = pytest.mark.reference
PAGE = ROOT / "docs/export.md"
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order


def saved(tmp_path: Path, params: Params, model: Model, **how: Any) -> Path:
    extras = FolderExtras(folder_of(tmp_path), [3], template="{{ bos_token }}")
    keys = {"bos_id": 1, "activations": "none", "max_context_len": None, **how}
    executorch.save(tmp_path / "program", params, model, extras, **keys)
    return tmp_path / "program/model.pte"


def tokens_of(n: int, vocab_size: int = 17, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(logits: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def program_of(file: Path) -> Any:
    with quiet():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(file)


def prefilled(file: Path, parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits after each part of one text, every part read by one call."""
    forward, start, logits = program_of(file).load_method("forward"), 0, []
    for part in parts:
        logits.append(forward.execute([torch.tensor([part]), torch.tensor([start])])[0].clone())
        start += len(part)
    return logits


def check_program(file: Path, params: Params, model: Model, prompts: Sequence[Sequence[int]], n_new: int) -> None:
    """Logits of every step, of longer parts in every order, and greedy tokens are ours."""
    reader = open_executorch(file)
    text = tokens_of(23)
    wanted = model.forward(params, torch.tensor([text]))[0]
    close(reader.logits(text), wanted)
    parts = [text[:7], text[7:8], text[8:21], text[21:23]]
    close(torch.cat(prefilled(file, parts)), wanted[[6, 7, 20, 22]])
    for prompt in prompts:
        assert reader.greedy(prompt, n_new) == greedy(model, params, [prompt], max_new_tokens=n_new, stop_ids=[])[0]


def text_of_runner(folder: Path, prompt: str, n_new: int) -> tuple[str, int]:
    """Text that ExecuTorch's own runner writes after bos and a prompt, and the tokens that it found in both."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    pieces: list[str] = []
    stats: list[Any] = []
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.model"))
    how = GenerationConfig(echo=False, max_new_tokens=n_new, temperature=0.0, num_bos=1)
    runner.generate(prompt, how, pieces.append, stats.append)
    return "".join(pieces), stats[0].num_prompt_tokens


def metadata_of(file: Path) -> dict[str, Any]:
    """Values of the constant methods of a program."""
    program = program_of(file)
    values = {name: program.load_method(name).execute([]) for name in program.method_names - {"forward"}}
    return {name: value if name == "get_eos_ids" else value[0] for name, value in values.items()}


PROGRAM = """
name = "p"
[model]
path = "model"
dtype = "float32"
[[stage]]
op = "export"
format = "executorch"
max_context_len = 211
[[stage]]
op = "verify"
"""


def test_a_program_runs_in_the_runner_of_executorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One layer with a window and one without, capped scores and logits, tanh gelu, a tied embedding."""
    monkeypatch.chdir(tmp_path)
    config = sized("gemma2", n_layers=2, window=3, attention_cap=2.0, final_cap=3.0, vocab_size=1024, max_positions=301)
    model, params = model_of(config), random_params(config)
    save_folder(Path("model"), params, model, FolderExtras(paths.locate("demo"), [2]))
    Path("p.toml").write_text(PROGRAM, encoding="utf-8")
    assert main(["p.toml"]) == 0
    summary = json.loads(Path("runs/p/summary.json").read_text(encoding="utf-8"))
    figures = summary["verify"]
    assert (figures["format"], figures["bound"], figures["agrees"]) == ("executorch", 1e-4, True)
    assert figures["logits_error"] < TOLERANCE
    assert figures["greedy_equal"] == figures["greedy_tokens"] == 64

    folder, tokenizer = Path("runs/p/executorch"), open_tokenizer(paths.locate("demo"))
    assert metadata_of(folder / "model.pte") == {
        "get_bos_id": 1,
        "get_eos_ids": [6, 2],
        "get_max_seq_len": 128,
        "get_max_context_len": 211,
        "get_vocab_size": 1024,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
        "get_weight_bits": 32,
    }
    assert (folder / "tokenizer.model").read_bytes() == (paths.locate("demo") / "tokenizer.model").read_bytes()
    text = "Nine lamps went to Oslo. " * 10
    check_program(folder / "model.pte", params, model, [[5], tokens_of(150, 1024)], 19)
    ids = [1, *tokenizer.encode(text, parse_special=False)]
    ours = greedy(model, params, [ids], max_new_tokens=11, stop_ids=[6, 2])[0]
    assert 128 < len(ids) < 200  # which the runner reads in two parts
    assert text_of_runner(folder, text, 11) == (decoded_by_runner(ids[-1], ours), len(ids))

    assert main(["verify", str(folder / "model.pte"), "--against", "model", "--max-new-tokens", "3"]) == 0
    assert "executorch, opened by executorch 1.5" in capfd.readouterr().out
    assert main(["verify", str(folder), "--against", "model", "--prompt", text, "--max-new-tokens", "64"]) == 2
    assert "has room for 211 tokens, expected at least" in capfd.readouterr().err


def decoded_by_runner(last: int, ids: Sequence[int]) -> str:
    """Text of ids after a token as the runner makes it, piece by piece, which of random tokens is no text."""
    from pytorch_tokenizers import CppSPTokenizer

    decoder = CppSPTokenizer()
    decoder.load(str(paths.locate("demo") / "tokenizer.model"))
    return "".join(decoder.decode(before, one) for before, one in zip([last, *ids], ids, strict=False))


def test_the_program_of_the_page_runs_with_rounded_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are those of the scheme itself: activations of each token in 8 bits with a zero point, and the scales of 4-bit
    codes in bfloat16, as XNNPACK holds them.
    """
    monkeypatch.chdir(tmp_path)
    config = sized("llama", n_layers=1, d_model=64, d_head=16, d_ff=96, vocab_size=1024, max_positions=128)
    model, plain = model_of(config), random_params(config)
    save_folder(Path("model"), plain, model, FolderExtras(paths.locate("demo"), [2]))
    Path("phone.toml").write_text(file_of(PAGE, "phone.toml"), encoding="utf-8")

    # three of the seven, for XNNPACK takes seconds for each
    schemes: dict[str, Scheme] = {"q_proj": Int4(64), "o_proj": Int8(), "down_proj": Int4(32)}
    words = [
        'quantize.weights=["*.q_proj.weight", "*.o_proj.weight", "*.down_proj.weight"]',
        'quantize.exceptions={"*.q_proj.weight" = {kind="int4", group=64}, "*.o_proj.weight" = {kind="int8"}}',
    ]
    assert main(["phone.toml", "model.path=model", "model.dtype=float32", "export.max_context_len=100", *words]) == 0
    figures = json.loads(Path("runs/phone/summary.json").read_text(encoding="utf-8"))["verify"]
    assert (figures["format"], figures["agrees"]) == ("executorch", True)
    for snippet in snippets_about(PAGE, "phone.toml"):
        execute(snippet, {})
    params: dict[str, Any] = {**plain}
    for part, scheme in schemes.items():
        (name,) = (name for name in plain if part in name)
        params[name] = quantize(plain[name], scheme)
    file = Path("runs/phone/executorch/model.pte")
    assert metadata_of(file)["get_weight_bits"] == 4
    assert metadata_of(file)["get_max_seq_len"] == metadata_of(file)["get_max_context_len"] == 100

    def linear(x: Tensor, w: Any, bias: None = None) -> Tensor:
        if isinstance(w, Tensor):
            return x @ w.T
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        codes = ((x / scale).round() + zero).clamp(-128, 127) - zero
        held = w._replace(scale=w.scale.bfloat16().float()) if isinstance(w, QInt4) else w
        return codes * scale @ dense(held).T

    text = tokens_of(23, 1024)
    rounded = {name: dense(w) for name, w in params.items()}
    unrounded = model.forward(rounded, torch.tensor([text]))[0]
    monkeypatch.setattr(block, "linears", lambda x, weights, _: [linear(x, w) for w in weights])
    wanted = model.forward(params, torch.tensor([text]))[0]
    reader = open_executorch(file)
    close(reader.logits(text), wanted, 1e-5)
    assert (wanted - unrounded).abs().max() > 1e-3 * wanted.abs().max()
    answers = [reader.greedy(text[:n], 3) for n in (1, 11, 22)]
    assert answers == [greedy(model, params, [text[:n]], max_new_tokens=3, stop_ids=[])[0] for n in (1, 11, 22)]


SHOWN: dict[str, dict[str, Any]] = {  # in the two layers of each family, beside what its own defaults say
    "mistral": {"window": 3},
    "qwen2": {"window": 3, "layer_types": ("full", "sliding")},
    "gemma2": {"window": 3, "attention_cap": 2.0, "final_cap": 3.0},
    "gemma3_text": {"window": 3, "layer_types": ("sliding", "full"), "window_rope_theta": 3.0},
    "olmo3": {"window": 3, "layer_types": ("sliding", "full")},
    "smollm3": {"rope_layers": (True, False)},
    "phi3": {"rotary_factor": 0.5},
    "ministral3": {"rope_scaling": GROWING},
    "llama": {"rope_scaling": SCALINGS["llama3"], "tie_embeddings": True},
}


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4_text"])
def test_every_family(name: str, tmp_path: Path) -> None:
    config = config_of(name) if name in WITH_EXPERTS else sized(name, n_layers=2, **SHOWN.get(name, {}))
    model, params = model_of(config), random_params(config)
    check_program(saved(tmp_path, params, model), params, model, [[5], [2, 11, 7, 3, 3, 16]], 9)


def test_what_a_program_can_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sized("llama", n_layers=1, d_model=64)
    model, params = model_of(config), random_params(config)
    name = "model.layers.0.mlp.up_proj.weight"
    w = params[name]
    keys: dict[str, Any] = {"activations": "int8", "max_context_len": None}
    with pytest.raises(InputError, match=f"executorch: {name} is nf4, expected int4 or int8"):
        executorch.check({**params, name: quantize(w, NF4())}, model, **keys)
    for wide, group in ((w, 16), (torch.ones(3, 48), 48)):
        with pytest.raises(InputError, match=f"executorch: {name} has groups of {group}, expected a multiple of 32; write group"):
            executorch.check({**params, name: int4(wide, group)}, model, **keys)
    executorch.check({**params, name: int4(w, 64)}, model, **keys)
    executorch.check({**params, name: int8(torch.ones(3, 13))}, model, **keys)
    with pytest.raises(InputError, match="activations = 'int8' but no weight is quantized, expected int4 or int8 weights"):
        executorch.check(params, model, **keys)
    keys["activations"] = "none"
    with pytest.raises(InputError, match=f"executorch: {name} is quantized and activations are 'none', expected 'int8'"):
        executorch.check({**params, name: int4(w, 32)}, model, **keys)
    for asked in (1, 30):
        with pytest.raises(InputError, match=f"executorch: max_context_len is {asked}, expected 2 to 29, the positions of"):
            executorch.check(params, model, activations="none", max_context_len=asked)
    llama4 = model_of(config_of("llama4_text"))
    with pytest.raises(InputError, match=r"chunks of attention or queries that grow \(Llama 4\), .* export another format"):
        executorch.check(random_params(llama4.config), llama4, activations="none", max_context_len=None)
    monkeypatch.setattr("minitune.interop.graphs.is_installed", lambda name: name != "torchao")
    with pytest.raises(InputError, match=r"the package torchao is not installed, .*pip install 'minitune\[executorch\]'"):
        executorch.check(params, model, activations="none", max_context_len=None)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pte").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="it is no program of ExecuTorch"):
        open_executorch(tmp_path / "noise.pte")
    with quiet():
        from executorch.exir import to_edge

        graph = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),), strict=False)
        (tmp_path / "other.pte").write_bytes(to_edge(graph).to_executorch().buffer)
    with pytest.raises(ValueError, match="it has no method get_max_seq_len, as programs of export stages have"):
        open_executorch(tmp_path / "other.pte")
