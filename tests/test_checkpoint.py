"""Folders in and out, and what a crash, a cut file or a wrong tensor does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import SMALL, configs, random_batch, random_params, reference, save_reference
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitune import checkpoint, models, tree
from minitune.models import Model, llama
from minitune.types import Delta, InputError

MODEL = Model(llama, SMALL)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """Files whose bytes must be carried over; their content does not matter here."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\x00\xffbytes")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


def save(folder: Path, params: dict[str, torch.Tensor], tokenizer: Path, model: Model = MODEL, **options: object) -> None:
    arguments = {"source": None, "template": None, "stop_ids": [3], **options}
    checkpoint.save_folder(folder, params, model, tokenizer=tokenizer, **arguments)


@settings(max_examples=8)
@given(
    config=configs(), seed=st.integers(0, 2**32), dtype=st.sampled_from([torch.float32, torch.bfloat16]), sharded=st.booleans()
)
def test_what_is_saved_loads_in_transformers_with_the_same_logits(
    config: llama.Config, seed: int, dtype: torch.dtype, sharded: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved") / "model"
    params, tokens = random_params(config, seed, dtype), random_batch(config, 2, 9, seed).tokens
    save(folder, params, folder.parent, Model(llama, config), shard_bytes=300 if sharded else 10**9)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    hf, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted = hf.eval()(tokens).logits
    found = Model(llama, config).forward(params, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()) if dtype == torch.float32 else 0.1)
    assert models.open(folder).config == config
    back = checkpoint.load_params(folder, MODEL.family.shapes(config))
    assert list(back) == list(params)
    assert all(torch.equal(back[name], params[name]) for name in params)


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
        **{f: getattr(SMALL, f) for f in SMALL.__struct_fields__} | {"rope_scaling": llama.rope.Llama3(8.0, 1.0, 4.0, 13)}
    )
    hf = llama.to_hf(config)
    for kept in ("rope_parameters", "rope_theta rope_scaling"):
        one = {k: v for k, v in hf.items() if not k.startswith("rope") or k in kept.split()}
        (tmp_path / "config.json").write_text(json.dumps(one))
        assert models.open(tmp_path).config == config
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "llama3"
    assert llama.from_hf(
        {**hf, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    ).rope_scaling == llama.rope.Linear(2.0)


def test_config_json_passes_through_and_generation_stops_where_training_did(tmp_path: Path, tokenizer_folder: Path) -> None:
    params = random_params(SMALL)
    save_reference(SMALL, params, tmp_path / "source")
    original = json.loads((tmp_path / "source/config.json").read_text())
    original["_name_or_path"] = "somebody/something"
    (tmp_path / "source/config.json").write_text(json.dumps(original))
    half = tree.map(torch.Tensor.bfloat16, params)
    save(tmp_path / "out", half, tokenizer_folder, source=tmp_path / "source", stop_ids=[2, 7], template="{{ bos_token }}")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**original, "dtype": "bfloat16"}
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    theirs = json.loads((tmp_path / "source/generation_config.json").read_text())
    assert generation == {**theirs, "eos_token_id": [2, 7]}  # 2 is LlamaConfig's own
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ bos_token }}"


def test_loading_is_memory_mapped(tmp_path: Path) -> None:
    config = llama.Config(n_layers=1, n_heads=2, n_kv_heads=2, d_model=512, d_head=64, d_ff=8, vocab_size=40_000)
    big = Model(llama, config)
    save_file({name: torch.zeros(shape) for name, shape in big.shapes().items()}, tmp_path / "model.safetensors")
    mapped = str((tmp_path / "model.safetensors").resolve())
    before = _resident_bytes()
    params = checkpoint.load_params(tmp_path, big.shapes())
    assert mapped in Path("/proc/self/maps").read_text()
    assert _resident_bytes() - before < tree.n_bytes(params) / 10
    assert float(params["lm_head.weight"].abs().sum()) == 0.0
    assert _resident_bytes() - before > tree.n_bytes(params) / 4


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


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
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return apply


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
    "integers": (rewrite(lambda t: {**t, NORM: torch.zeros(12, dtype=torch.int8)}), r"as torch\.int8, expected floating point"),
    "index to nowhere": (sharded({"weight_map": {NORM: "a.safetensors"}}), r"a\.safetensors does not exist, but .* points to it"),
    "index outside": (
        sharded({"weight_map": {NORM: "../a.safetensors"}}),
        r"points to '\.\./a\.safetensors', expected a file name",
    ),
    "index of numbers": (sharded({"weight_map": {NORM: 3}}), "points to 3, expected a file name"),
    "index without map": (sharded({}), "has no readable weight_map"),
    "index no JSON": (sharded("{"), "has no readable weight_map"),
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
    assert set(checkpoint.load_params(tmp_path, llama.shapes(config))) == set(params)


CONFIG_ERRORS = {
    "unknown field": ({"attn_logit_softcapping": 50.0}, "has 'attn_logit_softcapping' = 50.0, unknown to the llama family"),
    "activation": ({"hidden_act": "gelu"}, "expected hidden_act 'silu'"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0"),
    "family": ({"model_type": "mamba"}, "is of family 'mamba', expected one of llama"),
    "scaling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'yarn'"),
    "heads": ({"num_key_value_heads": 3}, "n_heads 4 is no multiple of n_kv_heads 3"),
    "odd head": ({"head_dim": 5}, "d_head 5 is odd"),
    "missing": ({"vocab_size": None}, r"Expected `int`, got `null` - at `\$\.vocab_size`"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_a_config_json_that_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    change, message = CONFIG_ERRORS[name]
    (tmp_path / "config.json").write_text(json.dumps({**llama.to_hf(SMALL), **change}))
    with pytest.raises(InputError, match=message):
        models.open(tmp_path)


def test_a_config_json_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json does not exist, expected a Hugging Face folder"):
        models.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is no JSON"):
        models.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list, expected an object"):
        models.open(tmp_path)


# training state


STATE = {"trainable": {"w": Delta(torch.arange(6.0).view(2, 3), torch.ones(4, 2))}, "opt_state": (None, torch.tensor(7))}


def test_a_state_comes_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 15):
        checkpoint.save_state(tmp_path, step, tree.map(lambda x, s=step: x + s, STATE), {"cursor": [1, step]}, keep=9)
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        "step-00000005",
        "step-00000010",
        "step-00000015",
        "step-100000000",
    ]
    state, meta = checkpoint.load_state(checkpoint.committed(tmp_path)[1], STATE)
    assert (meta["step"], meta["cursor"]) == (10, [1, 10])
    assert type(state["trainable"]["w"]) is Delta
    tree.map(lambda x, y: torch.testing.assert_close(x, y + 10, rtol=0, atol=0), state, STATE)
    checkpoint.save_state(tmp_path, 100_000_001, STATE, {}, keep=2)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-100000000", "step-100000001"]


def test_a_crash_within_a_save_leaves_the_last_state_and_the_next_save_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_state(tmp_path, 1, STATE, {})
    real = checkpoint.save_tensors

    def dies_midway(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_tensors", dies_midway)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_state(tmp_path, 2, STATE, {})
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000001"]
    (tmp_path / ".step-00000002.tmp").mkdir()  # as a kill would leave it
    (tmp_path / ".step-00000002.tmp/garbage").write_text("x")
    monkeypatch.setattr(checkpoint, "save_tensors", real)
    path = checkpoint.save_state(tmp_path, 2, STATE, {})
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


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
        checkpoint.write_atomic(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        with checkpoint.atomic_folder(tmp_path / "folder") as aside:
            (aside / content.decode()).write_bytes(content)
        assert [p.name for p in (tmp_path / "folder").iterdir()] == [content.decode()]

    def fails_midway() -> None:
        with checkpoint.atomic_folder(tmp_path / "folder") as aside:
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
