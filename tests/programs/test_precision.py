"""In what precision a model computes: by the device, by the program, and by torch's one setting."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitune import checkpoint, hardware, tree
from minitune.__main__ import main
from minitune.programs.loading import ModelSource, compute_dtype, load
from support.programs import toy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    has: dict[str, bool],
    dtype: torch.dtype,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in hardware.LIMITED_TO_AVX2:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert compute_dtype(CPU) == dtype
    auto = load(ModelSource(path=str(tiny / "model"), device="cpu"), tmp_path, 0)
    assert {w.dtype for w in auto.params.values()} == {dtype}
    assert {w.dtype for w in auto.stored.values()} == {torch.float32}
    named = load(ModelSource(path=str(tiny / "model"), device="cpu", dtype="float32"), tmp_path, 0)
    assert {w.dtype for w in named.params.values()} == {torch.float32}


@pytest.mark.parametrize(("major", "dtype"), [(8, torch.bfloat16), (7, torch.float16)])
def test_auto_on_cuda_asks_for_bfloat16_in_hardware(major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8 or including_emulation)
    assert compute_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize("name", ["lora", "full"])
def test_what_trains_is_float32_beside_bfloat16_compute(name: str, tiny: Path, tmp_path: Path) -> None:
    assert main([name, *toy(name, tiny, tmp_path), "model.dtype=bfloat16"]) == 0
    state = checkpoint.load_tensors(checkpoint.list_states(tmp_path / name / "checkpoints/train")[-1] / "state.safetensors")
    trained = {key: x.dtype for key, x in tree.items(state) if key.startswith("trainable.")}
    assert set(trained.values()) == {torch.float32}


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """torch's setting, put back."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("matmul_precision")
def test_tf32_is_off_unless_the_program_asks(tiny: Path, tmp_path: Path) -> None:
    for words, wanted in (([], "ieee"), (["tf32=true"], "tf32"), (["tf32=false"], "ieee")):
        assert main(["eval", *toy("eval", tiny, tmp_path), *words]) == 0
        assert torch.backends.cuda.matmul.fp32_precision == wanted
