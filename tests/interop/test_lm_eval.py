"""The harness adapter gives the numbers of the harness's own transformers backend, sample by sample, on local tasks."""

import functools
import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from minitune import checkpoint, models
from minitune.checkpoint.generation_config import other_rules, repetition_penalty
from minitune.errors import InputError
from minitune.inference import generate
from minitune.inference.score import continuations
from minitune.interop import lm_eval, lm_eval_tasks
from minitune.interop.lm_eval_model import HarnessModel
from minitune.io import paths
from minitune.lora import Lora
from minitune.models import Model
from minitune.models.families import llama
from minitune.text import tokenizer
from minitune.text.chat import CHATML, open_template
from minitune.text.template import Template, compile_template, with_options
from minitune.types import Delta
from support.models import SMALL, random_params
from support.tokenizers import llama_config, sentencepiece_model, write_folder

TINY = llama.Config(
    n_layers=2, n_heads=2, n_kv_heads=1, d_model=16, d_head=8, d_ff=24, vocab_size=1024, tie_embeddings=True, max_positions=80
)
FOREIGN = {"q": "¿Dónde está 東京? 🎉", "choices": ["aquí", "東", "🎉🎉", "\n"], "gold": 3, "text": "größer 東京 🎉\n" * 7}
DOCS = [  # an empty question, one beyond max_positions, other alphabets, what looks like markup, a space at the end
    {"q": "", "choices": ["yes", "no", "a", "b"], "gold": 0, "text": ""},
    {"q": "Where do nine lamps go? ", "choices": [" Oslo", " to Oslo on Monday", "Rome", "Ro"], "gold": 2, "text": "A lamp."},
    {"q": "one two three four " * 9, "choices": ["x", "five", "five six", "five six seven"], "gold": 1, "text": "lamp " * 40},
    FOREIGN,
    {"q": "<s>Say <|end|> now", "choices": ["A", "B", "C", "D"], "gold": 0, "text": "<s>again</s>"},
    {"q": "Pick one:", "choices": ["A", "B", "C", "D"], "gold": 3, "text": "Nine lamps went to Oslo on a grey Monday. " * 5},
    {"q": "Pick:", "choices": ["A", "A B", "C D E", "D"], "gold": 1, "text": "x"},
]
TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm", "acc_mutual_info")],
    },
    "loglikelihood": {"doc_to_target": " {{choices[2]}}", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "generate_until": {
        "doc_to_text": "Q: {{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["sh", "ealea"], "max_gen_toks": 36, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"num_fewshot": 0, "apply_chat_template": False, "system_instruction": None},
    "few-shot": {"num_fewshot": 2, "apply_chat_template": False, "system_instruction": "Be brief."},
    "chat": {"num_fewshot": 0, "apply_chat_template": True, "system_instruction": None},
    "few-shot chat": {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be brief."},
}


class Subject(NamedTuple):
    """A tiny model on disk and in memory."""

    folder: Path
    model: Model
    params: dict[str, torch.Tensor]
    tokenizer: tokenizer.Tokenizer
    template: Template
    end: int  # the token that ends a turn

    def ours(self, **changes: Any) -> Any:
        """It as lm_eval sees it."""
        return lm_eval.language_model(self.asked(**changes))

    def asked(self, **changes: Any) -> HarnessModel:
        """It with the usual knobs."""
        knobs = {"batch_size": 3, "stop_ids": [self.end], **changes}
        return HarnessModel(self.model, self.params, self.tokenizer, self.template, **knobs)

    def theirs(self, **changes: Any) -> HFLM:
        """The harness's own backend on the same folder."""
        return HFLM(str(self.folder), device="cpu", dtype="float32", batch_size=4, **changes)

    def evaluate(self, tasks: Path, *names: str, **changes: Any) -> dict[str, Any]:
        """lm_eval.evaluate with the usual knobs."""
        knobs = {"n_shots": None, "chat_template": False, "system": None, "limit": None}
        return lm_eval.evaluate(self.asked(), tasks=names, include=tasks, **{**knobs, **changes})


def on_disk(folder: Path, tokenizer_folder: Path, end: int) -> Subject:
    """A folder as checkpoint writes it, with random weights."""
    model, params = Model(llama.FAMILY, TINY), {name: 0.4 * w for name, w in random_params(TINY).items()}
    checkpoint.save_folder(folder, params, model, checkpoint.FolderExtras(tokenizer_folder, [end]))
    texts = tokenizer.open_tokenizer(folder)
    return Subject(folder, model, params, texts, open_template(folder, texts), end)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """With the demo's tokenizer, which puts no bos in front."""
    return on_disk(tmp_path_factory.mktemp("model"), paths.locate("demo"), end=6)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """With a tokenizer as Llama 2 has it: bytes for unknown characters, a dummy prefix and bos in front of every text."""
    template = "{{ bos_token }}" + CHATML.replace("message.content", "message.content | trim")
    config = llama_config(add_bos_token=True, add_eos_token=False, chat_template=template)
    return on_disk(tmp_path_factory.mktemp("bos"), write_folder(sentencepiece_model(True), config), end=381)


def write_task(folder: Path, kind: str, docs: list[dict[str, Any]], **changes: Any) -> str:
    """A task file; its name."""
    name = changes.get("task", kind)
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(doc) for doc in docs), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": kind,
        "doc_to_text": "{{q}}",
        "metadata": {"version": 1.5},
        **TASKS[kind],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of every kind; the demo's vocabulary knows no letter of the foreign document."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind in TASKS:
        write_task(folder, kind, [doc for doc in DOCS if doc is not FOREIGN])
        write_task(folder, kind, DOCS, task=f"foreign_{kind}")
    return folder


def run(lm: Any, tasks: Path, *names: str, **settings: Any) -> dict[str, Any]:
    """What lm_eval itself returns."""
    index = TaskManager(include_path=tasks, include_defaults=False)
    results = simple_evaluate(lm, tasks=list(names), task_manager=index, **{"bootstrap_iters": 0, "limit": None, **settings})
    assert results is not None
    return dict(results)


@pytest.fixture(scope="module")
def reference(subject: Subject, tasks: Path) -> Callable[[str], dict[str, Any]]:
    """What the harness's own backend finds in a setting."""
    theirs = subject.theirs()
    return functools.cache(lambda setting: run(theirs, tasks, *TASKS, **SETTINGS[setting]))


@pytest.mark.parametrize(
    ("setting", "batch_size"), [("plain", 1), ("plain", 3), ("plain", 7), ("few-shot", 3), ("chat", 7), ("few-shot chat", 1)]
)
def test_every_sample_equals_the_transformers_backend(
    setting: str, batch_size: int, subject: Subject, tasks: Path, reference: Callable[[str], dict[str, Any]]
) -> None:
    compare(run(subject.ours(batch_size=batch_size), tasks, *TASKS, **SETTINGS[setting]), reference(setting))


@pytest.mark.parametrize("setting", ["few-shot", "chat"])
def test_bos_and_foreign_text_equal_the_transformers_backend(setting: str, with_bos: Subject, tasks: Path) -> None:
    names = [f"foreign_{kind}" for kind in TASKS]
    compare(*(run(lm, tasks, *names, **SETTINGS[setting]) for lm in (with_bos.ours(), with_bos.theirs())))


def compare(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Every sample's requests, responses and metrics."""
    assert actual["samples"].keys() == wanted["samples"].keys()
    for kind, samples in wanted["samples"].items():
        for ours, theirs in zip(actual["samples"][kind], samples, strict=True):
            assert ours["arguments"] == theirs["arguments"]
            close(ours["resps"], theirs["resps"])
        assert actual["results"][kind].keys() == wanted["results"][kind].keys()
        for key, value in wanted["results"][kind].items():
            close(actual["results"][kind][key], value, exact=key.startswith(("acc", "exact")))


def close(actual: Any, wanted: Any, exact: bool = False) -> None:
    """Equal, numbers to 1e-5 unless they are counts."""
    if isinstance(wanted, (list, tuple)):
        assert len(actual) == len(wanted)
        for one, other in zip(actual, wanted, strict=True):
            close(one, other, exact)
    elif isinstance(wanted, float) and not exact:
        assert actual == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    else:
        assert actual == wanted


def test_the_tiny_model_says_different_things(reference: Callable[[str], dict[str, Any]]) -> None:
    plain = reference("plain")
    answers = {sample["resps"][0][0] for sample in plain["samples"]["generate_until"]}
    assert len(answers) > 3
    assert min(map(len, answers)) < 3 < max(map(len, answers))
    assert 0.0 < plain["results"]["multiple_choice"]["acc,none"] < 1.0
    assert plain["results"]["loglikelihood"]["perplexity,none"] < 1e30


def test_a_trained_model_equals_the_transformers_backend(tmp_path: Path) -> None:
    folder = paths.locate("demo")
    model, texts = models.open(folder), tokenizer.open_tokenizer(folder)
    params = checkpoint.load_params(folder, model.shapes(), torch.float32)
    demo = Subject(folder, model, params, texts, open_template(folder, texts), 6)
    rows = [
        row["input"]
        for row in map(json.loads, paths.locate("demo/orders-heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4])
    ]
    ids = [texts.encode(row, parse_special=True) for row in rows]
    said = [texts.decode(row, skip_special=True) for row in generate.greedy(model, params, ids, max_new_tokens=3, stop_ids=[])]
    docs = [{"q": row, "choices": [text, "of", "a", "was"], "gold": 0} for row, text in zip(rows, said, strict=True)]
    write_task(tmp_path, "multiple_choice", docs, target_delimiter="")
    write_task(tmp_path, "generate_until", docs, generation_kwargs={"until": [","], "max_gen_toks": 8})
    actual, wanted = (
        run(lm, tmp_path, "multiple_choice", "generate_until") for lm in (demo.ours(max_length=70), demo.theirs(max_length=70))
    )
    compare(actual, wanted)
    greedy = [greedy for sample in wanted["samples"]["multiple_choice"] for ((_, greedy),) in sample["resps"]]
    assert {True, False} <= set(greedy)
    assert len({sample["resps"][0][0] for sample in wanted["samples"]["generate_until"]}) > 1


def test_results_are_plain_numbers_and_nothing_else_is_said(
    subject: Subject, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    theirs = subject.theirs()  # which would look for other ranks below
    monkeypatch.chdir(tmp_path)  # where git finds no repository
    monkeypatch.setenv("LOCAL_RANK", "1")  # on which simple_evaluate returns nothing
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    capfd.readouterr()
    results = subject.evaluate(tasks, "loglikelihood", "multiple_choice", n_shots=2, limit=5)
    assert capfd.readouterr() == ("", "")
    assert os.environ["LOCAL_RANK"] == "1"
    assert "DISABLE_MULTIPROC" not in os.environ
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    settings = {**SETTINGS["plain"], "num_fewshot": 2, "limit": 5, "bootstrap_iters": lm_eval.BOOTSTRAP}
    wanted = run(theirs, tasks, "loglikelihood", "multiple_choice", **settings)["results"]
    assert json.loads(json.dumps(results)) == results
    assert set(results) == {"lm_eval", "tasks"}
    for name, row in results["tasks"].items():
        assert {key: row[key] for key in ("n_samples", "n_shots", "version")} == {"n_samples": 5, "n_shots": 2, "version": 1.5}
        assert set(row["metrics"]) == {metric["metric"] for metric in TASKS[name]["metric_list"]}
        for metric, cell in row["metrics"].items():
            close(cell["value"], wanted[name][f"{metric},none"])
            close(cell["stderr"], wanted[name][f"{metric}_stderr,none"])
            assert cell["stderr"] >= 0.0


def test_filters_groups_and_a_missing_stderr_are_named(subject: Subject, tmp_path: Path) -> None:
    write_task(tmp_path, "loglikelihood_rolling", DOCS[1:2])
    first = {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]}
    write_task(tmp_path, "generate_until", DOCS[1:3], filter_list=[first])
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    for name in ("one", "two"):
        write_task(tmp_path, "multiple_choice", DOCS[:3], task=name)
    results = subject.evaluate(tmp_path, "both", "generate_until", "loglikelihood_rolling")["tasks"]
    assert set(results) == {"both", "one", "two", "generate_until", "loglikelihood_rolling"}
    assert results["both"]["metrics"]["acc"]["value"] == pytest.approx(results["one"]["metrics"]["acc"]["value"])
    assert list(results["generate_until"]["metrics"]) == ["exact_match,first"]
    assert results["loglikelihood_rolling"]["metrics"]["bits_per_byte"]["stderr"] is None


def test_local_tasks_ask_nothing_of_the_network(subject: Subject, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[object] = []

    def refused(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("offline")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    subject.evaluate(tasks, *TASKS, limit=2)
    assert not asked


TEXTS = ["", " ", "a", " a b", "¿Dónde? 🎉", "<s>", "<s> a", "a<s>", "<|im_end|>a", "two  spaces ", "\n\n"]


@pytest.mark.parametrize("special", [None, True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_special_tokens_equal_the_transformers_backend(text: str, special: bool | None, with_bos: Subject) -> None:
    theirs = _kept(with_bos.folder)
    assert with_bos.ours().tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, add_special_tokens=special)
    assert with_bos.ours().prefix_token_id == theirs.prefix_token_id == 1
    assert with_bos.ours().eot_token_id == theirs.eot_token_id == 2
    assert with_bos.ours().chat_template(True) == theirs.chat_template(True)
    assert with_bos.ours().chat_template(False) is None


@functools.cache
def _kept(folder: Path) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32")


CHATS = [
    [{"role": "user", "content": "Hi "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "The answer is"},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So: "}],
]
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("strict", [True, False])
def test_rendered_chats_equal_the_transformers_backend(
    strict: bool, messages: list[dict[str, str]], opened: bool, subject: Subject, with_bos: Subject
) -> None:
    for one in (subject, with_bos):
        theirs = _kept(one.folder)
        source = STRICT if strict else theirs.tokenizer.chat_template
        ours = one._replace(template=compile_template(source, one.tokenizer.special_names, "here")).ours()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(theirs.tokenizer, "chat_template", source)
            wanted = theirs.apply_chat_template(messages, add_generation_prompt=opened)
        assert ours.apply_chat_template(messages, add_generation_prompt=opened) == wanted


def test_options_reach_the_rendered_chats(subject: Subject) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if enable_thinking %}<think>{% endif %}"
    plain = compile_template(source, subject.tokenizer.special_names, "here")
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        ours = subject._replace(template=with_options(plain, options, "here")).ours()
        theirs = _kept(subject.folder)
        wanted = theirs.tokenizer.apply_chat_template(CHATS[0], chat_template=source, tokenize=False, **options)
        assert ours.apply_chat_template(CHATS[0]) == wanted


def test_a_system_prompt_that_the_template_refuses_is_refused(subject: Subject, tasks: Path) -> None:
    strict = subject._replace(template=compile_template(STRICT, {}, "here"))
    with pytest.raises(InputError, match="chat: here fails with TemplateError: no"):
        strict.evaluate(tasks, "multiple_choice", chat_template=True, system="Be brief.")
    broken = subject._replace(template=compile_template("{{ raise_exception('never') }}", {}, "here"))
    with pytest.raises(InputError, match="chat: here fails with TemplateError: never"):
        broken.ours().apply_chat_template(CHATS[0])
    silent = subject._replace(template=compile_template("hm", {}, "here"))
    with pytest.raises(InputError, match="lm_eval: here leaves out what the last message says, expected it"):
        silent.ours().apply_chat_template(CHATS[2], add_generation_prompt=False)


def asked(*args: Any) -> Instance:
    """A request of the harness."""
    return Instance(request_type="generate_until", doc={}, arguments=args, idx=0)


def test_a_special_token_or_any_string_stops_an_answer(subject: Subject) -> None:
    lm = subject.ours(stop_ids=[])
    [whole] = lm.generate_until([asked("Pick", {"max_gen_toks": 12})])
    ids = subject.tokenizer.encode(whole, parse_special=True)
    text = subject.tokenizer.decode(ids[3:4], skip_special=False)
    [until_text] = lm.generate_until([asked("Pick", {"max_gen_toks": 12, "until": ["", text]})])
    assert until_text == whole[: whole.index(text)]
    special = subject.tokenizer._replace(special={**subject.tokenizer.special, text: ids[3]})
    [until_token] = (
        subject._replace(tokenizer=special).ours(stop_ids=[]).generate_until([asked("Pick", {"until": text, "max_gen_toks": 12})])
    )
    assert until_token == subject.tokenizer.decode(ids[: ids.index(ids[3])], skip_special=True)


def test_draws_are_the_same_every_time_and_differ_between_repeats(subject: Subject) -> None:
    rules = {"do_sample": True, "temperature": 2.0, "top_p": 0.99, "top_k": 0, "max_gen_toks": 8}
    one, two = (subject.ours(batch_size=n).generate_until([asked("Pick", rules)] * 3) for n in (1, 2))
    assert one == two
    assert len(set(one)) == 3
    [greedy] = subject.ours().generate_until([asked("Pick", {"max_gen_toks": 8})])
    assert greedy not in one


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -1.0}, r"lm_eval: a task has generation_kwargs .*>= 0.0 - at `\$.temperature`, expected until"),
        ({"num_beams": 4}, r"generation_kwargs \{'num_beams': 4\}: .*unknown field `num_beams`, expected until"),
        ({"max_gen_toks": 80}, "lm_eval: a task asks for 80 new tokens, expected 1 to 79"),
        ({"max_new_tokens": 0}, "lm_eval: a task asks for 0 new tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(rules: dict[str, Any], message: str, subject: Subject) -> None:
    with pytest.raises(InputError, match=message):
        subject.ours().generate_until([asked("a", rules)])


def test_rules_that_change_nothing_are_taken(subject: Subject) -> None:
    plain = subject.ours().generate_until([asked("Pick", {"max_gen_toks": 9, "until": "sh"})])
    rules = {"max_tokens": 9, "until": ["sh"], "do_sample": False, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
    assert subject.ours().generate_until([asked("Pick", rules)]) == plain


def test_a_repetition_penalty_of_the_folder_holds_as_in_the_transformers_backend(
    subject: Subject, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "penalized"
    shutil.copytree(subject.folder, folder)
    file = folder / "generation_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    penalized = subject._replace(folder=folder)
    plain = run(subject.ours(), tasks, "generate_until", limit=3)
    file.write_text(json.dumps({**written, "repetition_penalty": 1.7}), encoding="utf-8")
    ours = run(penalized.ours(repetition_penalty=repetition_penalty(folder)), tasks, "generate_until", limit=3)
    compare(ours, run(penalized.theirs(), tasks, "generate_until", limit=3))
    assert ours["samples"] != plain["samples"]
    for fields, wanted in (
        ({"repetition_penalty": None}, []),
        ({"num_beams": 1, "no_repeat_ngram_size": 3}, ["no_repeat_ngram_size"]),
    ):
        file.write_text(json.dumps({**written, **fields}), encoding="utf-8")
        assert (repetition_penalty(folder), other_rules(folder)) == (1.0, wanted)
    for odd in (0, "much"):
        file.write_text(json.dumps({**written, "repetition_penalty": odd}), encoding="utf-8")
        with pytest.raises(InputError, match=r"generation_config.json repetition_penalty: .*, expected a number above 0"):
            repetition_penalty(folder)


def test_check_finds_a_task_that_there_is_not(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_tasks.check(tasks, ["multiple_choice"])
    # the harness's own task is found in its files, without a list of all
    lm_eval_tasks.check(None, ["hellaswag", "mmlu", "gsm8k"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))
    with pytest.raises(InputError, match=r"expected names .* multiple_choise is in neither; did you mean 'multiple_choice'"):
        lm_eval_tasks.check(tasks, ["multiple_choice", "multiple_choise"])
    with pytest.raises(InputError, match="name at least one"):
        lm_eval_tasks.check(tasks, [])


def test_what_a_user_gets_wrong_is_said(subject: Subject, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the harness's own tasks take seconds to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))
    with pytest.raises(InputError, match=r"tasks are \['multiple_choise'\], expected names .* multiple_choise is in neither"):
        subject.evaluate(tasks, "multiple_choise")
    with pytest.raises(InputError, match=r"lm_eval: tasks are \[\], expected names .* name at least one"):
        subject.evaluate(tasks)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"lm_eval: {folder} holds no task, expected a folder with"):
            lm_eval_tasks.check(folder)
    gone = write_task(tmp_path, "multiple_choice", DOCS[:1], task="gone")
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(InputError, match="lm_eval: the data of gone can't be read"):
        subject.evaluate(tmp_path, gone)
    with pytest.raises(InputError, match="lm_eval: the tokenizer has no eos_token, expected one"):
        subject._replace(tokenizer=subject.tokenizer._replace(eos_id=None)).ours()


def test_data_beside_a_task_file_are_found_from_any_folder(
    subject: Subject, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = subject.evaluate(tasks, "multiple_choice")["tasks"]["multiple_choice"]["metrics"]
    folder, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    rows = tasks / "multiple_choice.jsonl"
    shutil.copy(rows, tmp_path / "outside.jsonl")
    for name, files in {
        "one": {"test": "one.jsonl", "train": str(rows)},
        "up": {"test": ["../outside.jsonl"], "train": "*.jsonl"},
    }.items():
        write_task(folder, "multiple_choice", DOCS[:1], task=name, dataset_kwargs={"data_files": files})
        shutil.copy(rows, folder / f"{name}.jsonl")
        lm_eval_tasks.check(folder, [name])
        assert subject.evaluate(folder, name)["tasks"][name]["metrics"] == wanted
    group = {"group": "all", "task": ["one", "up"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    assert subject.evaluate(folder, "all")["tasks"]["all"]["metrics"]["acc"]["value"] == wanted["acc"]["value"]

    # a mistake is still said with the task's file
    write_task(
        folder,
        "multiple_choice",
        DOCS[:1],
        task="one",
        dataset_kwargs={"data_files": {"test": "one.jsonl"}},
        fewshot_split=None,
        doc_to_text="{{q",
    )
    with pytest.raises(InputError, match=r"lm_eval: .*/tasks/one\.yaml: .*TemplateSyntaxError"):
        lm_eval_tasks.check(folder, ["one"])
    # and a file that is nowhere is none
    write_task(folder, "multiple_choice", DOCS[:1], task="gone", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    with pytest.raises(InputError, match="lm_eval: the data of gone can't be read"):
        lm_eval_tasks.check(folder, ["gone"])


MISTAKES = {  # in a task file -> what lm_eval, datasets or jinja say
    "column": ({"doc_to_text": "{{question}}", "doc_to_target": "nowhere"}, ""),
    "metric": ({"metric_list": [{"metric": "accuracyy"}]}, "accuracyy"),
    "split": ({"test_split": "validation"}, "validation"),
    "no split": ({"test_split": None}, ""),
    "output type": ({"output_type": "multiple_choise"}, "multiple_choise"),
    "template": ({"doc_to_text": "{{q"}, "TemplateSyntaxError"),
    "gold": ({"doc_to_target": "{{7}}"}, ""),
    "filter": ({"filter_list": [{"name": "x", "filter": [{"function": "regexx"}]}]}, ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_task_file_is_said_with_the_file(name: str, subject: Subject, tmp_path: Path) -> None:
    changes, said = MISTAKES[name]
    write_task(tmp_path, "multiple_choice", DOCS[1:3], task="mine")
    file = tmp_path / "mine.yaml"
    task = {**yaml.safe_load(file.read_text(encoding="utf-8")), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"lm_eval: .*mine\.yaml: .*{said}.*correct the task's file or its data"):
        subject.evaluate(tmp_path, "mine")
    with pytest.raises(InputError, match=rf"lm_eval: .*mine\.yaml: .*{said}.*correct the task's file or its data"):
        lm_eval_tasks.check(tmp_path, ["mine"])


def test_an_error_of_the_model_is_none_of_the_task_file(subject: Subject, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("minitune.inference.score._read", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        subject.evaluate(tasks, "multiple_choice")


def test_without_lm_eval_the_message_names_the_extra(subject: Subject, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"needs the extra eval: pip install 'minitune\[eval\]'"):
        subject.evaluate(tasks, "multiple_choice")


@settings(max_examples=12)
@given(st.data())
def test_scores_equal_a_whole_forward_for_each_pair(data: st.DataObject) -> None:
    model, params = Model(llama.FAMILY, SMALL), random_params(SMALL)
    name = "model.layers.1.mlp.down_proj.weight"
    delta = Delta(torch.ones(1, SMALL.d_ff), torch.linspace(-1, 1, SMALL.d_model)[:, None])
    adapted = Lora(rank=1, alpha=1.0, targets=(name,)).apply(params, {name: delta})
    ids, max_length = st.integers(0, SMALL.vocab_size - 1), data.draw(st.integers(4, 9))
    contexts = data.draw(st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=3))
    pairs = [
        (data.draw(st.sampled_from(contexts)), data.draw(st.lists(ids, min_size=1, max_size=max_length)))
        for _ in range(data.draw(st.integers(0, 5)))
    ]
    pairs += [(c, generate.greedy(model, adapted, [c], max_new_tokens=2, stop_ids=[])[0]) for c in contexts]
    scores = continuations(model, adapted, pairs, batch_size=data.draw(st.integers(1, 4)), max_length=max_length)
    assert len(scores) == len(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        row = torch.tensor([*context, *continuation])[-max_length - 1 :]
        with torch.no_grad():
            logps = model.forward(adapted, row[None, :-1])[0].log_softmax(-1)[-len(continuation) :]
        targets = row[-len(continuation) :]
        assert score.logp_nats == pytest.approx(float(logps.gather(1, targets[:, None]).sum()), rel=1e-5, abs=1e-5)
        assert score.greedy == torch.equal(logps.argmax(-1), targets)
    if all(len(context) + 2 <= max_length + 1 for context in contexts):
        assert all(score.greedy for score in scores[-len(contexts) :])


def test_answers_of_one_token_share_a_row_and_rows_run_from_long_to_short() -> None:
    shapes: list[tuple[int, ...]] = []

    def wrap(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(w: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            shapes.append(tuple(x.shape[:2]))
            return block(w, x, *rest)

        return counted

    model = Model(llama.FAMILY, SMALL, wrap)
    pairs = [([1, 2], [n]) for n in range(5)] + [([1], [2, 3]), ([1, 2, 3, 4], [5, 6]), ([7], [8])]
    scores = continuations(model, random_params(SMALL), pairs, batch_size=2, max_length=64)
    assert shapes[:: SMALL.n_layers] == [(2, 5), (1, 1)]
    assert math.exp(scores[3].logp_nats) < 1.0
    assert scores[0] != scores[1]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * 5)])
def test_pairs_that_have_no_score_are_refused(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(InputError, match=r"score: a context of \d and a continuation of \d tokens, expected .* 1 to 4$"):
        continuations(Model(llama.FAMILY, SMALL), random_params(SMALL), [pair], batch_size=2, max_length=4)
