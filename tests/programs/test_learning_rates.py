"""lr = "auto": the published rule by hand, where it applies and where it is refused; rates and epochs that look unintended."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from minitune.errors import InputError
from minitune.models.families import gemma2, llama, qwen3
from minitune.models.model import Model
from minitune.optim.adamw import AdamW
from minitune.programs import program
from minitune.programs.learning_rates import rate_by_size
from minitune.programs.stages.batches import TokenizedTable
from minitune.programs.stages.train import Train
from minitune.programs.stages.training_notes import notes, rate_notes
from support.programs import LORA, SHIPPED, TRAIN, run, start

STAGE = Train(data="train", steps=7, batch_size=2, optimizer=AdamW(lr=1e-3))
AUTO = 'train.optimizer={kind="adamw",lr="auto"}'


def model(family: object, d_model: int) -> Model:
    config = family.Config(n_layers=1, n_heads=2, n_kv_heads=1, d_model=d_model, d_head=8, d_ff=16, vocab_size=32)
    return Model(family.FAMILY, config)


@pytest.mark.parametrize(
    ("family", "d_model", "lora"),
    # Llama 3.2 1B, 3.1 8B and 70B, Qwen3 0.6B and 8B, by 5e-4 (2000 / d_model)^p with a calculator; Gemma takes the lower curve
    [
        (llama, 2048, 4.9e-4),
        (llama, 4096, 2.9e-4),
        (llama, 8192, 1.7e-4),
        (qwen3, 1024, 5.3e-4),
        (qwen3, 4096, 4.7e-4),
        (gemma2, 2304, 4.5e-4),
        (gemma2, 640, 5.5e-4),
        (llama, 192, 3.1e-3),
        (llama, 64, 5e-3),
    ],
)
def test_the_rate_is_that_of_the_published_rule(family: object, d_model: int, lora: float) -> None:
    assert rate_by_size(model(family, d_model), trains_whole=False) == pytest.approx(lora)
    assert rate_by_size(model(family, d_model), trains_whole=True) == pytest.approx(lora / 10, rel=0.01)


def test_a_program_writes_its_rate_down_and_says_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny, LORA + TRAIN, AUTO)
    said = capsys.readouterr().out
    assert 'train: the learning rate is 0.005, which lr = "auto" takes for a llama 32 wide' in said
    written = tomllib.loads((tmp_path / "p/program.toml").read_text(encoding="utf-8"))
    assert written["stage"][1]["optimizer"]["lr"] == 0.005
    assert start(tmp_path, tiny, LORA + TRAIN, AUTO) == 0
    assert "is finished: nothing is left to run" in capsys.readouterr().out


def test_whole_weights_take_a_tenth_also_after_a_load(tiny: Path, tmp_path: Path) -> None:
    full = '[[stage]]\nop = "full"\nweights = ["*_proj.weight"]\n'
    saved = '[[stage]]\nop = "save"\nwhat = "merged"\n[[stage]]\nop = "load"\nmodel = { path = "run/merged" }\n'
    again = LORA.replace('op = "lora"', 'op = "lora"\nname = "again"') + TRAIN.replace(
        'op = "train"', 'op = "train"\nname = "second"'
    )
    path = tmp_path / "p.toml"
    start(tmp_path, tiny, full + TRAIN + saved + again, verb=("show",))
    loaded = program.load(path, [AUTO, AUTO.replace("train.", "second.")])
    rates = {stage.label: stage.optimizer.lr for stage in loaded.stage if isinstance(stage, Train)}
    assert rates == {"train": 5e-4, "second": 5e-3}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ('train.optimizer={kind="muon",lr="auto"}',),
            r"optimizer.lr is 'auto' with optimizer.kind 'muon', expected a number: no rule",
        ),
        (
            (AUTO, 'train.loss={kind="dpo",beta=0.1}'),
            r"optimizer.lr is 'auto' with loss.kind 'dpo', expected a number: no rule is known",
        ),
        ((AUTO, "model.path=nowhere"), r"models: .*nowhere"),
        ((AUTO, "model={path=3}"), r"model.path"),
    ],
)
def test_where_no_rule_is_known_a_number_is_asked_for(tiny: Path, tmp_path: Path, words: tuple[str, ...], found: str) -> None:
    start(tmp_path, tiny, LORA + TRAIN, verb=("show",))
    with pytest.raises(InputError, match=found):
        program.load(tmp_path / "p.toml", words)


def test_the_schema_takes_the_word_where_the_rule_is() -> None:
    tables = program.schema()["$defs"]
    words = {
        name for name, table in tables.items() if {"const": "auto"} in table.get("properties", {}).get("lr", {}).get("anyOf", [])
    }
    assert words == {"AdamW", "AdamW8bit"}
    assert program.load(SHIPPED["sft"]).stage[2].optimizer.lr == rate_by_size(model(llama, 192), trains_whole=False)


def table(n_rows: int) -> TokenizedTable:
    return TokenizedTable("train has some", n_rows, 9, 9 * n_rows)


def test_many_epochs_a_high_rate_and_a_long_warm_up_are_told() -> None:
    large = model(llama, 512)
    few, many = (notes(STAGE, steps, table(7), large, 9) for steps in (70, 71))
    assert len(few) == 1
    assert many[1] == (
        "more than 20 epochs learn rows by heart, and held-out loss rises: 20 would be 70 steps; lower train.steps or epochs"
    )
    usual = rate_by_size(large, trains_whole=False)
    for lr, trains_whole, told in ((4 * usual, False, 0), (4.1 * usual, False, 1), (0.41 * usual, True, 1), (usual, False, 1)):
        stage = msgspec.structs.replace(STAGE, optimizer=AdamW(lr=lr))
        lines = list(rate_notes(stage, large, trains_whole))
        assert len(lines) == told
    stage = msgspec.structs.replace(STAGE, optimizer=AdamW(lr=10 * usual))
    (line,) = rate_notes(stage, large, trains_whole=False)
    assert line == (
        f'the learning rate {10 * usual:g} is 10 times {usual:g}, which lr = "auto" takes for a llama 512 wide: '
        "training may diverge; lower train.optimizer.lr"
    )
    assert not list(rate_notes(stage, model(llama, 256), trains_whole=False))
    swept = msgspec.structs.replace(STAGE, optimizer=AdamW(lr=1.0), sweep={"seed": (1,)})
    assert not list(rate_notes(swept, large, trains_whole=False))
