"""The last thing that a run shows."""

import io

import pytest
from rich.console import Console

from minitune.programs.report import clipped, report

pytestmark = pytest.mark.fast

SUMMARY = {
    "before": {
        "loss_nats": 3.25,
        "exact_match": 0.0,
        "n_prompts": 240,
        "model_bytes": 3 * 2**20,
        "time_s": 2.0,
        "samples": [{"prompt": "two [red] lamps", "reference": '{"lamps": 2}', "answer": "and so on"}],
    },
    "train": {
        "time_s": 61.0,
        "steps": 300,
        "last_loss": 0.0512,
        "mean_loss": 0.0625,
        "n_mean_steps": 50,
        "reward_accuracy": 0.875,
        "best_heldout_nats": 0.5,
        "best_step": 200,
        "ended_at_step": 300,
        "planned_steps": 450,
    },
    "quantize": {"time_s": 0.5, "bytes_before": 3 * 2**20, "bytes_after": 2**20},
    "after": {
        "loss_nats": 0.125,
        "exact_match": 0.925,
        "n_prompts": 240,
        "samples": [{"prompt": "two [red] lamps", "reference": '{"lamps": 2}', "answer": '{"lamps": 3}'}],
    },
    "save": {"what": "deltas", "path": "runs/lora/deltas"},
    "steps": 300,
    "tokens_per_s": 10_234.5,
    "peak_mem_bytes": 600 * 2**20,
}


def shown(summary: dict, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(report("lora", summary, width))
    return [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]


def test_the_report_sets_stages_side_by_side() -> None:
    lines = shown(SUMMARY, 140)
    assert "before 3.2500 0.0% of 240 3.00 2.0" in lines
    assert "stage loss [nats a token] loss [nats a pair] best held-out exact match reward accuracy size [MiB] time [s]" in [
        line.replace("┃ ", "").replace(" ┃", "") for line in lines
    ]
    assert "train 0.0625 0.5000 87.5% 61.0" in lines
    assert "train: means of the last 50 training steps; the loss of the last one is 0.0512" in lines
    assert "train: step 200 has the best held-out loss" in lines
    assert "train: ended at step 300 of 450" in lines
    assert "quantize 1.00 0.5" in lines
    assert "after 0.1250 92.5% of 240" in lines
    at = lines.index("prompt two [red] lamps")
    assert lines[at + 1 : at + 4] == ['reference {"lamps": 2}', "before and so on", 'after {"lamps": 3}']
    assert "steps 300 tokens per s 10,234 tokens/s mem 600 MiB" in lines or any("10,234 tokens/s" in line for line in lines)
    assert "deltas in runs/lora/deltas" in lines


def test_a_run_without_evaluations_still_says_where_its_result_lies() -> None:
    lines = shown({"save": SUMMARY["save"], "steps": 3})
    assert "deltas in runs/lora/deltas" in lines
    assert not any("exact match" in line for line in lines)


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_cuts_no_number(width: int) -> None:
    lines = shown(SUMMARY, width)
    at = lines.index("train")
    assert lines[at + 1 : at + 5] == [
        "loss [nats a pair]: 0.0625",
        "best held-out: 0.5000",
        "reward accuracy: 87.5%",
        "time [s]: 61.0",
    ]
    assert "exact match: 92.5% of 240" in lines
    assert not any("…" in line for line in lines)


def test_a_sample_on_the_screen_is_a_few_lines() -> None:
    assert clipped("one\n\n \n\r\ntwo") == "one\ntwo"
    assert clipped("\n".join("abcdefgh")) == "a\nb\nc\nd\ne\nf\n... 2 more lines"
    assert len(clipped("x" * 5000)) <= 600
    summary = {"after": {"loss_nats": 1.0, "samples": [{"prompt": "p", "reference": "r", "answer": "a" + "\n" * 90 + "b"}]}}
    assert shown(summary).count("") < 4


def test_losses_of_preferences_stand_under_a_heading_of_their_own() -> None:
    record = {"mean_loss": 0.6, "last_loss": 0.6, "n_mean_steps": 1, "steps": 1}
    assert any("loss [nats a pair]" in line for line in shown({"train": {**record, "reward_accuracy": 0.5}}))
    assert not any("nats a token" in line for line in shown({"train": {**record, "reward_accuracy": 0.5}}))
    assert any("loss [nats a token]" in line for line in shown({"train": record}))
