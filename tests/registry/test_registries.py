"""Registered models: versions, aliases and what is known of them, in MLflow's registry, the Hub's tags, W&B and Azure ML."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from minitune.__main__ import main
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.paths import cache, locate
from minitune.registry import mlflow_models, names
from minitune.registry.mlflow_models import MlflowModels
from minitune.registry.names import parsed
from minitune.registry.opened import bring
from support.hub_repositories import TOKEN
from support.hub_server import Hub, contents
from support.programs import LORA, TRAIN, evaluation, run, start
from support.small_disks import fill, grow, small_disk

# of mlflow and of what it uses
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("folder"),
]
SAVE = '[[stage]]\nop = "save"\nwhat = "{}"\n'
REGISTER = '[[stage]]\nop = "register"\nto = "{}"\naliases = ["best"]\n'
MERGED = LORA + SAVE.format("merged")


def shown(text: str) -> None:
    pass


def model_files(place: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(place).items() if not name.startswith(".")}


def write_folder(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "llama", "name": "{text}"}}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(text.encode() * 100)
    return folder


def test_a_program_registers_and_another_one_opens_it(folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = evaluation("before") + LORA + TRAIN + SAVE.format("merged") + REGISTER.format("mlflow:orders")
    summary = run(folder, tiny, stages)
    assert summary["register"]["path"] == "mlflow:orders:1"
    client = MlflowClient("sqlite:///runs/mlflow.db")
    version = client.get_model_version_by_alias("orders", "best")
    assert version.tags["seed"] == "0"
    assert version.tags["base"] == f"{tiny}/model"
    assert float(version.tags["before/loss_nats"]) == summary["before"]["loss_nats"]
    facts = json.loads((folder / f"runs/mlflow-artifacts/{version.run_id}/artifacts/minitune.json").read_text("utf-8"))
    assert facts["program"] == (folder / "p/program.toml").read_text("utf-8")
    assert facts["inputs"] == json.loads((folder / "p/manifest.json").read_text("utf-8"))["inputs"]

    # no second copy: the registered files are second names of those that were saved
    saved = folder / "p/merged/model.safetensors"
    opened = bring("mlflow:orders", shown).folder
    assert (opened / "model.safetensors").samefile(saved)
    assert model_files(opened) == model_files(folder / "p/merged")
    assert not list((cache() / "registered").rglob("*.safetensors"))

    words = [f"model.path=mlflow:{name}" for name in ("orders", "orders:1", "orders:latest", "orders:best")]
    for word in words:
        assert start(folder, tiny, evaluation("after"), word, name="q", verb=("check",)) == 0
        assert f"model: {word.removeprefix('model.path=')} is mlflow:orders:1, in {opened}" in capsys.readouterr().out
    after = run(folder, tiny, evaluation("after"), words[-1], name="q")
    direct = run(folder, tiny, evaluation("after"), f"model.path={folder}/p/merged", name="r")
    assert after["after"]["loss_nats"] == direct["after"]["loss_nats"]


def test_paths_know_the_registries_by_their_words() -> None:
    assert set(paths.REGISTRIES) == set(names.REGISTRIES) == set(names.NAMES)
    for text in ("mlflow:orders", "hf:a/b", "wandb:p/n:3", "azureml:x:latest"):
        assert paths.is_registered_name(text)
        assert parsed(text).registry == text.partition(":")[0]
    for text in ("mlflow", "mlflow:", "orders", "orders:3", "C:folder", "models/x", ""):
        assert not paths.is_registered_name(text)
    with pytest.raises(InputError, match=r"'hf:' is no name of a model, expected hf:OWNER/NAME or"):
        parsed("hf:")


def test_register_without_its_package_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(folder / "one", "one")
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    assert main(["register", "one", "orders"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("registry: the package mlflow is not installed, expected it for MLflow's registry")
    assert said.endswith("; pip install 'minitune[mlflow]'\n")


def test_a_full_disk_ends_a_registration_with_its_code(database: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(folder / "one", "one")
    shutil.rmtree(folder / "runs")
    with small_disk(folder / "runs", database.stat().st_size // 1024 + 512) as disk:
        shutil.copyfile(database, disk / "mlflow.db")
        assert main(["register", "one", "orders"]) == 0
        fill(disk)
        (folder / "one/model.safetensors").write_bytes(b"two" * 100)
        capsys.readouterr()
        assert main(["register", "one", "orders"]) == 3
        (said,) = capsys.readouterr().err.splitlines()
        assert re.match(r"registry: the disk of .*mlflow\.db is full, expected room for a new version; free some", said)
        (disk / "other").unlink()
        assert main(["register", "one", "orders"]) == 0
        assert capsys.readouterr().out == "mlflow:orders:2\n"


def test_a_disk_that_is_full_for_the_files_keeps_what_was_registered(
    database: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(folder / "one", "one")
    shutil.rmtree(folder / "runs")
    size = database.stat().st_size // 1024 + 512
    with small_disk(folder / "runs", size) as disk:  # another disk than that of the model, to which no file has a second name
        shutil.copyfile(database, disk / "mlflow.db")
        assert main(["register", "one", "orders"]) == 0
        (folder / "one/model.safetensors").write_bytes(bytes(2**20))
        before = contents(disk / "mlflow-artifacts")
        capsys.readouterr()
        assert main(["register", "one", "orders"]) == 3
        (said,) = capsys.readouterr().err.splitlines()
        assert re.match(r"io: .*/runs/mlflow-artifacts/.* does not fit on its disk, where .* are free, expected more", said)
        assert contents(disk / "mlflow-artifacts") == before
        opened = bring("mlflow:orders", shown)
        assert (opened.words, (opened.folder / "model.safetensors").read_bytes()) == ("mlflow:orders:1", b"one" * 100)
        grow(disk, size + 2048)
        assert main(["register", "one", "orders"]) == 0
        assert capsys.readouterr().out == "mlflow:orders:2\n"


def test_versions_aliases_and_going_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_folder(folder / "one", "one"), write_folder(folder / "two", "two")
    for words, printed in [
        (["one", "mlflow:orders", "--alias", "best"], "mlflow:orders:1, best\n"),
        (["one", "orders"], "mlflow:orders:1 (these files were registered already)\n"),
        (["two", "orders", "--alias", "best"], "mlflow:orders:2, best\n"),
        (["one", "orders", "--update"], "mlflow:orders:3\n"),
    ]:
        assert main(["register", *words]) == 0
        assert capsys.readouterr().out == printed
    wanted = {"best": two, "2": two, "latest": one, "1": one, "3": one}
    for version, place in wanted.items():
        assert model_files(bring(f"mlflow:orders:{version}", shown).folder) == model_files(place)
    capsys.readouterr()
    assert main(["register", "mlflow:orders:1", "--alias", "best", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result == {"name": "mlflow:orders:1", "is_new": False, "aliases": ["best"]}
    assert model_files(bring("mlflow:orders:best", shown).folder) == model_files(one)
    # a run that is removed or made anew changes no version
    (two / "model.safetensors").unlink()
    (two / "model.safetensors").write_bytes(b"another")
    assert (bring("mlflow:orders:2", shown).folder / "model.safetensors").read_bytes() == b"two" * 100


def test_a_version_elsewhere_is_fetched_once_and_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(folder / "one", "one")
    assert main(["register", "one", "orders"]) == 0
    monkeypatch.setattr(mlflow_models, "_local", lambda uri: None)  # as of a server's artifacts
    told: list[str] = []
    place = bring("mlflow:orders", told.append).folder
    assert place.is_relative_to(cache() / "registered")
    assert model_files(place) == model_files(folder / "one")
    assert bring("mlflow:orders:1", told.append).folder == locate("mlflow:orders:1") == place
    assert told == ["registry: fetching mlflow:orders:1"]
    artifact = next((folder / "runs/mlflow-artifacts").rglob("model.safetensors"))
    artifact.unlink()
    artifact.write_bytes(b"changed")
    assert bring("mlflow:orders", told.append).folder == place
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "empty"))
    with pytest.raises(InputError, match="registry: mlflow:orders:1 has other files than were registered, expected the same"):
        bring("mlflow:orders", told.append)
    assert not list((folder / "empty/minitune/registered").iterdir())


def test_without_its_registry_what_was_fetched_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(folder / "one", "one")
    assert main(["register", "one", "orders"]) == 0
    place = bring("mlflow:orders", shown).folder

    def dead(self: MlflowModels, name: str, wanted: str) -> None:
        raise InputError("registry: the MLflow server can't be reached")

    monkeypatch.setattr(MlflowModels, "find", dead)
    told: list[str] = []
    assert bring("mlflow:orders", told.append).folder == place
    assert told == ["registry: mlflow:orders is what was fetched earlier (registry: the MLflow server can't be reached)"]
    with pytest.raises(InputError, match="can't be reached"):
        bring("mlflow:others", shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["register", "one", "mlflow:a/b"],
            "registry: 'mlflow:a/b' is no name of a model, expected mlflow:NAME or",
        ),
        (
            ["register", "one", "wandb:orders"],
            "registry: 'wandb:orders' is no name of a model, expected wandb:.ENTITY/.PROJECT",
        ),
        (["register", "one", "orders:3"], "registry: orders:3 names a version, expected mlflow:orders: the registry gives"),
        (["register", "one"], "register: one alone, expected register FOLDER NAME, or register NAME:VERSION --alias ALIAS"),
        (["register", "absent", "orders"], "card: absent does not exist, expected a model folder"),
        # before a token is asked for
        (["upload", "absent", "me/orders"], "card: absent does not exist, expected a model folder"),
        (
            ["register", "mlflow:orders:7", "--alias", "best"],
            "registry: mlflow:orders has no version '7', expected one of 1",
        ),
        (
            ["register", "mlflow:other", "--alias", "best"],
            "registry: mlflow:other has no version, expected one",
        ),
        (["register", "one", "orders", "--alias", "latest"], "registry: mlflow says: .*'latest' alias name .* is reserved"),
        (
            ["inspect", "mlflow:orders:bset"],
            "registry: mlflow:orders has no version 'bset', expected one of best, 1; did",
        ),
        (["chat", "mlflow:nothing"], "registry: mlflow:nothing has no version"),
        (["lora", "model.path=mlflow:nothing"], "registry: mlflow:nothing has no version"),
        (["register", "one", "azureml:orders"], "registry: azure-ai-ml or azure-identity is not installed, expected both"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(folder / "one", "one")
    if "orders" in words[1] and "has no" in message:
        assert (
            main(["register", "one", "orders", "--alias", "best"] if "bset" in words[1] else ["register", "one", "orders"]) == 0
        )
    capsys.readouterr()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert re.match(message, err)
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(folder / "one", "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["register", "one", "orders"]) == 2
    assert "registry: the MLflow server http://127.0.0.1:9 can't be reached (" in capsys.readouterr().err


def test_the_hub_has_tags_for_versions(
    server: Hub, folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    summary = run(folder, tiny, MERGED + REGISTER.format("hf:somebody/orders"))
    assert summary["register"]["path"] == "hf:somebody/orders:1"
    repository = server.repositories.by_name["somebody/orders"]
    assert repository.tags == dict.fromkeys(("v1", "best"), repository.branches["main"])
    assert "# orders" in repository.files()["README.md"].decode()
    assert main(["register", "p/merged", "hf:somebody/orders"]) == 0
    assert capsys.readouterr().out.endswith("hf:somebody/orders:1 (these files were registered already)\n")
    write_folder(folder / "two", "two")
    assert main(["register", "two", "hf:somebody/orders", "--alias", "best"]) == 0
    assert repository.tags["best"] == repository.tags["v2"] != repository.tags["v1"]
    assert main(["register", "hf:somebody/orders:1", "--alias", "best"]) == 0
    assert repository.tags["best"] == repository.tags["v1"]
    opened = bring("hf:somebody/orders:best", shown)
    assert opened.words == "hf:somebody/orders:1"
    assert (opened.folder / "model.safetensors").read_bytes() == (folder / "p/merged/model.safetensors").read_bytes()
    assert (bring("hf:somebody/orders", shown).folder / "model.safetensors").read_bytes() == b"two" * 100


def test_names_are_those_of_their_registries() -> None:
    assert parsed("orders") == parsed("mlflow:orders:latest")
    assert parsed("wandb:team/shop/orders:best") == ("wandb", "team/shop/orders", "best")
    assert parsed("hf:somebody/orders:3") == ("hf", "somebody/orders", "3")
    assert os.fspath(locate("mlflow:never/fetched")) == "mlflow:never/fetched"
