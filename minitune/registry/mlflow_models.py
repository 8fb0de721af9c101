"""Registry of MLflow: a server, Azure ML's, or the file runs/mlflow.db where none is named."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from minitune.errors import DiskFullError, InputError
from minitune.io.atomic import create_folder, disk_full_is_input_error, link
from minitune.registry.versions import CONTENT, FACTS, LATEST, Facts, Version, absent, files_at
from minitune.trackers.background import reason
from minitune.trackers.mlflow import MlflowConfig, calm, experiment_id
from minitune.trackers.reach import unreachable

EXPERIMENT = "minitune"
FILES = "model"  # folder of a run's artifacts
OUT = Path("runs")
SQLITE_FULL = "database or disk is full"  # words of SQLite, in which MLflow passes them on


class MlflowModels:
    """Models of MLflow; a version is the artifacts of a run."""

    def __init__(self) -> None:
        try:
            from mlflow.tracking import MlflowClient  # slow to import
        except ImportError:
            found = "the package mlflow is not installed, expected it for MLflow's registry"
            raise InputError(f"registry: {found}; pip install 'minitune[mlflow]'") from None
        calm()
        self._uri = MlflowConfig().uri(OUT)
        registry = os.environ.get("MLFLOW_REGISTRY_URI")
        for uri in (self._uri, registry or ""):
            fault = unreachable(uri) if uri.startswith(("http:", "https:")) else None
            if fault is not None:
                found = f"the MLflow server {uri} can't be reached ({fault})"
                remedy = "mend it, or correct MLFLOW_TRACKING_URI"
                raise InputError(f"registry: {found}, expected a network; {remedy}")
        if self._uri.startswith("sqlite:"):
            create_folder(OUT)
        with _explained():
            self._client: Any = MlflowClient(self._uri, registry)

    def check(self, name: str) -> None:
        """InputError for a name that MLflow does not take, and for a server that refuses."""
        self.versions(name)

    def add(self, name: str, place: Path, content: str, facts: Facts) -> Version:
        """New version: a run with the files as artifacts, and the facts beside them."""
        from mlflow.exceptions import MlflowException

        with _explained():
            experiment = experiment_id(self._client, EXPERIMENT, self._uri, OUT)
            run = self._client.create_run(experiment, run_name=name)
            run_id, root = run.info.run_id, run.info.artifact_uri
            with self._taken_back(run_id, root):
                self._client.log_dict(run_id, dict(facts.table), FACTS)
                self._put(run_id, root, place)
            self._client.set_terminated(run_id)
            if not self._is_registered(name):
                try:
                    self._client.create_registered_model(name)
                except MlflowException:
                    if not self._is_registered(name):  # by another process, just now
                        raise
            tags = {CONTENT: content, **facts.tags}
            made = self._client.create_model_version(
                name, f"{root}/{FILES}", run_id, tags=tags, description=facts.text
            )
        return Version(str(made.version), content, f"{root}/{FILES}")

    def versions(self, name: str) -> Sequence[Version]:
        """Versions by their numbers."""
        with _explained():
            if not self._is_registered(name):
                return []
            quoted = name.replace("'", "''")
            found = list(self._client.search_model_versions(f"name = '{quoted}'"))
        return [_version(one) for one in sorted(found, key=lambda one: int(one.version))]

    def find(self, name: str, wanted: str) -> Version:
        """Version of a number, of an alias, or the newest."""
        known = self.versions(name)
        aliases: dict[str, str] = {}
        if known:
            with _explained():
                aliases = dict(self._client.get_registered_model(name).aliases)
        number = known[-1].number if known and wanted == LATEST else aliases.get(wanted, wanted)
        found = next((one for one in known if one.number == str(number)), None)
        if found is None:
            raise absent(f"mlflow:{name}", wanted, [*aliases, *(one.number for one in known)])
        return found

    def set_alias(self, name: str, alias: str, version: Version) -> None:
        """Have an alias name a version."""
        with _explained():
            self._client.set_registered_model_alias(name, alias, version.number)

    def fetch(self, name: str, version: Version, folder: Path, tell: Callable[[str], None]) -> Path:
        """Folder of a version: where its files lie on this machine, else the given one, filled."""
        here = _local(version.place)
        if here is not None and here.is_dir():
            return here
        from mlflow.artifacts import download_artifacts

        tell(f"registry: fetching mlflow:{name}:{version.number}")
        with _explained():
            download_artifacts(version.place, dst_path=str(folder), tracking_uri=self._uri)
        inside = folder / FILES
        return inside if inside.is_dir() else folder

    def _is_registered(self, name: str) -> bool:
        quoted = name.replace("'", "''")
        return bool(self._client.search_registered_models(f"name = '{quoted}'", max_results=1))

    @contextmanager
    def _taken_back(self, run_id: str, root: str) -> Iterator[None]:
        """Files of a run, which take no room on this disk if some of them can't be written."""
        from mlflow.exceptions import MlflowException

        here = _local(root)
        try:
            with disk_full_is_input_error(here or OUT):
                yield
        except (MlflowException, OSError, InputError):
            if here is not None:
                shutil.rmtree(here, ignore_errors=True)
            with suppress(MlflowException):
                self._client.set_terminated(run_id, "FAILED")
            raise

    def _put(self, run_id: str, root: str, place: Path) -> None:
        """Keep files as artifacts: on this disk as second names, which take no room."""
        here = _local(root)
        if here is None:
            with TemporaryDirectory() as folder:
                _link_files(place, Path(folder))
                self._client.log_artifacts(run_id, folder, FILES)
        else:
            _link_files(place, here / FILES)


def is_registered(name: str) -> bool:
    """True for a model of the registry that is there already: one that the environment names, or
    the file runs/mlflow.db. None is made.

    A database file is read without MLflow, whose import takes seconds; a server is asked.
    InputError for one that can't be, and for a package that is missing.
    """
    named = [os.environ.get(key) for key in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")]
    address = next((uri for uri in named if uri), f"sqlite:///{OUT / 'mlflow.db'}")
    if address.startswith("sqlite:///"):
        return _is_in_database(Path(address.removeprefix("sqlite:///")), name)
    return bool(MlflowModels().versions(name))


def _is_in_database(file: Path, name: str) -> bool:
    if not file.is_file():
        return False
    query = "SELECT 1 FROM registered_models WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(query, (name,)).fetchone() is not None
    except sqlite3.Error:  # a file of something else
        return False


def _link_files(place: Path, folder: Path) -> None:
    for name, file in files_at(place).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link(file, folder / name)


def _local(uri: str) -> Path | None:
    """Path on this machine that an address of artifacts means; None for one elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if parts.scheme == "" else None


def _version(found: Any) -> Version:
    return Version(str(found.version), dict(found.tags).get(CONTENT), str(found.source))


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what MLflow raises into an InputError with its own words."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = reason(error)
        if SQLITE_FULL in str(error):
            remedy = "free some space and give the same command again"
            raise DiskFullError(
                f"registry: the disk of {OUT / 'mlflow.db'} is full, expected room for a new "
                f"version; {remedy}"
            ) from None
        remedy = "correct the name or MLFLOW_TRACKING_URI"
        raise InputError(
            f"registry: mlflow says: {said}, expected it to answer; {remedy}"
        ) from None
