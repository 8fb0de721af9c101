"""The command line: verbs, exit codes, messages, and that looking is cheap."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Never

import pytest

import minitune
import minitune.__main__
from minitune import __version__
from minitune.__main__ import main
from minitune.cli import guesses
from minitune.cli.command_result import CommandResult
from minitune.cli.verbs import VERBS
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import paths, toml
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.optim.sgd import SGD
from minitune.programs import check as check_module
from minitune.programs import program, run
from minitune.programs.loading import ModelSource
from minitune.programs.program import Program
from minitune.programs.signals import Stopped, StopSignals
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState
from support.paths import ROOT
from support.scripts import run_script

# Packages that take seconds to import, and that neither a check nor a run without a logger of metrics needs.
HEAVY = {"transformers", "wandb", "pandas", "sklearn", "scipy", "pyarrow", "lm_eval", "datasets"}
TEXT = """\
# Puts deltas on the model.
# (a second line)
name = "tiny"
[model]
path = "demo"
[[stage]]
op = "lora"
rank = 8
alpha = 16.0
targets = ["*"]
"""


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as a wheel lays it out, with two programs and a config; the current folder is an empty one."""
    for name, text in {"lora": TEXT, "demo/pretrain": "name = 'bare'\n"}.items():
        file = tmp_path / "package" / "_shipped" / "programs" / f"{name}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (tmp_path / "package" / "_shipped" / "configs").mkdir()
    (tmp_path / "package" / "_shipped" / "configs" / "small.toml").write_text("", encoding="utf-8")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package" / "_shipped" / "programs"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr that a command is refused with."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out.startswith("program: ") or out == ""  # which program it was, where the file itself is sound
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m minitune PROGRAM.toml [KEY=VALUE ...]")
    assert all(f"\n  {verb.usage}\n" in out for verb in VERBS.values())
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("form", [("{}", "--help"), ("{}", "x", "-h"), ("help", "{}")])
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str, form: tuple[str, ...]) -> None:
    assert main([word.format(verb) for word in form]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m minitune {verb}")
    assert len(out.splitlines()) > 2
    assert err == ""


# a stage that is no stage and a rate that is missing do not matter to its help
HELPED = """
name = "mine"
model.path = "demo"
stage = [
    { op = "train", name = "tune", optimizer = { kind = "sgd", momentum = 0.5 } },
    { op = "unknown", unknown = 1 },
]
data.a.path = "a.jsonl"
data.b.path = "b.jsonl"
"""


@pytest.mark.usefixtures("shipped")
def test_a_program_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m minitune lora [KEY=VALUE ...]\n\nPuts deltas on the model.\n(a second line)\n")
    assert "`python -m minitune show lora` writes it with every default" in out


def test_help_of_a_program_explains_the_keys_of_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(HELPED, encoding="utf-8")
    assert main(["mine.toml", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    # every key of every table that the program has, by the name that changes it
    for prefix, kind in {"": Program, "model.": ModelSource, "data.a.": Source, "tune.": Train, "tune.optimizer.": SGD}.items():
        lines = [re.search(rf"^  {re.escape(prefix + key)}(  \(| =|$)", out, re.M) for key in kind.__struct_fields__]
        assert all(lines), prefix
    wanted = """
tune.optimizer, kind = "sgd": Gradient descent with momentum, and weight decay
in the gradient (Sutskever et al. 2013, eq. 1-4, as torch.optim.SGD).
  tune.optimizer.lr  (must be given)
      learning rate at the schedule's peak [number >= 0]
  tune.optimizer.momentum = 0.5
      share of the last step's direction that is kept: more averages longer
      [number >= 0 and < 1]
  tune.optimizer.nesterov  (default: false)
      look one step ahead along the momentum [true or false]
"""
    assert wanted in out
    assert out.endswith('\n\ndata.b: its keys are those of data.a.\n  data.b.path = "b.jsonl"\n')
    assert "unknown" not in out


def test_help_of_a_program_cuts_values_that_a_line_can_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"name = '{'x' * 200}'", encoding="utf-8")
    assert main([str(file), "--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  name"))
    assert line == f'  name = "{"x" * 66} ...'


@pytest.mark.parametrize(
    ("started_as", "me"),
    [("/usr/bin/minitune", "minitune"), ("C:/x/minitune.exe", "minitune"), ("/x/minitune/__main__.py", "python -m minitune")],
)
def test_help_names_the_command_as_it_was_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started_as: str, me: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    for words in (["--help"], ["check", "--help"], ["download", "--help"], ["lora", "--help"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith(f"usage: {me} ")


@pytest.mark.parametrize("word", guesses.HINTS)
def test_what_people_type_first_is_answered_in_one_sentence(capsys: pytest.CaptureFixture[str], word: str) -> None:
    err = refused(capsys, word)
    assert err.startswith(f"minitune: {word} is no file, no verb and no shipped program; ")
    assert len(err) < 300


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (
            "model:\n  _component_: torchtune.models.x\n",
            "is a torchtune config, .*; docs/from-torchtune.md says what",
        ),
        ("adapter: lora\nbase_model: x/y\n", "is an Axolotl config, .*; docs/from-trl.md says"),
        ("model_name_or_path: x/y\n", "is a config of TRL or LLaMA-Factory, .*; docs/from-trl.md says"),
        ("a: [base_model, \xff]\n", "is a YAML file, expected a program in TOML; begin with `.* cp lora mine.toml`"),
    ],
)
def test_a_yaml_file_as_program_is_named_by_its_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, end: str
) -> None:
    (tmp_path / "c.YAML").write_text(text, encoding="latin-1")
    for verb in ([], ["check"], ["run"]):
        assert re.match(rf"minitune: .*c\.YAML {end}", refused(capsys, *verb, str(tmp_path / "c.YAML")))


def test_hints_name_verbs_and_programs_that_exist() -> None:
    assert all((ROOT / page).is_file() for _, _, page in guesses.YAML_TOOLS)
    known = {*VERBS, *paths.shipped(), "PROGRAM.toml", "--version"}
    for sentence in guesses.NAMES.values():
        named = re.findall(r"\{me\} ([\w.-]+)", sentence)
        assert set(named) <= known, sentence
        assert all((ROOT / file).is_file() for file in re.findall(r"programs/\w+\.toml", sentence))
    assert not {*guesses.HINTS} & {*VERBS, *paths.shipped()}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minitune {__version__}\n"


@pytest.mark.usefixtures("shipped")
def test_ls_shows_the_first_comment_of_each_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert capsys.readouterr().out == "demo/pretrain\nlora           Puts deltas on the model.\n"


@pytest.mark.usefixtures("shipped")
def test_cp_copies_and_never_overwrites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "lora", "mine.toml"]) == 0
    assert Path("mine.toml").read_text(encoding="utf-8") == TEXT
    Path("folder").mkdir()
    assert main(["cp", "programs/demo/pretrain.toml", "folder"]) == 0
    assert Path("folder/pretrain.toml").is_file()
    assert capsys.readouterr().out == "mine.toml\nfolder/pretrain.toml\n"
    Path("mine.toml").write_text("edited", encoding="utf-8")
    assert "minitune: mine.toml exists, expected a new file; nothing was copied" in refused(capsys, "cp", "lora", "mine.toml")
    assert Path("mine.toml").read_text(encoding="utf-8") == "edited"
    assert "minitune: absent is no folder, expected one that exists" in refused(capsys, "cp", "lora", "absent/mine.toml")
    assert "minitune: cp lora, expected cp NAME DEST" in refused(capsys, "cp", "lora")


def test_programs_are_found_by_path_and_by_shipped_name(shipped: Path) -> None:
    for name in ("lora", "lora.toml", "programs/lora", "programs/lora.toml"):
        assert paths.program_file(name) == shipped / "lora.toml"
    assert paths.program_file("demo/pretrain.toml") == shipped / "demo" / "pretrain.toml"
    Path("lora.toml").write_text("", encoding="utf-8")
    assert paths.program_file("lora.toml") == Path("lora.toml")
    assert paths.program_file("absent.toml") == Path("absent.toml")


def test_programs_and_configs_of_a_checkout_stand_beside_the_package() -> None:
    root = Path(minitune.__file__).parent.parent
    assert paths.shipped("configs") == {
        str(path.relative_to(root / "configs"))[: -len(".toml")]: path for path in (root / "configs").rglob("*.toml")
    }
    assert len(paths.shipped("configs")) > 0


def test_paths_in_programs(shipped: Path) -> None:
    package = shipped.parent.parent
    assert paths.locate("demo") == package / "demo" / "model"
    assert paths.locate("demo/orders-train.jsonl") == package / "demo" / "orders-train.jsonl"
    assert paths.locate("./demo") == Path("demo")
    assert paths.locate("data/x.jsonl") == Path("data/x.jsonl")
    assert paths.locate("~/x") == Path.home() / "x"
    assert paths.locate("configs/small.toml") == package / "_shipped" / "configs" / "small.toml"
    Path("configs").mkdir()
    Path("configs/small.toml").write_text("", encoding="utf-8")
    assert paths.locate("configs/small.toml") == Path("configs/small.toml")


def test_show_prints_the_resolved_program(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "lora", "lora.rank=3", "seed=4"]) == 0
    out = capsys.readouterr().out
    loaded = program.load(shipped / "lora.toml", ["lora.rank=3", "seed=4"])
    assert toml.parse(out, "shown") == toml.parse(program.resolved(loaded), "resolved")
    for absent in ("resume", "config", "deltas", "name", "wandb"):  # what has no value is there to be found
        assert f"\n# {absent} =\n" in f"{out}\n"
    assert toml.parse(out, "shown")["seed"] == 4


def test_check_prints_findings_or_the_error(
    shipped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(source: Any, sources: Any, stages: Any, say: Any) -> check_module.Checked:
        if stages[0].rank == 1:
            raise InputError("lora: target 'x' matches no weight")
        lines = [f"model: {source.path}", f"data: {len(sources)}"]
        return check_module.Checked(lines, {}, [], AbstractState({}, Model(FAMILIES["llama"], None), {}))

    monkeypatch.setattr(check_module, "check", check)
    assert main(["check", "lora"]) == 0
    assert capsys.readouterr().out == f"program: {shipped / 'lora.toml'}\nmodel: demo\ndata: 0\n"
    assert refused(capsys, "check", "lora", "lora.rank=1") == "lora: target 'x' matches no weight\n"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(program.schema()))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["lroa"],
            "minitune: lroa is no file, no verb and no shipped program; did you mean 'lora'? "
            "`python -m minitune ls` lists the programs, --help the verbs",
        ),
        (["programs/lroa.toml"], "did you mean 'lora'?"),
        (["shwo", "lora"], "did you mean 'show'?"),
        (["--verbose"], "minitune: --verbose is no file, no verb and no shipped program; `python -m minitune ls` lists"),
        (["show", "lroa"], "did you mean 'lora'?"),
        (["show"], "minitune: show without a program, expected show PROGRAM [KEY=VALUE ...]"),
        (["check"], "minitune: check without a program, expected check PROGRAM [KEY=VALUE ...]"),
        (["ls", "x"], "minitune: ls x, expected ls alone"),
        (["schema", "x"], "minitune: schema x, expected schema alone"),
        (["lora", "lora.rnk=1"], "program: 'lora.rnk=1' on the command line: lora.rnk is unknown, expected one of"),
        (["check", "nowhere"], "minitune: nowhere is no file"),
        (["demo/pretrain"], "pretrain.toml: model is missing, expected table; add it"),
    ],
)
def test_what_the_user_must_change_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, *words)


@pytest.mark.usefixtures("shipped")
def test_a_run_gets_the_loaded_program(monkeypatch: pytest.MonkeyPatch, shipped: Path) -> None:
    ran: list[program.Program] = []
    monkeypatch.setattr(run, "run_program", lambda loaded, stop, end, written: ran.append(loaded))
    assert main(["programs/lora.toml", "lora.rank=5"]) == 0
    assert ran == [program.load(shipped / "lora.toml", ["lora.rank=5"])]


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def run_program(loaded: program.Program, stop: StopSignals, end: None, written: dict) -> Never:
        stop.number = number
        raise Stopped(7, Path("runs/tiny"))

    monkeypatch.setattr(run, "run_program", run_program)
    assert main(["lora"]) == code
    assert capsys.readouterr().err == "stopped at step 7, saved in runs/tiny; run the same command to continue\n"


@pytest.mark.usefixtures("shipped")
def test_an_interrupted_run_ends_in_silence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_program(loaded: program.Program, stop: StopSignals, end: None, written: dict) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_program", run_program)
    assert main(["lora"]) == 130
    assert capsys.readouterr().err == ""


def test_the_process_ends_with_the_exit_code_however_late_an_interrupt_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted() -> Never:
        raise KeyboardInterrupt

    for ended, code in ((lambda: 3, 3), (interrupted, 130)):
        monkeypatch.setattr(minitune.__main__, "main", ended)
        with pytest.raises(SystemExit) as end:
            minitune.__main__.start()
        assert end.value.code == code
        monkeypatch.setattr(minitune.__main__, "main", main)
        signal.signal(signal.SIGINT, before)


INTERRUPTED_IMPORT = """
import runpy, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "msgspec":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
sys.argv = ["minitune", "ls"]
runpy.run_module("minitune", run_name="__main__")
"""


def test_an_interrupt_while_modules_are_imported_ends_in_silence() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_closed_stdout_and_a_narrow_encoding_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["ls"]) == 0
    sys.stdout.close()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setitem(VERBS, "ls", VERBS["ls"]._replace(run=lambda words: CommandResult(sys.stdout.write("é\n"))))
    assert main(["ls"]) == 0
    assert written.getvalue() == b"\\xe9\n"


def test_looking_needs_no_torch() -> None:
    look = "import sys; from minitune.__main__ import main; codes = [main([word]) for word in ('--help', 'ls', 'lroa')]; "
    torch_is_missing = "sys.exit('torch' in sys.modules or codes != [0, 0, 2])"
    subprocess.run([sys.executable, "-c", look + torch_is_missing], check=True, stdout=subprocess.DEVNULL)


def test_python_m_minitune(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minitune", "absent.toml"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("minitune: absent.toml is no file, no verb and no shipped program; ")


@pytest.mark.parametrize("words", [["ls"], ["schema"], ["check", "lora"]])
def test_a_reader_that_goes_away_ends_the_command_in_silence(words: list[str]) -> None:
    command = [sys.executable, "-m", "minitune", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # 128 + SIGPIPE, as a shell shows it


def test_check_speaks_before_torch_is_there_and_compiles_nothing() -> None:
    """Its first line stands before torch is imported, and all of it loads nothing that is heavy."""
    code, text, with_torch, imported, n_graphs = json.loads(run_script("cli_imports", "check", "programs/lora.toml"))
    assert (code, text, with_torch) == (0, "program: programs/lora.toml\n", False)
    assert "torch" in imported
    assert not (HEAVY | {"sympy", "torch._dynamo"}) & set(imported)
    assert n_graphs == 0


def test_a_run_imports_and_compiles_little_before_its_first_step(tiny: Path, tmp_path: Path) -> None:
    """What a user waits for before the first step, counted in modules and graphs, which are the same on every machine."""
    words = ["lora", f"out={tmp_path}", "train.steps=1", "train.batch_size=1", "before.limit=1", "after.limit=1"]
    words += ["before.max_new_tokens=1", "after.max_new_tokens=1"]
    words += [f"data.{name}.path={tiny}/orders-{name}.jsonl" for name in ("train", "heldout")]
    printed = run_script("cli_imports", *words, XDG_CACHE_HOME=str(tmp_path / "cache"))
    code, text, with_torch, imported, n_graphs = json.loads(printed)
    assert (code, text, with_torch) == (0, f"program: {paths.program_file('lora')}\n", False)
    assert not (HEAVY | {"sympy", "torch._dynamo"}) & set(imported)
    assert n_graphs == 0  # on a CPU blocks run as they are: compiling them takes longer than a short run
