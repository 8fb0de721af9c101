"""Programs: decoding, overrides, environment variables, and the resolved text that loads back equal."""

import codecs
import json
import os
import re
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import toml
from minitune.programs import program
from minitune.programs.loading import ModelSource
from minitune.programs.log import LogConfig
from minitune.programs.program import Program
from minitune.programs.stages.adapt import LoraStage
from minitune.trackers.wandb import WandbConfig
from support.paths import ROOT

pytestmark = pytest.mark.fast

TEXT = """\
# the smallest program
name = "tiny"

[model]
path = "demo"

[data.train]
path    = "demo/orders-train.jsonl"
format  = "instruct"
seq_len = 256

[[stage]]
op      = "lora"
rank    = 8
alpha   = 16
targets = ["*.self_attn.*_proj.weight"]

[[stage]]
op      = "lora"
name    = "second"
rank    = 4
alpha   = 1.5
targets = ["*"]
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(*overrides: str, text: str = TEXT) -> Program:
        (tmp_path / "p.toml").write_text(text, "utf-8")
        return program.load(tmp_path / "p.toml", overrides)

    return load


def test_load(load) -> None:
    assert load() == Program(
        name="tiny",
        model=ModelSource(path="demo"),
        data={"train": Source(path="demo/orders-train.jsonl", format="instruct", seq_len=256)},
        stage=(
            LoraStage(rank=8, alpha=16.0, targets=("*.self_attn.*_proj.weight",)),
            LoraStage(rank=4, alpha=1.5, targets=("*",), name="second"),
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank    = 8", "rnk = 8", r":14: lora.rnk is unknown, expected one of .*; did you mean 'rank'\?"),
        ("rank    = 8", "rank = 8.5", r":14: lora.rank is 8.5, expected int"),
        ('"lora"\nrank', '"loar"\nrank', r":13: stage\[0\].op is \"loar\", expected one of .*lora.*; did you mean 'lora'\?"),
        ('name = "tiny"', 'nam = "tiny"', r":2: nam is unknown, expected one of .*; did you mean 'name'\?"),
        ('name = "tiny"', "", r"p.toml: name is missing, expected str; add it"),
        ('name = "tiny"', 'name = "a/b"', r":2: name is \"a/b\", expected letters, digits, . _ - and nothing else"),
        ('name = "tiny"', 'name = ".."', r":2: name is \"..\", expected letters, digits, . _ - and nothing else"),
        ('name = "tiny"', 'name = "a\\n"', r":2: name is \"a\\n\", expected letters, digits, . _ - and nothing else"),
        ('name = "tiny"', 'name = ""', r":2: name is \"\", expected letters, digits, . _ - and nothing else"),
        ('name = "tiny"', 'name = "tiny"\nseed = -1', r":3: seed is -1, expected int >= 0"),
        ("seq_len = 256", "seqlen = 256", r":10: data.train.seqlen is unknown, expected one of .*; did you mean 'seq_len'\?"),
        ('path = "demo"', 'path = "demo', r":5: column 13: Illegal character"),
        (
            '"second"',
            '"lora"',
            r":20: stage\[1\] is called 'lora' as stage\[0\] is, expected one stage of each name; give it one",
        ),
        ('name    = "second"', "", r":18: stage\[1\] is called 'lora' as stage\[0\] is, expected one stage of each name"),
        ('"second"', '"model"', r":20: stage\[1\].name is 'model', a key of the program; choose another name"),
        ('"second"', '"LoRA"', r":20: stage\[1\] is called 'LoRA' as stage\[0\] is, expected one stage of each name"),
        ('"second"', '"aux.b"', r":20: stage\[1\].name is 'aux.b', which Windows can't have as a folder, expected another name"),
        (
            'name = "tiny"',
            'name = "Con"',
            r":2: name is 'Con', which Windows can't have as a folder, expected another name; change",
        ),
        ('name = "tiny"', 'name = "tiny."', r":2: name is 'tiny\.', which Windows can't have as a folder"),
        ('"second"', '"a/b"', r":20: stage\[1\].name is 'a/b', expected letters, digits, \. _ -"),
    ],
)
def test_errors_name_file_line_path_and_nearest_name(load, old: str, new: str, message: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(InputError, match=message) as error:
        load(text=TEXT.replace(old, new))
    assert re.match(r"program: \S+p\.toml:", str(error.value))


def test_a_program_without_stages_is_refused(load) -> None:
    with pytest.raises(InputError, match=r"p.toml: stage is missing, expected array; add it"):
        load(text=TEXT.partition("[[stage]]")[0])
    with pytest.raises(InputError, match=r":1: stage is an array of 0, expected array of length >= 1"):
        load(text="stage = []\n" + TEXT.partition("[[stage]]")[0])
    with pytest.raises(InputError, match=r":1: stage\[0\] is 3, expected table"):
        load(text="stage = [3]\n" + TEXT.partition("[[stage]]")[0])


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"program: \S+gone.toml can't be read .*, expected a TOML file in UTF-8"):
        program.load(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InputError, match=r"latin.toml can't be read .*, expected a TOML file in UTF-8"):
        program.load(tmp_path / "latin.toml")


def test_overrides_are_typed_by_the_structs(load) -> None:
    loaded = load(
        "name=2026",
        "seed = 7",
        "out=/mnt/runs dir",
        "resume=false",
        "lora.rank=3",
        "lora.alpha=2",
        'lora.targets=["*.mlp.*", "x"]',
        "second.name=third",
        "data.train.seq_len=17",
        "data.held.path=held=out.jsonl",
        "data.held.format=text",
        "data.held.seq_len=5",
        "model.path='a b'",
        'log.wandb={ project = "p", tags = ["a"] }',
        "log.wandb.mode=offline",
        "log.every=10",
    )
    assert (loaded.name, loaded.seed, loaded.out, loaded.resume) == ("2026", 7, "/mnt/runs dir", False)
    assert loaded.stage[0] == LoraStage(rank=3, alpha=2.0, targets=("*.mlp.*", "x"))
    assert loaded.stage[1] == LoraStage(rank=4, alpha=1.5, targets=("*",), name="third")
    assert loaded.data["train"].seq_len == 17
    assert (loaded.data["held"].path, loaded.data["held"].format) == ("held=out.jsonl", "text")
    assert loaded.model.path == "a b"
    assert loaded.log == LogConfig(wandb=WandbConfig(project="p", tags=["a"], mode="offline"), every=10)


def test_an_override_is_one_value_and_never_more_toml(load) -> None:
    assert load('out=1\nname = "evil"').name == "tiny"
    assert load("out=").out == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=3", r"lora.rnk is unknown, expected one of .*; did you mean 'rank'\?"),
        ("lora.rank=fast", r'lora.rank is "fast", expected int'),
        ("lora.rank=0", r"lora.rank is 0, expected int >= 1"),
        ("loar.rank=3", r"loar is unknown, expected one of lora, second, name, .*; did you mean 'lora'\?"),
        ("mdoel.path=x", r"mdoel is unknown, expected one of lora, second, name, .*; did you mean 'model'\?"),
        ("stage.0.rank=3", r"stage is unknown, expected one of lora, second, name, .*"),
        ("seed=x", r'seed is "x", expected int'),
        ("seed.x=1", r"seed is a table of 1, expected int"),
        ("name.x=1", r"name is no table, expected one that holds x"),
        ("lora.rank.x=1", r"lora.rank is no table, expected one that holds x"),
        ("lora.targets.0=x", r"lora.targets is no table, expected one that holds 0"),
        ("lora=3", r"lora is a stage, expected a key of it such as lora.name=VALUE"),
        ("lora.rank", r"expected KEY=VALUE such as seed=1 or train.steps=100"),
        ("=3", r"expected KEY=VALUE such as seed=1 or train.steps=100"),
        ("--lora.rank=3", r"expected KEY=VALUE such as .*; options have no dashes: lora.rank=3"),
        ("--lora.rank", r"options have no dashes: lora.rank=VALUE"),
        (".", r"expected KEY=VALUE such as seed=1 or train.steps=100; for a model write model.path=\."),
        (__file__, r"expected KEY=VALUE such as seed=1 or train.steps=100; for data write data.NAME.path=.*test_program.py"),
        ("lora.lora_alpha=3", r"lora.lora_alpha is unknown, expected one of .*; lora_alpha is lora.alpha here"),
        ("lora_alpha=3", r"lora_alpha is unknown, expected one of .*; lora_alpha is lora.alpha here"),
        ("lora.targets=all-linear", r"'all-linear' is one text, .* write 'lora.targets=\[\"\*_proj.weight\"\]'"),
        ("mesh={data=2,data=2}", r": Duplicate inline table key 'data', expected TOML; correct the table or the list"),
        ("lora.targets=[1 2]", r": Unclosed array, expected TOML; correct the table or the list"),
        ("lora..rank=3", r"expected KEY=VALUE such as seed=1 or train.steps=100"),
        ("data.held.format=text", r"data.held.path is missing, expected str or array; add it"),
        ("second.name=lora", r"stage\[1\] is called 'lora' as stage\[0\] is, expected one stage of each name"),
    ],
)
def test_a_wrong_override_is_named(load, override: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"program: {re.escape(repr(override))} on the command line.*{message}"):
        load(override)


def test_an_override_of_a_whole_table_is_blamed_and_not_the_line_that_it_replaced(load) -> None:
    text = TEXT.replace('path = "demo"', 'path = "demo"\nchat_template_kwargs = { a = 1 }\ndtype = "float32"')
    for override, message in (
        ('model={ path = "demo", dtype = "float8" }', r'model.dtype is "float8", expected one of'),
        ("lora.targets=[1]", r"lora.targets\[0\] is 1, expected str"),
    ):
        with pytest.raises(InputError, match=rf"program: {re.escape(repr(override))} on the command line: {message}"):
            load(override, text=text)


def test_a_key_in_a_message_can_be_typed_back(load) -> None:
    with pytest.raises(InputError, match=r": second.rank is \"x\", expected int"):
        load("second.rank=x")
    assert load("second.rank=3").stage[1].rank == 3
    with pytest.raises(InputError, match=r": stage\[0\].rank is \"x\", expected int"):  # two stages have that name
        load(text=TEXT.replace('name    = "second"', "").replace("rank    = 8", 'rank = "x"'))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_a_program_is_read_as_any_editor_writes_it(load, tmp_path: Path, mark: bytes, encoding: str, newline: str) -> None:
    def written(text: str) -> Path:
        (tmp_path / "windows.toml").write_bytes(mark + text.replace("\n", newline).encode(encoding))
        return tmp_path / "windows.toml"

    assert program.load(written(TEXT)) == load()
    wrong = written(TEXT.replace("rank    = 8", "rank    = 0"))
    with pytest.raises(InputError, match=r"windows.toml:14: lora.rank is 0, expected"):
        program.load(wrong)


def test_common_slips_are_shown_as_they_are_written(load) -> None:
    train = '[[stage]]\nop = "train"\ndata = "train"\nsteps = 1\nbatch_size = 2\n'
    with pytest.raises(InputError, match=r'train.schedule is "cosine", expected table; write \{ kind = "cosine" \}'):
        load("train.schedule=cosine", text=TEXT + train)
    with pytest.raises(InputError, match=r"stage is a table of 4, expected array.*; write \[\[stage\]\] in place of \[stage\]"):
        load(
            text=TEXT.partition('[[stage]]\nop      = "lora"\nname')[0].partition("[[stage]]")[0]
            + '[stage]\nop = "lora"\nrank = 1\nalpha = 1\ntargets = []\n'
        )


def test_an_ambiguous_override_lists_the_stages(load) -> None:
    with pytest.raises(
        InputError, match=r"lora may be stage\[0\], stage\[1\], expected one stage of that name; give the others a"
    ):
        load("lora.rank=3", text=TEXT.replace('name    = "second"', ""))


def test_environment_variables(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOUNT", "/mnt/${NOT_EXPANDED_TWICE}")
    monkeypatch.delenv("ABSENT", raising=False)
    text = TEXT.replace('path = "demo"', 'path = "${MOUNT}/m/$${MOUNT}$$x"')
    loaded = load("lora.targets=['${MOUNT}', 'b']", text=text)
    assert loaded.model.path == "/mnt/${NOT_EXPANDED_TWICE}/m/${MOUNT}$$x"
    assert loaded.stage[0].targets == ("/mnt/${NOT_EXPANDED_TWICE}", "b")
    assert load(text=program.resolved(loaded)) == loaded
    with pytest.raises(InputError, match=r"p.toml:5: model.path holds \$\{ABSENT\}, expected ABSENT to be set; export it"):
        load(text=text.replace("MOUNT", "ABSENT"))
    for broken in ("${", "${}", "${a b}", "${A"):
        with pytest.raises(
            InputError, match=r"command line: out holds '\$\{', expected \$\{NAME\}; write \$\$\{ for \$\{ itself"
        ):
            load(f"out={broken}")
    monkeypatch.setitem(os.environ, "BYTES", "\udcff")
    with pytest.raises(InputError, match=r"command line: out is '\\udcff', expected valid UTF-8"):
        load("out=${BYTES}")


words = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ["${HOME}", "$${", "$$${x}", "${", '"', "'''", "a\nb"]
)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True).filter(
    lambda name: (
        name not in Program.__struct_fields__ and not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", name)
    )
)
json_values = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=5,
)
loras = st.builds(
    LoraStage,
    rank=st.integers(1, 2**31 - 1),
    alpha=st.floats(0, 1e30, exclude_min=True),
    targets=st.lists(words, max_size=3).map(tuple),
)
wandb_configs = st.builds(
    WandbConfig,
    project=st.none() | words,
    tags=st.none() | st.lists(words, max_size=2),
    config=st.none() | st.dictionaries(words, json_values, max_size=3),
)
programs = st.builds(
    Program,
    name=names,
    seed=st.integers(0, 2**63 - 1),
    out=words,
    resume=st.none() | st.booleans(),
    model=st.builds(ModelSource, path=st.none() | words, config=st.none() | words, tokenizer=st.none() | words),
    data=st.dictionaries(
        words,
        st.builds(
            Source,
            path=words.filter(bool),
            format=st.sampled_from(["instruct", "chat", "text"]),
            seq_len=st.integers(2, 2**20),
        ),
        max_size=3,
    ),
    stage=st.lists(names, min_size=1, max_size=3, unique_by=str.casefold).flatmap(
        lambda names: st.tuples(*(loras.map(lambda lora, name=name: msgspec.structs.replace(lora, name=name)) for name in names))
    ),
    log=st.builds(LogConfig, wandb=st.none() | wandb_configs, every=st.integers(1, 2**31 - 1)),
)


# beartype, which checks the signatures, looks at a random item of a list while a Source is built
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@given(programs)
def test_a_resolved_program_loads_back_equal(tmp_path_factory, generated: Program) -> None:
    file = tmp_path_factory.mktemp("p") / "p.toml"
    text = program.resolved(generated)
    file.write_text(text, "utf-8", newline="")
    loaded = program.load(file)
    assert loaded == generated
    assert program.resolved(loaded) == text


edits = st.tuples(
    st.integers(0, len(TEXT)),
    st.integers(0, 8),
    st.sampled_from(list("[]{}=.,\"'#$ \n\\0aZ-"))
    | st.sampled_from(["[[stage]]", '"""', "${", "nan", "1e999", "\x00", "é", "stage = 3\n"]),
)


@settings(max_examples=200)
@given(st.lists(edits, min_size=1, max_size=3), st.sampled_from([(), ("lora.rank=2",), ("lora.a.b.c=2",), ("data.train=1",)]))
def test_a_mutated_program_loads_or_is_refused_in_words(tmp_path_factory, some: list[tuple[int, int, str]], overrides) -> None:
    text = TEXT
    for at, n_cut, put in some:
        text = text[:at] + put + text[at + n_cut :]
    file = tmp_path_factory.getbasetemp() / "mutated.toml"
    file.write_text(text, "utf-8", newline="")
    loaded, refusal = None, "program: "
    try:
        loaded = program.load(file, overrides)
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith("program: ")
    if loaded is not None:
        file.write_text(program.resolved(loaded), "utf-8", newline="")
        assert program.load(file) == loaded or "nan" in text


def test_resolved_writes_every_default_out(load) -> None:
    resolved = toml.parse(program.resolved(load()), "resolved")
    assert (resolved["seed"], resolved["out"], resolved["log"]) == (0, "runs", {"every": 1})
    assert "resume" not in resolved
    for name, default in msgspec.structs.asdict(Source(path="a", format="text", seq_len=2)).items():
        if name not in ("path", "format", "seq_len") and default is not None:
            assert name in resolved["data"]["train"]


def test_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(json.dumps(program.schema()))
    assert set(schema["$defs"]["Program"]["properties"]) == set(Program.__struct_fields__)
    assert schema["$defs"]["Program"]["additionalProperties"] is False


def test_steps_and_epochs_replace_one_another_in_a_stage_and_nowhere_else(tmp_path: Path) -> None:
    lora = ROOT / "programs/lora.toml"
    train = next(stage for stage in program.load(lora, ["train.epochs=2"]).stage if stage.label == "train")
    assert (train.steps, train.epochs) == (0, 2)  # pyright: ignore[reportAttributeAccessIssue]
    both = ["train.epochs=2", "train.steps=5"]
    with pytest.raises(InputError, match=r"'train.epochs=2' and 'train.steps=5' on the command line, expected one of them"):
        program.load(lora, both)
    with pytest.raises(InputError, match=r"'train.steps=5' and 'train.epochs=2' on the command line"):
        program.load(lora, both[::-1])
    words = ['log.wandb={project="p"}', "log.wandb.config={}", "log.wandb.config.epochs=3", "log.wandb.config.steps=4"]
    loaded = program.load(lora, words).log.wandb
    assert loaded is not None
    assert loaded.config == {"epochs": 3, "steps": 4}
