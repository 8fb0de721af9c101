"""Globs and names of a program that match nothing are told by check, with the ones that are near."""

from pathlib import Path

import pytest

from minitune.__main__ import main
from support.programs import ONE_STEP, small_program

HEAD, _, STAGE = small_program().partition("[[stage]]")
LORA = f"[[stage]]{STAGE}"
FULL = '[[stage]]\nop = "full"\n'
INT8 = '[[stage]]\nop = "quantize"\nscheme = { kind = "int8" }\n'
QAT = f'{FULL}[[stage]]\nop = "qat"\nscheme = {{ kind = "int8" }}\n'
STEP = ONE_STEP[: ONE_STEP.index("optimizer")]
ADAMW = f'{LORA}{STEP}optimizer = {{ kind = "adamw", lr = 1e-3 }}\n'
TEACHER = f'{LORA}{STEP}loss = {{ kind = "forward_kl" }}\n'
AGAIN = TEACHER.replace('op = "lora"', 'op = "lora"\nname = "again"')
LOAD = '[[stage]]\nop = "load"\n'
SAVED = f'{LORA}[[stage]]\nop = "save"\nwhat = "merged"\npath = "run/teacher"\n'
CASES = {
    "targets": (LORA.replace("*.self_attn", "*.attn"), "lora: target: '*.attn.*_proj.weight' matches no weight; the nearest are"),
    "one of two targets": (LORA.replace('"]', '", "nope*"]'), "lora: target: 'nope*' matches no weight"),
    "no targets": (LORA.replace('["*.self_attn.*_proj.weight"]', "[]"), "lora: target: the list of globs is empty"),
    "ranks": (f'{LORA}ranks = {{ "nope*" = 2 }}\n', "lora: ranks: 'nope*' matches no weight"),
    "norms beside deltas": (f'{LORA}train = ["nope*"]\n', "lora: train: 'nope*' matches no weight"),
    "weights": (f'{FULL}weights = ["nope*"]\n', "full: weights: 'nope*' matches no weight"),
    "factors of the rate": (f'{ADAMW}lr_factors = {{ "nope*" = 2.0 }}\n', "'nope*' matches no weight"),
    "what muon leaves to adamw": (
        f'{FULL}{STEP}optimizer = {{ kind = "muon", lr = 1e-3, adamw = ["nope*"] }}\n',
        "optim: muon.adamw: 'nope*' matches no weight",
    ),
    "quantized weights": (f'{INT8}weights = ["nope*"]\n', "weights: 'nope*' matches no weight"),
    "exceptions": (f'{INT8}exceptions = {{ "nope*" = {{ kind = "int4" }} }}\n', "exceptions: 'nope*' matches no weight"),
    "kept weights": (f'{INT8}keep = ["nope*"]\n', "quantize: keep: 'nope*' matches no weight"),
    "rounded weights": (f'{QAT}weights = ["nope*"]\n', "weights: 'nope*' matches no weight"),
    "weights that stay unrounded": (f'{QAT}keep = ["nope*"]\n', "qat: keep: 'nope*' matches no weight"),
    "types of a GGUF": (
        '[[stage]]\nop = "export"\nformat = "gguf"\npath = "x.gguf"\n'
        'types = { default = "F16", exceptions = { "nope*" = "F16" } }\n',
        "'nope*' matches no weight",
    ),
    "teacher": (f'{TEACHER}teacher = {{ path = "nope" }}\n', "models: nope/config.json does not exist"),
    "deltas of a teacher": (
        f'{TEACHER}teacher = {{ path = "demo", deltas = "nope" }}\n',
        "peft: nope/adapter_config.json does not exist",
    ),
    "teacher that nothing saves": (
        f'{SAVED}{LOAD}model = {{ path = "demo" }}\n{AGAIN}teacher = {{ path = "run/techer" }}\n',
        "loading: model path 'run/techer' lies in the run folder, where no earlier stage writes it, expected one of run/teacher; "
        "did you mean 'run/teacher'?",
    ),
    "model that nothing saves": (
        f'{LOAD}model = {{ path = "run/x" }}\n',
        "where no earlier stage writes it, expected a save stage",
    ),
    "deltas that nothing saves": (
        f'{LOAD}model = {{ path = "demo", deltas = "run/x" }}\n',
        "loading: model deltas 'run/x' lies in",
    ),
    "tokenizer that nothing saves": (
        f'{LOAD}model = {{ path = "demo", tokenizer = "run/x" }}\n',
        "loading: model tokenizer 'run/x' lies in the run folder",
    ),
    "data": ('[[stage]]\nop = "eval"\ndata = "trian"\n', "expected a [data] table: train; did you mean 'train'?"),
    "held-out data": (f'{ADAMW}evaluate = {{ data = "trian", every = 1 }}\n', "asks for data 'trian'"),
    "calibration data": (f'{INT8}method = {{ kind = "gptq", data = "trian", rows = 4 }}\n', "asks for data 'trian'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_name_that_matches_nothing_is_told_by_check(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages, message = CASES[name]
    Path("t.toml").write_text(HEAD + stages, encoding="utf-8")
    assert main(["check", "t.toml"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
