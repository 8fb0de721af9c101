"""Folders in and out, and what a crash, a cut file or a wrong tensor does."""

import contextlib
import errno
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitune import checkpoint, models, tree
from minitune.checkpoint.generation_config import end_ids
from minitune.checkpoint.tensors import WORDS
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.atomic import atomic_folder, write_atomic
from minitune.models import Model, rope_scaling
from minitune.models.families import llama
from minitune.models.weights import shapes
from minitune.programs.loading import ModelSource, abstract_state
from minitune.programs.state import AbstractState
from minitune.types import Delta
from support.allocation import AllocatedBytes
from support.faults import Faults, Killed
from support.models import SMALL, configs, random_batch, random_params, reference, save_reference

MODEL = Model(llama.FAMILY, SMALL)
DEMO = paths.PACKAGE / "demo/model"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """Files whose bytes must be carried over; their content does not matter here."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\x00\xffbytes")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}', encoding="utf-8")
    return folder


def save(folder: Path, params: dict[str, torch.Tensor], tokenizer: Path, model: Model = MODEL, **options: Any) -> None:
    fields = {name: options.pop(name) for name in ("source", "template", "stop_ids") if name in options}
    extras = checkpoint.FolderExtras(**{"tokenizer": tokenizer, "stop_ids": [3], **fields})
    checkpoint.save_folder(folder, params, model, extras, **options)


@settings(max_examples=8)
@given(
    config=configs(), seed=st.integers(0, 2**32), dtype=st.sampled_from([torch.float32, torch.bfloat16]), sharded=st.booleans()
)
def test_what_is_saved_loads_in_transformers_with_the_same_logits(
    config: llama.Config, seed: int, dtype: torch.dtype, sharded: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved") / "model"
    params, tokens = random_params(config, seed, dtype), random_batch(config, 2, 9, seed).tokens
    save(folder, params, folder.parent, Model(llama.FAMILY, config), shard_bytes=300 if sharded else 10**9)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    hf, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted = hf.eval()(tokens).logits
    # on a processor that does not multiply bfloat16 the logits are float32
    logits = Model(llama.FAMILY, config).forward(params, tokens).float()
    torch.testing.assert_close(
        logits, wanted.float(), rtol=0, atol=1e-5 * float(wanted.abs().max()) if dtype == torch.float32 else 0.1
    )
    assert models.open(folder).config == config
    back = checkpoint.load_params(folder, shapes(config))
    assert list(back) == list(params)
    assert all(torch.equal(back[name], params[name]) for name in params)


DTYPES = st.sampled_from(list(WORDS))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random bytes as any dtype: scalars, empty ones, and views that are not contiguous."""
    shape, dtype = draw(st.lists(st.integers(0, 5), max_size=3)), draw(DTYPES)
    n = dtype.itemsize * torch.Size(shape).numel()
    values = torch.frombuffer(bytearray(draw(st.binary(min_size=n + 16, max_size=n + 16))), dtype=torch.uint8)[:n]
    x = (values % 2).bool() if dtype == torch.bool else values.view(dtype)
    x = x.reshape(shape)
    return {"as it is": x, "transposed": x.mT if x.ndim > 1 else x, "every second": x[::2] if x.ndim else x}[
        draw(st.sampled_from(["as it is", "transposed", "every second"]))
    ]


def same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    bits = [torch.cat([z.reshape(-1)]).view(torch.uint8) for z in (x, y)]
    return (x.dtype, x.shape) == (y.dtype, y.shape) and bits[0].equal(bits[1])


@given(named=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), tensors(), max_size=6))
def test_tensors_are_written_as_the_library_writes_them(
    named: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    named.pop("__metadata__", None)
    checkpoint.save_tensors(folder / "ours", named)
    save_file({name: x.contiguous() for name, x in named.items()}, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    for read in (load_file, checkpoint.load_tensors):
        back = read(folder / "ours")
        assert set(back) == set(named)
        assert all(same_bytes(back[name], x) for name, x in named.items())


def test_a_dtype_without_a_name_in_the_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex128"):
        checkpoint.save_tensors(tmp_path / "file", {"x": torch.zeros(1, dtype=torch.complex128)})


def test_writing_copies_one_tensor_at_a_time() -> None:
    n_bytes = 2**16
    params = {f"{i}": torch.full((256, n_bytes // 256), i, dtype=torch.int8).T for i in range(6)}
    assert not params["0"].is_contiguous()  # so that each of them is copied
    with AllocatedBytes() as allocated:
        written = sum(memoryview(piece).nbytes for piece in checkpoint.serialized(params))
    assert written > 6 * n_bytes
    assert allocated.peak == 2 * n_bytes  # the piece in hand and the one being made
    with AllocatedBytes() as allocated:
        pieces = list(checkpoint.serialized(params))
    assert allocated.peak == 6 * n_bytes == sum(memoryview(piece).nbytes for piece in pieces[1:])


@settings(max_examples=6)
@given(config=configs(), seed=st.integers(0, 2**32))
def test_what_transformers_saved_is_loaded_whole(
    config: llama.Config, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("theirs")
    params = random_params(config, seed)
    save_reference(config, params, folder)
    model = models.open(folder)
    assert model.config == config
    back = checkpoint.load_params(folder, model.shapes())
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_the_4x_spelling_of_config_json_is_read_alike(tmp_path: Path) -> None:
    config = llama.Config(
        **{f: getattr(SMALL, f) for f in SMALL.__struct_fields__} | {"rope_scaling": rope_scaling.Llama3(8.0, 1.0, 4.0, 13)}
    )
    hf = llama.FAMILY.to_hf(config)
    for kept in ("rope_parameters", "rope_theta rope_scaling"):
        one = {k: v for k, v in hf.items() if not k.startswith("rope") or k in kept.split()}
        (tmp_path / "config.json").write_text(json.dumps(one), encoding="utf-8")
        assert models.open(tmp_path).config == config
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "llama3"
    assert llama.FAMILY.from_hf(
        {**hf, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    ).rope_scaling == rope_scaling.LinearScaling(2.0)


def test_config_json_passes_through_and_generation_stops_where_training_did(tmp_path: Path, tokenizer_folder: Path) -> None:
    params = random_params(SMALL)
    save_reference(SMALL, params, tmp_path / "source")
    original = json.loads((tmp_path / "source/config.json").read_text(encoding="utf-8"))
    original["_name_or_path"] = "somebody/something"
    (tmp_path / "source/config.json").write_text(json.dumps(original), encoding="utf-8")
    half = tree.map(torch.Tensor.bfloat16, params)
    save(tmp_path / "out", half, tokenizer_folder, source=tmp_path / "source", stop_ids=[2, 7], template="{{ bos_token }}")
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8")) == {**original, "dtype": "bfloat16"}
    generation = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))
    theirs = json.loads((tmp_path / "source/generation_config.json").read_text(encoding="utf-8"))
    assert generation == {**theirs, "eos_token_id": [2, 7]}  # 2 is LlamaConfig's own
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert (tmp_path / "out/chat_template.jinja").read_text(encoding="utf-8") == "{{ bos_token }}"


def test_a_folder_without_generation_config_goes_on_stopping_where_its_config_says(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    params = random_params(SMALL)
    save_reference(SMALL, params, tmp_path / "source")
    (tmp_path / "source/generation_config.json").unlink()
    config = json.loads((tmp_path / "source/config.json").read_text(encoding="utf-8"))
    for in_config, wanted in (([5, 7], [5, 7, 2]), (5, [5, 7, 2]), (None, [7, 2]), (7, [7, 2])):
        (tmp_path / "source/config.json").write_text(json.dumps({**config, "eos_token_id": in_config}), encoding="utf-8")
        save(tmp_path / "out", params, tokenizer_folder, source=tmp_path / "source", stop_ids=[7, 2])
        assert json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8")) == {"eos_token_id": wanted}


def test_loading_is_memory_mapped(tmp_path: Path) -> None:
    config = llama.Config(n_layers=1, n_heads=2, n_kv_heads=2, d_model=512, d_head=64, d_ff=8, vocab_size=40_000)
    big = Model(llama.FAMILY, config)
    save_file({name: torch.zeros(shape) for name, shape in big.shapes().items()}, tmp_path / "model.safetensors")
    mapped = str((tmp_path / "model.safetensors").resolve())
    before = _resident_bytes()
    params = checkpoint.load_params(tmp_path, big.shapes())
    assert mapped in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert _resident_bytes() - before < tree.n_bytes(params) / 10
    assert float(params["lm_head.weight"].abs().sum()) == 0.0
    assert _resident_bytes() - before > tree.n_bytes(params) / 4


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = change({name: w.clone() for name, w in load_file(folder / "model.safetensors").items()})
        save_file(tensors, folder / "model.safetensors")

    return apply


def sharded(index: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(
            index if isinstance(index, str) else json.dumps(index), encoding="utf-8"
        )

    return apply


def twice(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "a.safetensors")
    sharded({"weight_map": {NORM: "model.safetensors", "lm_head.weight": "a.safetensors"}})(folder)


def header(start: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(start + bytes(8))


def described(entries: dict[str, Any]) -> Callable[[Path], None]:
    text = json.dumps(entries).encode()
    return header(len(text).to_bytes(8, "little") + text)


NORM = "model.norm.weight"
BROKEN = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"holds neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "cut file": (cut, r"model\.safetensors is no whole safetensors file"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 pickle"), "is no whole safetensors file"),
    "missing tensor": (rewrite(lambda t: {k: v for k, v in t.items() if k != NORM}), r"lacks model\.norm\.weight and 0 more"),
    "extra tensor": (
        rewrite(lambda t: {**t, "score.weight": torch.zeros(2)}),
        r"holds score\.weight, which this model does not have",
    ),
    "wrong shape": (rewrite(lambda t: {**t, NORM: torch.zeros(7)}), r"holds model\.norm\.weight of shape \[7\], expected \[12\]"),
    "integers": (rewrite(lambda t: {**t, NORM: torch.zeros(12, dtype=torch.int8)}), r"as .*int8.*, expected floating point"),
    "index to nowhere": (sharded({"weight_map": {NORM: "a.safetensors"}}), r"a\.safetensors does not exist, but .* points to it"),
    "index outside": (
        sharded({"weight_map": {NORM: "../a.safetensors"}}),
        r"points to '\.\./a\.safetensors', expected a file name",
    ),
    "index of numbers": (
        sharded({"weight_map": {NORM: 3}}),
        r"index\.json can't be read \(Expected `str`, got `int`.*, expected a JSON object",
    ),
    "index without map": (sharded({}), r"index\.json can't be read \(Object missing required field `weight_map`\)"),
    "index no JSON": (sharded("{"), r"index\.json can't be read"),
    "index of a deep nest": (sharded("[" * 10_000), r"index\.json can't be read"),
    "index to another shard": (
        sharded({"weight_map": {NORM: "model.safetensors", "gone.weight": "model.safetensors"}}),
        r"model\.safetensors lacks gone\.weight, which model\.safetensors\.index\.json says it holds; download both again",
    ),
    "a tensor twice": (twice, r"model\.safetensors holds .*, which a file before it holds too; download both again"),
    "header too long": (header(b"\xff" * 8), r"\(its header should have 18446744073709551615 bytes, the file has \d+\)"),
    "header no JSON": (header((8).to_bytes(8, "little") + b"[" * 8), r"\(its header is no table of tensors: "),
    "header of another kind": (
        header((8).to_bytes(8, "little") + b'{"a": 1}'),
        r"\(its header is no table of tensors: Expected `object`, got `int`",
    ),
    "shape and bytes apart": (
        described({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        r"\(a F32\[2\] has bytes \[0, 4\]\)",
    ),
    "unknown dtype": (described({"a": {"dtype": "F5", "shape": [], "data_offsets": [0, 4]}}), r"\(a has dtype 'F5'\)"),
    "a hole": (
        described({"a": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}}),
        r"\(a begins at byte \d+, expected \d+\)",
    ),
    "bytes after the last": (described({}), r"\(its tensors end at byte \d+, the file at \d+\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_file_and_tensor(name: str, tmp_path: Path) -> None:
    save_reference(SMALL, random_params(SMALL), tmp_path)
    checkpoint.load_params(tmp_path, MODEL.shapes())
    damage, message = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        checkpoint.load_params(tmp_path, MODEL.shapes())


def test_buffers_and_a_repeated_tied_head_are_left_out(tmp_path: Path) -> None:
    config = llama.Config(**{f: getattr(SMALL, f) for f in SMALL.__struct_fields__} | {"tie_embeddings": True})
    params = random_params(config)
    extra = {
        "lm_head.weight": params["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
    }
    save_file({**params, **extra}, tmp_path / "model.safetensors")
    assert set(checkpoint.load_params(tmp_path, shapes(config))) == set(params)


CONFIG_ERRORS = {
    "unknown field": ({"attn_logit_softcapping": 50.0}, "has 'attn_logit_softcapping' = 50.0, unknown to the llama family"),
    "activation": ({"hidden_act": "gelu"}, "expected hidden_act 'silu'"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0"),
    "family": ({"model_type": "mamba"}, "is of family 'mamba', expected one of llama"),
    "scaling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn'.*`factor`"),
    "heads": ({"num_key_value_heads": 3}, "n_heads 4 is no multiple of n_kv_heads 3"),
    "odd head": ({"head_dim": 5}, "d_head 5 is odd"),
    "missing": ({"vocab_size": None}, r"Expected `int`, got `null` - at `\$\.vocab_size`"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_a_config_json_that_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    change, message = CONFIG_ERRORS[name]
    (tmp_path / "config.json").write_text(json.dumps({**llama.FAMILY.to_hf(SMALL), **change}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        models.open(tmp_path)


def test_a_generation_config_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    for text in ("{", "[]", "\xff", "[" * 10_000):
        (tmp_path / "model/generation_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=r"generation_config\.json can't be read \(.*\), expected a JSON object; download"):
            abstract_state(ModelSource(path=str(tmp_path / "model")), AbstractState({}, MODEL, {}))


END_IDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "a list": ([6, 2, 9], 3, (6, 2, 9)),
    "one": (9, [3], (9,)),
    "none, so config.json's": (None, [3, 4], (3, 4)),
    "no file, so config.json's": (..., 3, (3,)),
    "nowhere": (..., None, ()),
}


@pytest.mark.parametrize("name", END_IDS)
def test_end_ids_are_those_of_generation_config_else_of_config(name: str, tmp_path: Path) -> None:
    said, in_config, expected = END_IDS[name]
    config = {**llama.FAMILY.to_hf(SMALL), "eos_token_id": in_config}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if said is not ...:
        content = json.dumps({"eos_token_id": said, "do_sample": True})
        (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert end_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", [[2]], [-1], [2.5], True, 2**31, {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_ids_that_are_no_token_ids_are_refused(value: Any, file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama.FAMILY.to_hf(SMALL)), encoding="utf-8")
    content = json.loads((tmp_path / file).read_text(encoding="utf-8")) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps({**content, "eos_token_id": value}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{file} eos_token_id: .*, expected a token id or a list of them; correct it"):
        end_ids(tmp_path)


def test_a_config_json_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an empty folder, expected a Hugging Face folder"):
        models.open(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"models: .*config\.json can't be read .*, expected a JSON object; download it"):
        models.open(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json can't be read \(Expected `object`, got `array`\)"):
        models.open(tmp_path)


# training state


STATE = {"trainable": {"w": Delta(torch.arange(6.0).view(2, 3), torch.ones(4, 2))}, "opt_state": (None, torch.tensor(7))}


def test_a_state_comes_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        checkpoint.save_state(tmp_path, step, tree.map(lambda x, s=step: x + s, STATE), {"cursor": [1, step]}, keep=9)
    assert [p.name for p in checkpoint.list_states(tmp_path)] == [
        "step-00000005",
        "step-00000010",
        "step-00000015",
        "step-100000000",
    ]
    state, meta = checkpoint.load_state(checkpoint.list_states(tmp_path)[1], STATE)
    assert (meta["step"], meta["cursor"]) == (10, [1, 10])
    assert type(state["trainable"]["w"]) is Delta
    tree.map(lambda x, y: torch.testing.assert_close(x, y + 10, rtol=0, atol=0), state, STATE)
    checkpoint.save_state(tmp_path, 100_000_001, STATE, {}, keep=2)
    assert [p.name for p in checkpoint.list_states(tmp_path)] == ["step-100000000", "step-100000001"]


def moved(step: int) -> Any:
    return tree.map(lambda x: x + step, STATE)


def step_of(path: Path) -> int:
    state, meta = checkpoint.load_state(path, STATE)
    assert state["opt_state"][1] == 7 + meta["step"]
    return meta["step"]


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")], ids=str)
@pytest.mark.parametrize("step", [3, 2])  # a new one, and one that takes the place of another
def test_a_save_that_dies_at_any_operation_loses_no_committed_state(step: int, error: BaseException, tmp_path: Path) -> None:
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        for earlier in (1, 2):
            checkpoint.save_state(folder, earlier, moved(earlier), {})
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, error)
            with contextlib.suppress(Killed, OSError, InputError):
                checkpoint.save_state(folder, step, moved(step), {})
        steps = [step_of(path) for path in checkpoint.list_states(folder)]
        assert steps in ([1, 2], [1, 2, 3], [2, 3])
        checkpoint.save_state(folder, step, moved(step), {})
        assert [step_of(path) for path in checkpoint.list_states(folder)] == ([2, 3] if step == 3 else [1, 2])
        assert sorted(folder.iterdir()) == checkpoint.list_states(folder)
        if faults.left > 0:
            break
    assert k > 15


def test_a_folder_that_can_not_be_replaced_stays_and_a_killed_replacement_is_put_right(tmp_path: Path) -> None:
    def write(content: bytes) -> None:
        with atomic_folder(tmp_path / "model") as aside:
            write_atomic(aside / "file", content)

    for error, k in itertools.product((OSError(errno.EIO, "broken"), Killed()), range(1, 20)):
        write(b"old!")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError, Killed):
            Faults(patch, k, error)
            write(b"new!")
        if isinstance(error, OSError):  # at once; after a kill, the next writer finds what was set aside
            assert (tmp_path / "model/file").read_bytes() in (b"old!", b"new!")
        with contextlib.suppress(RuntimeError), atomic_folder(tmp_path / "model"):
            raise RuntimeError
        assert (tmp_path / "model/file").read_bytes() in (b"old!", b"new!")


def test_a_full_disk_is_told_before_and_while_writing(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path, 1, STATE, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 57, 43))
        with pytest.raises(InputError, match=r"io: .*step-00000002 needs 64 bytes for the training state, its disk has 43 free"):
            checkpoint.save_state(tmp_path, 2, STATE, {})
        with pytest.raises(InputError, match=r"io: .*out needs 12,528 bytes for the weights, its disk has 43 free"):
            save(tmp_path / "out", random_params(SMALL), tmp_path)
        write_atomic(tmp_path / "file", b"content")
        Faults(patch, 2, OSError(errno.EDQUOT, "quota"))
        with pytest.raises(
            InputError, match=r"io: .*file does not fit on its disk, where 43 bytes are free, expected more; what was"
        ):
            write_atomic(tmp_path / "file", b"another")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in checkpoint.list_states(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("n_kib", [8, 24, 40, 64, 128])
def test_a_small_disk_keeps_what_it_holds(n_kib: int, tmp_path: Path) -> None:
    """On a real one: a tmpfs of n_kib, where states of 12 KiB are saved until no more fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={n_kib}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        state, steps, errors = {"w": torch.arange(3072.0)}, [], []
        for step in range(1, 5):
            try:
                checkpoint.save_state(disk, step, state, {}, keep=3)
                steps.append(step)
            except InputError as error:
                errors.append(str(error))
            states = checkpoint.list_states(disk)
            assert [checkpoint.load_state(path, state)[1]["step"] for path in states] == steps[-3:]
            assert all(torch.equal(checkpoint.load_state(path, state)[0]["w"], state["w"]) for path in states)
        assert all(re.search(r"needs 12,288 bytes .* has [\d,]+ free|does not fit on its disk", line) for line in errors)
        assert (errors == []) == (n_kib >= 128)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_every_flipped_bit_of_a_state_is_found(tmp_path: Path) -> None:
    path = checkpoint.save_state(tmp_path, 1, STATE, {})
    file = path / "state.safetensors"
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(0, 8 * len(whole), (50,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(flipped))
        with pytest.raises(InputError, match="does not match its sha256; remove"):
            checkpoint.load_state(path, STATE)
    file.write_bytes(whole)
    checkpoint.load_state(path, STATE)


def test_a_state_of_another_program_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save_state(tmp_path, 1, STATE, {})
    with pytest.raises(InputError, match=r"differ in trainable\.v"):
        checkpoint.load_state(path, {**STATE, "trainable": {**STATE["trainable"], "v": torch.ones(1)}})
    with pytest.raises(InputError, match=r"holds opt_state\.1 torch\.int64\[\], expected torch\.float32\[\]"):
        checkpoint.load_state(path, {**STATE, "opt_state": (None, torch.tensor(7.0))})
    with pytest.raises(InputError, match=r"can't be read"):
        checkpoint.load_state(tmp_path / "step-00000009", STATE)


def test_atomic_writes_replace_whole_files_and_folders(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomic(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        with atomic_folder(tmp_path / "folder") as aside:
            (aside / content.decode()).write_bytes(content)
        assert [p.name for p in (tmp_path / "folder").iterdir()] == [content.decode()]

    def fails_midway() -> None:
        with atomic_folder(tmp_path / "folder") as aside:
            (aside / "three").write_bytes(b"three")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails_midway()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_model_saved_over_its_own_memory_map_is_whole(tmp_path: Path, tokenizer_folder: Path) -> None:
    params = random_params(SMALL)
    save(tmp_path / "model", params, tokenizer_folder)
    mapped = checkpoint.load_params(tmp_path / "model", MODEL.shapes())
    save(tmp_path / "model", mapped, tokenizer_folder, source=tmp_path / "model")
    back = checkpoint.load_params(tmp_path / "model", MODEL.shapes())
    assert all(torch.equal(back[name], params[name]) for name in params)
    shutil.rmtree(tmp_path / "model")
    assert all(torch.equal(mapped[name], params[name]) for name in params)


def test_the_reference_is_really_another_implementation() -> None:
    assert type(reference(SMALL, random_params(SMALL))).__module__.startswith("transformers.")


def saved(folder: Path, **fields: Any) -> tuple[Model, dict[str, torch.Tensor]]:
    """Folder of a small random model, which is given too."""
    model = Model(llama.FAMILY, msgspec.structs.replace(SMALL, **fields))
    params = random_params(model.config)
    checkpoint.save_folder(folder, params, model, checkpoint.FolderExtras(DEMO, [3]))
    return model, params


def add_tensors(folder: Path, more: dict[str, torch.Tensor], drop: Collection[str] = ()) -> None:
    stored = {**load_file(folder / "model.safetensors"), **more}
    save_file({name: w for name, w in stored.items() if name not in drop}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(dtype: Any, tmp_path: Path) -> None:
    model, params = saved(tmp_path / "tied", tie_embeddings=True)
    add_tensors(tmp_path / "tied", {"lm_head.weight": params["model.embed_tokens.weight"].clone()})
    assert set(checkpoint.load_params(tmp_path / "tied", model.shapes(), dtype)) == set(params)
    changed = params["model.embed_tokens.weight"].clone()
    changed[-1, -1] += 0.25
    add_tensors(tmp_path / "tied", {"lm_head.weight": changed})
    with pytest.raises(InputError, match="tie_word_embeddings = true, expected one of both; set it to false to keep"):
        checkpoint.load_params(tmp_path / "tied", model.shapes(), dtype)


FP8_SCALES = {"one": (), "one in a list": (1,), "rows": (-1,), "a column": (-1, 1), "blocks": "blocks"}


@pytest.mark.parametrize("kind", FP8_SCALES)
def test_fp8_weights_are_dequantized_by_their_scales(kind: str, tmp_path: Path) -> None:
    model, params = saved(tmp_path / "fp8", d_ff=131, d_model=130)
    name = "model.layers.0.mlp.down_proj.weight"  # [130, 131]: two blocks each way, of which the last are cut
    codes = params[name].to(torch.float8_e4m3fn)
    n_rows, n_columns = codes.shape
    shape = (2, 2) if kind == "blocks" else tuple(n_rows if n == -1 else n for n in FP8_SCALES[kind])
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    end = "weight_scale_inv" if kind == "blocks" else "weight_scale"
    stem = name.removesuffix("weight")
    add_tensors(tmp_path / "fp8", {name: codes, f"{stem}{end}": scale, f"{stem}activation_scale": torch.ones(())})
    checkpoint.check_weights(tmp_path / "fp8", model.shapes())
    expected = torch.empty(n_rows, n_columns)
    for i in range(n_rows):
        for j in range(n_columns):
            s = scale[i // 128, j // 128] if kind == "blocks" else scale.flatten()[i if scale.numel() > 1 else 0]
            expected[i, j] = codes[i, j].float() * s
    assert torch.equal(checkpoint.load_params(tmp_path / "fp8", model.shapes(), torch.float32)[name], expected)
    assert checkpoint.load_params(tmp_path / "fp8", model.shapes())[name].dtype == torch.bfloat16
    add_tensors(tmp_path / "fp8", {f"{stem}{end}": torch.ones(3, 5)})
    with pytest.raises(InputError, match=r"down_proj.weight \[130, 131\] as .*, expected floating point, FP8 with its scales"):
        checkpoint.load_params(tmp_path / "fp8", model.shapes())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_weights_are_dequantized_as_by_bitsandbytes(nested: bool, tmp_path: Path) -> None:
    model, params = saved(tmp_path / "nf4", d_ff=96, d_model=64)
    name = "model.layers.0.mlp.down_proj.weight"
    codes, state = functional.quantize_4bit(params[name], quant_type="nf4", compress_statistics=nested)
    parts = {f"{name}.{key}": w for key, w in state.as_dict(packed=True).items()}
    add_tensors(tmp_path / "nf4", {name: codes, **parts})
    checkpoint.check_weights(tmp_path / "nf4", model.shapes())
    loaded = checkpoint.load_params(tmp_path / "nf4", model.shapes(), torch.float32)
    # bitsandbytes' kernel for AVX512 is wrong where a row does not end with a block, so each block is a row here.
    state.shape = torch.Size([params[name].numel() // state.blocksize, state.blocksize])
    expected = functional.dequantize_4bit(codes, state).reshape(params[name].shape)
    assert torch.allclose(loaded[name], expected, atol=1e-6)
    assert not torch.equal(loaded[name], params[name])
    add_tensors(tmp_path / "nf4", {}, drop=[f"{name}.quant_state.bitsandbytes__nf4"])
    with pytest.raises(InputError, match=r"expected floating point, FP8 with its scales, bitsandbytes' NF4, .*; take"):
        checkpoint.load_params(tmp_path / "nf4", model.shapes())


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "'mlx'"),
    "int8": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "'bitsandbytes int8'"),
    "fp4": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "'bitsandbytes fp4'"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    "mxfp4 of another": ({"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_folder_that_is_not_read_says_what_to_do(name: str) -> None:
    keys, method = QUANTIZED[name]
    with pytest.raises(InputError, match=f"is quantized as {method}, expected plain weights, FP8 .*; take the unquantized"):
        models.from_hf({**llama.FAMILY.to_hf(SMALL), **keys})
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for config in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, nf4, None, {}):
        models.from_hf({**llama.FAMILY.to_hf(SMALL), "quantization_config": config})


def touch(*names: str, text: str = "{}") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    return make


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
NO_MODEL: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (touch(), "is an empty folder, expected a Hugging Face folder"),
    "an adapter": (touch("adapter_config.json"), "holds an adapter, .*; name its base as path, and this as deltas"),
    "GGUF": (touch("model-Q4_0.gguf"), "is GGUF, .*; take the folder that it was made from"),
    "two models": (touch("a/config.json", "b/config.json"), r"holds models in folders of their own, \['a', 'b'\], .*; name one"),
    "no model": (touch("README.md"), r"holds \['README.md'\] and no config.json"),
    "a pointer": (
        touch("config.json", text=POINTER),
        "config.json is a Git LFS pointer and not the file itself; run git lfs pull",
    ),
}


@pytest.mark.parametrize("name", NO_MODEL)
def test_what_stands_in_the_place_of_a_model_is_said(name: str, tmp_path: Path) -> None:
    make, message = NO_MODEL[name]
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        models.open(tmp_path)


def test_a_path_that_is_no_folder_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("model.gguf", "config.json")(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"model.gguf is GGUF"):
        models.open(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"config.json is a file, .*; name the folder that holds it"):
        models.open(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"fetched by: python -m minitune download Qwen/Qwen3-0.6B"):
        models.open(Path("Qwen/Qwen3-0.6B"))
    with pytest.raises(InputError, match=r"none.config\.json does not exist, .*; correct the path"):
        models.open(tmp_path / "none")


NO_WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (touch("pytorch_model.bin"), "holds neither .*; those of pytorch_model.bin are pickled, .*save_pretrained"),
    "no index": (touch("model-00001-of-00002.safetensors"), "index.json says which of its weights is in .*: download it"),
    "none": (touch("config.json"), "holds neither .*; download the weights"),
    "a pointer": (touch("model.safetensors", text=POINTER), "is a Git LFS pointer and not the file itself; run git lfs pull"),
    "two models": (
        touch(
            "model.safetensors", "b.safetensors", "model.safetensors.index.json", text='{"weight_map": {"a": "b.safetensors"}}'
        ),
        "holds two models, model.safetensors and the shards of .*; move the other away",
    ),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_stands_in_the_place_of_weights_is_said_without_reading_one(name: str, tmp_path: Path) -> None:
    make, message = NO_WEIGHTS[name]
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        checkpoint.check_weights(tmp_path, MODEL.shapes())


def test_check_finds_what_the_headers_show(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "model")
    checkpoint.check_weights(tmp_path / "model", model.shapes())
    add_tensors(tmp_path / "model", {"model.layers.9.bias": torch.ones(2)})
    with pytest.raises(InputError, match=r"holds model.layers.9.bias, which this model does not have"):
        checkpoint.check_weights(tmp_path / "model", model.shapes())
