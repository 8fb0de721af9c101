"""Registry of Azure ML: model assets of a workspace. An alias is a tag of the version."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.registry.versions import CONTENT, LATEST, Facts, Version, absent, only_folder
from minitune.trackers.background import reason

ALIAS = "alias."  # begin of the tag that is an alias
TEXT_CHARACTERS = 256  # of a value of a tag or property
WORKSPACE = ("SUBSCRIPTION", "RESOURCEGROUP", "WORKSPACE_NAME")  # AZUREML_ARM_... of a job


class AzureModels:
    """Model assets of the workspace that a job runs in, or that a config.json names."""

    def __init__(self) -> None:
        try:
            # both are slow to import
            from azure.ai.ml import MLClient  # pyright: ignore[reportMissingImports]
            from azure.identity import DefaultAzureCredential  # pyright: ignore[reportMissingImports]
        except ImportError:
            found = "azure-ai-ml or azure-identity is not installed, expected both for Azure ML"
            raise InputError(f"registry: {found}; pip install 'minitune[azure]'") from None
        with _explained():
            self._models: Any = _client(MLClient, DefaultAzureCredential()).models

    def check(self, name: str) -> None:
        """InputError for a workspace that does not answer."""
        self.versions(name)

    def add(self, name: str, place: Path, content: str, facts: Facts) -> Version:
        """New version of a model asset."""
        from azure.ai.ml.entities import Model  # pyright: ignore[reportMissingImports]

        short = {key: value[:TEXT_CHARACTERS] for key, value in facts.tags.items()}
        model = Model(
            name=name,
            path=str(place),
            type="custom_model",
            description=facts.text,
            tags=short,
            properties={CONTENT: content},
        )
        with _explained():
            made = self._models.create_or_update(model)
        return _version(made)

    def versions(self, name: str) -> Sequence[Version]:
        """Versions by their numbers; none of an asset that is not there."""
        return [_version(one) for one in self._listed(name)]

    def find(self, name: str, wanted: str) -> Version:
        """Version of a number, of an alias, or the newest."""
        known = self._listed(name)
        if known and wanted == LATEST:
            return _version(known[-1])
        tag = f"{ALIAS}{wanted}"
        for one in known:
            if str(one.version) == wanted or tag in (one.tags or {}):
                return _version(one)
        aliases = sorted({key.removeprefix(ALIAS) for one in known for key in _aliases(one)})
        numbers = [str(one.version) for one in known]
        raise absent(f"azureml:{name}", wanted, [*aliases, *numbers])

    def set_alias(self, name: str, alias: str, version: Version) -> None:
        """Move the tag that is an alias to a version."""
        tag = f"{ALIAS}{alias}"
        for one in self._listed(name):
            tags = {key: value for key, value in (one.tags or {}).items() if key != tag}
            if str(one.version) == version.number:
                tags[tag] = "true"
            if tags != dict(one.tags or {}):
                one.tags = tags
                with _explained():
                    self._models.create_or_update(one)

    def fetch(self, name: str, version: Version, folder: Path, tell: Callable[[str], None]) -> Path:
        """Folder with the files of a version, inside the given one as Azure lays them."""
        tell(f"registry: fetching azureml:{name}:{version.number}")
        with _explained():
            self._models.download(name, version.number, download_path=str(folder))
        return only_folder(folder)  # NAME/FOLDER/... as it was uploaded

    def _listed(self, name: str) -> list[Any]:
        from azure.core.exceptions import ResourceNotFoundError  # pyright: ignore[reportMissingImports]

        with _explained():
            try:
                found = list(self._models.list(name=name))
            except ResourceNotFoundError:
                return []
        return sorted(found, key=lambda one: int(one.version) if one.version.isdigit() else 0)


def _client(client: Any, credential: Any) -> Any:
    """Client of the workspace of a job, by its variables, or of the one of a config.json."""
    names = [os.environ.get(f"AZUREML_ARM_{part}") for part in WORKSPACE]
    return client(credential, *names) if all(names) else client.from_config(credential)


def _aliases(model: Any) -> list[str]:
    return [key for key in model.tags or {} if key.startswith(ALIAS)]


def _version(model: Any) -> Version:
    content = dict(model.properties or {}).get(CONTENT)
    return Version(str(model.version), content, str(model.path))


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what Azure raises into an InputError with its own words."""
    from azure.core.exceptions import ResourceNotFoundError  # pyright: ignore[reportMissingImports]

    try:
        yield
    except (InputError, ResourceNotFoundError):
        raise
    except Exception as error:
        remedy = "run `az login`, and name a workspace by a config.json or AZUREML_ARM_..."
        raise InputError(
            f"registry: Azure says: {reason(error)}, expected an answer; {remedy}"
        ) from None
