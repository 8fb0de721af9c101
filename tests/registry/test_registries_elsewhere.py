"""W&B's registry, offline in person and online by a stand-in, and Azure ML's by a stand-in of its client."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import wandb

from minitune.__main__ import main
from minitune.registry.opened import bring
from support.programs import LORA, evaluation, run, start
from support.wandb_files import wandb_records

SAVE = '[[stage]]\nop = "save"\nwhat = "merged"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a cache of its own, and two models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}', encoding="utf-8")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    return tmp_path


def shown(text: str) -> None:
    pass


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Output of a command that ends well."""
    capsys.readouterr()
    code = main(words)
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


class StandInArtifact(SimpleNamespace):
    """Artifact of the stand-in: files of a folder, a version and aliases."""

    def download(self, root: str) -> str:
        shutil.copytree(self.folder, root, dirs_exist_ok=True)
        return root

    def save(self) -> None:
        for other in self.shop:
            if other is not self:
                other.aliases[:] = [alias for alias in other.aliases if alias not in self.aliases]

    def wait(self) -> "StandInArtifact":
        return self


class Wandb:
    """Stand-in of wandb's online side, which keeps one version of a content as W&B does."""

    Settings = wandb.Settings

    def __init__(self, place: Path) -> None:
        self.place, self.shop = place, []
        self.Artifact = lambda name, **fields: SimpleNamespace(name=name, **fields, add_dir=self._take)
        self.init = lambda **fields: SimpleNamespace(log_artifact=self._log, finish=lambda: None, dir="x/files")
        self.Api = lambda: self

    def _take(self, folder: str) -> None:
        self.taken = Path(folder)

    def _log(self, artifact: Any, aliases: list[str]) -> StandInArtifact:
        kept = self.place / f"v{len(self.shop)}"
        shutil.copytree(self.taken, kept)
        names = [*aliases, f"v{len(self.shop)}"]
        new = StandInArtifact(
            folder=kept, version=kept.name, aliases=names, metadata=artifact.metadata, shop=self.shop, name=artifact.name
        )
        self.shop.append(new)
        new.save()
        return new

    def artifact_collection_exists(self, name: str, type: str) -> bool:
        return bool(self.shop) and name.endswith(f"/{self.shop[0].name}")

    def artifacts(self, type: str, name: str) -> list[StandInArtifact]:
        return list(reversed(self.shop))

    def artifact_exists(self, name: str, type: str) -> bool:
        return any(name.partition(":")[2] in one.aliases for one in self.shop)

    def artifact(self, name: str, type: str) -> StandInArtifact:
        return next(one for one in self.shop if name.partition(":")[2] in one.aliases)


def test_wandb_has_versions_and_aliases(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "wandb:team/shop/orders"
    monkeypatch.setitem(sys.modules, "wandb", Wandb(folder / "server"))  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert said(["register", "one", name, "--alias", "best"], capsys) == f"{name}:0, best\n"
    assert said(["register", "two", name], capsys) == f"{name}:1\n"
    assert said(["register", "one", name], capsys) == f"{name}:0 (these files were registered already)\n"
    for version, content in {"best": b"one", "0": b"one", "latest": b"two", "1": b"two"}.items():
        assert (bring(f"{name}:{version}", shown).folder / "model.safetensors").read_bytes() == content
    assert said(["register", f"{name}:1", "--alias", "best"], capsys) == f"{name}:1, best\n"
    assert bring(f"{name}:best", shown).words == f"{name}:1"
    assert main(["inspect", f"{name}:9"]) == 2
    assert capsys.readouterr().err == f"registry: {name} has no version '9', expected one of 0, 1; correct it\n"


def test_wandb_offline_keeps_a_version_to_upload(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(folder))
    register = '[[stage]]\nop = "register"\nto = "wandb:shop/orders"\n'
    summary = run(folder, tiny, LORA + SAVE + register)
    assert summary["register"]["path"] == "wandb:shop/orders:offline"
    records = list(wandb_records(folder))
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    artifacts += [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    (logged,) = [each for each in artifacts if each.type == "model"]
    assert (logged.name, logged.type, list(logged.aliases)) == ("orders", "model", ["latest"])
    metadata = json.loads(logged.metadata)
    assert metadata["program"] == (folder / "p/program.toml").read_text("utf-8")
    saved = {path.name for path in (folder / "p/merged").iterdir() if not path.name.startswith(".")}
    assert saved <= {entry.path for entry in logged.manifest.contents}
    assert start(folder, tiny, evaluation("after"), "model.path=wandb:shop/orders:best", name="q") == 2
    message = "registry: W&B is offline (WANDB_MODE=offline), expected a network for shop/orders:best; unset WANDB_MODE"
    assert message in capsys.readouterr().err


class Azure:
    """Stand-in of the models of an Azure ML client."""

    def __init__(self, place: Path) -> None:
        self.place, self.kept = place, []

    def create_or_update(self, model: Any) -> Any:
        if model not in self.kept:
            shutil.copytree(model.path, self.place / str(len(self.kept) + 1) / Path(model.path).name)
            model.version = str(len(self.kept) + 1)
            self.kept.append(model)
        return model

    def list(self, name: str) -> list[Any]:
        return [one for one in reversed(self.kept) if one.name == name]

    def download(self, name: str, version: str, download_path: str) -> None:
        shutil.copytree(self.place / version, Path(download_path) / name)


@pytest.fixture
def azure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Azure:
    """Stand-in of azure-ai-ml, whose client is of the workspace that a job's variables name."""
    models, asked = Azure(folder / "server"), []
    modules = {name: ModuleType(name) for name in ("azure", "azure.ai", "azure.ai.ml", "azure.ai.ml.entities", "azure.identity")}
    modules |= {name: ModuleType(name) for name in ("azure.core", "azure.core.exceptions")}
    modules["azure.ai.ml"].MLClient = lambda credential, *names: asked.append(names) or SimpleNamespace(models=models)
    modules["azure.ai.ml.entities"].Model = SimpleNamespace
    modules["azure.identity"].DefaultAzureCredential = lambda: None
    modules["azure.core.exceptions"].ResourceNotFoundError = KeyError
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for part in ("SUBSCRIPTION", "RESOURCEGROUP", "WORKSPACE_NAME"):
        monkeypatch.setenv(f"AZUREML_ARM_{part}", part.lower())
    return models


def test_azure_has_assets_and_tags_for_aliases(folder: Path, azure: Azure, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["register", "one", "azureml:orders", "--alias", "best"], capsys) == "azureml:orders:1, best\n"
    assert said(["register", "two", "azureml:orders", "--alias", "best"], capsys) == "azureml:orders:2, best\n"
    assert said(["register", "one", "azureml:orders"], capsys) == "azureml:orders:1 (these files were registered already)\n"
    assert [one.tags for one in azure.kept] == [{}, {"alias.best": "true"}]
    for version, content in {"best": b"two", "latest": b"two", "1": b"one", "2": b"two"}.items():
        assert (bring(f"azureml:orders:{version}", shown).folder / "model.safetensors").read_bytes() == content
    assert said(["register", "azureml:orders:1", "--alias", "best"], capsys) == "azureml:orders:1, best\n"
    assert (bring("azureml:orders:best", shown).folder / "model.safetensors").read_bytes() == b"one"


def test_what_azure_and_wandb_refuse_is_one_sentence(
    folder: Path, azure: Azure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**_: object) -> None:
        raise RuntimeError("(AuthorizationFailed)\nno right")

    monkeypatch.setattr(azure, "list", refused)
    assert main(["register", "one", "azureml:orders"]) == 2
    message = r"registry: Azure says: \(AuthorizationFailed\) no right, expected an answer; run `az login`, and name a workspace"
    assert re.match(message, capsys.readouterr().err)
    stand_in = Wandb(folder / "server")
    stand_in.artifact_collection_exists = refused
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main(["register", "one", "wandb:shop/orders"]) == 2
    assert re.match(
        r"registry: wandb says: .*, expected it to answer; correct the name, run `wandb login`", capsys.readouterr().err
    )
