"""Verification: what was written is opened by another program, and a difference beyond the format's bound ends the command."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from minitune.__main__ import main
from minitune.checkpoint import load_tensors, save_tensors
from minitune.errors import InputError
from minitune.inference.generate import greedy
from minitune.interop.artefacts import bound, format_of, require_reader
from minitune.interop.readers.reader import Reader
from minitune.interop.verify import OurModel, agreement, our_answers
from minitune.io.results import write_beside
from minitune.programs.stages.export import Export
from minitune.programs.stages.verify import Verify
from minitune.programs.state import AbstractState
from support.families import sized
from support.models import model_of, random_params
from support.programs import LORA, TRAIN, run, start

pytestmark = pytest.mark.reference


def stage(op: str, name: str, **keys: str) -> str:
    return "\n".join(["[[stage]]", f'op = "{op}"', f'name = "{name}"', *(f"{key} = {value}" for key, value in keys.items()), ""])


VERIFIED = {  # name -> the stage that writes it
    "deltas": stage("save", "deltas", what='"deltas"') + stage("verify", "verify-deltas"),
    "dense": stage("merge", "merge")
    + stage("save", "dense", what='"params"', dtype='"float32"')
    + stage("verify", "verify-dense"),
    "file": stage("export", "file", format='"gguf"', types='{ default = "Q8_0" }') + stage("verify", "verify-file"),
    "packed": stage("quantize", "q", scheme='{ kind = "int8" }')
    + stage("export", "packed", format='"compressed-tensors"')
    + stage("verify", "verify-packed", path='"run/compressed-tensors"', max_new_tokens="5"),
}


def test_stages_open_what_was_written_and_record_the_figures(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(tmp_path, tiny, LORA + TRAIN + "".join(VERIFIED.values()))
    places = {"deltas": "deltas", "dense": "params", "file": "model.gguf.", "packed": "compressed-tensors"}
    for name, place in places.items():
        record = summary[f"verify-{name}"]
        text = (tmp_path / "p" / (f"{place}verify.json" if name == "file" else f"{place}/verify.json")).read_text("utf-8")
        assert json.loads(text) == {key: value for key, value in record.items() if key != "time_s"}
        assert record["bound"] == {"file": 0.1, "packed": 2e-2}.get(name, 1e-4)
        assert record["logits_error"] <= (0.1 if name == "file" else 1e-4)
        assert record["agrees"]
        assert record["greedy_equal"] == record["greedy_tokens"] == (10 if name == "packed" else 64) or name == "file"
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "p/params"), "--json"]) == 0
    found = capsys.readouterr()
    assert "greedy text: 64 of 64 tokens equal" in found.err
    answer = json.loads(found.out)
    assert answer == {"exit_code": 0, "result": json.loads((tmp_path / "p/params/verify.json").read_text("utf-8"))}
    assert main(["verify", str(tmp_path / "p/model.gguf")]) == 2
    assert "which minitune does not read, expected the model folder that it was made of" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "p/nowhere")]) == 2
    assert "nowhere does not exist, expected a folder or file" in capsys.readouterr().err
    # what was verified is still a save, which another one replaces
    assert start(tmp_path, tiny, stage("save", "save", what='"params"', path=f'"{tmp_path / "p/params"}"'), name="again") == 0


def test_another_model_ends_with_a_failure(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny, stage("save", "save", what='"params"', dtype='"float32"'))
    folder, other = tmp_path / "p/params", tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_tensors(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    (other / ".minitune-files.json").unlink()
    save_tensors(other / "model.safetensors", {**weights, name: 2 * weights[name]})
    assert main(["verify", str(folder), "--against", str(other)]) == 2
    found = capsys.readouterr()
    assert "is not what minitune computes: logits differ by" in found.err
    assert "expected at most 1e-04 of folder" in found.err
    assert json.loads((folder / "verify.json").read_text("utf-8"))["agrees"] is False


def test_answers_may_differ_where_two_tokens_are_as_near_as_the_bound() -> None:
    config = sized("llama")
    model, params = model_of(config), random_params(config)
    prompts = [[3, 5], [7]]
    answers, logits = our_answers(OurModel(model, params, "x"), prompts, 6)
    assert answers == greedy(model, params, prompts, max_new_tokens=6, stop_ids=[])

    def ours(ids: Sequence[int]) -> torch.Tensor:
        return model.forward(params, torch.tensor([list(ids)]))[0]

    def worse(ids: Sequence[int], n: int) -> list[int]:
        """Our answer, but for one token in the second place."""
        right = greedy(model, params, [ids], max_new_tokens=n, stop_ids=[])[0]
        return [right[0], int(ours([*ids, right[0]])[-1].argmin()), *right[2:]]

    found = agreement(Reader(("torch",), ours, worse), prompts, answers, logits)
    assert (found.logits_error, found.top1_agreement, found.greedy_equal, found.greedy_tokens) == (0.0, 1.0, 2, 12)
    ranges = [float((x[len(p)].max() - x[len(p)].min()) / x.abs().max()) for x, p in zip(logits, prompts, strict=True)]
    assert found.greedy_margin == pytest.approx(max(ranges))


def test_a_missing_reader_and_a_missing_result_are_found_by_check(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sized("llama")
    model = model_of(config)
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes().items()}
    state = AbstractState({}, model, params)
    with pytest.raises(InputError, match=r"verify finds nothing written, .* expected a save or export stage before it"):
        Verify().check(state)
    written = Export(format="onnx").check(state)
    with pytest.raises(InputError, match="is to verify 'run/onxn', which no stage before it writes, expected one of run/onnx"):
        Verify(path="run/onxn").check(written)
    with pytest.raises(InputError, match="verify has no prompts, expected one at least"):
        Verify(prompts=()).check(written)
    assert Verify().check(written) == written
    monkeypatch.setattr("minitune.interop.artefacts.is_installed", lambda name: False)
    with pytest.raises(InputError, match=r"the package onnxruntime is not installed, .*pip install 'minitune\[onnx\]'"):
        Verify().check(written)
    with pytest.raises(InputError, match=r"the package transformers .*pip install 'minitune\[verify\]'"):
        require_reader("adapter")


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no config.json, adapter_config.json, model.onnx or model.pte, and is no .gguf or .pte file"
    ):
        format_of(tmp_path)


def test_bounds_follow_the_rounding(tmp_path: Path) -> None:
    def quantized(bits: int, activations: object) -> dict:
        groups = {"group_0": {"weights": {"num_bits": bits}, "input_activations": activations}}
        return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}

    cases = [({"dtype": "float32"}, 1e-4, 1e-4), ({"dtype": "bfloat16"}, 1e-4, 2e-2)]
    cases += [(quantized(8, None), 2e-2, 0.1), (quantized(8, {}), 2e-2, 0.1), (quantized(8, {"num_bits": 8}), 0.1, 0.1)]
    cases += [(quantized(4, None), 2e-2, 0.5)]
    for config, same, other in cases:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        name = format_of(tmp_path)
        assert (bound(tmp_path, name, same_weights=True), bound(tmp_path, name, same_weights=False)) == (same, other)


def test_a_file_about_a_result_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"verify\.json was not written by minitune, or was changed after it"):
        write_beside(tmp_path, "verify.json", b"{}")
    assert (tmp_path / "verify.json").read_text("utf-8") == "mine"
    (tmp_path / "verify.json").unlink()
    for content in (b"1", b"2"):
        assert write_beside(tmp_path, "verify.json", content).read_bytes() == content
