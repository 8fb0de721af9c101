"""MLflow: settings in a program, their check before a run, and the run itself; Azure ML shows it
too."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from minitune.errors import InputError
from minitune.io.atomic import write_atomic
from minitune.trackers.background import reason
from minitune.trackers.reach import unreachable
from minitune.trackers.tracker import (
    MLFLOW_ID,
    PROGRAM_FILE,
    Artifact,
    Histogram,
    Kept,
    StepValues,
    flat,
    numbers,
)

PARAM_CHARACTERS = 500  # of a value that every server takes
N_PARAMS, N_METRICS = 100, 1000  # that one request may hold


class MlflowConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Place and names of the run in MLflow; the variable MLFLOW_RUN_ID continues a run that a job's
    surroundings have begun."""

    # server or database; the variable MLFLOW_TRACKING_URI if absent, else a file mlflow.db in out
    tracking_uri: str | None = None
    experiment: str = "minitune"  # that the run belongs to; it is made where there is none
    name: str | None = None  # name of the run on the page; the program's if absent
    tags: dict[str, str] = msgspec.field(default_factory=dict)  # tags of the run
    # what is kept as artifacts once it is written: deltas, merged, params, checkpoints
    artifacts: tuple[Kept, ...] = ()

    def uri(self, out: Path) -> str:
        """Address of the server or database; out: the folder of run folders."""
        default = f"sqlite:///{(out / 'mlflow.db').absolute().as_posix()}"
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default

    def check(self) -> None:
        """InputError for a package that is missing, or a server that can't be reached."""
        _client()
        uri = self.uri(Path())
        fault = unreachable(uri) if uri.startswith(("http:", "https:")) else None
        if fault is not None:
            found = f"the MLflow server {uri} can't be reached ({fault}), expected a network"
            raise InputError(f"log: {found}; mend it, or correct log.mlflow.tracking_uri")

    def start(self, folder: Path, program: Mapping[str, Any]) -> "MlflowRun":
        """Run of MLflow with the program as its parameters and as a file."""
        client_of = _client()
        with _explained():
            client = client_of(self.uri(folder.parent))
            run = self._continued(client, folder) or self._new(client, folder, program)
            run_id = run.info.run_id
            client.update_run(run_id, status="RUNNING")
            for name, value in {"minitune.folder": str(folder), **self.tags}.items():
                client.set_tag(run_id, name, value)
            _log_params(client, run, program)
            if (folder / PROGRAM_FILE).is_file():
                client.log_artifact(run_id, str(folder / PROGRAM_FILE))
        write_atomic(folder / MLFLOW_ID, run_id.encode())
        return MlflowRun(client, run_id, int(run.data.metrics.get("global_step", -1)))

    def _continued(self, client: Any, folder: Path) -> Any:
        """Run that a job's surroundings have begun, or that this folder belongs to; None if that is
        not on the server."""
        given = os.environ.get("MLFLOW_RUN_ID")
        if given:
            return client.get_run(given)
        if not (folder / MLFLOW_ID).is_file():
            return None
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run((folder / MLFLOW_ID).read_text("utf-8"))
        except MlflowException:  # another server than before
            return None

    def _new(self, client: Any, folder: Path, program: Mapping[str, Any]) -> Any:
        uri = self.uri(folder.parent)
        identity = experiment_id(client, self.experiment, uri, folder.parent)
        return client.create_run(identity, run_name=self.name or program.get("name"))


class MlflowRun:
    """Run of MLflow; rows up to the step that it has already are left as they are."""

    def __init__(self, client: Any, run_id: str, last_step: int) -> None:
        """last_step: that the run had when it was opened, -1 for a new one."""
        self._client, self._run_id, self._last_step = client, run_id, last_step

    def log(self, rows: Sequence[StepValues]) -> None:
        """Log rows, as many metrics in a request as a server takes."""
        metrics: list[Any] = []
        for step, values in rows:
            if step > self._last_step:
                metrics += _metrics(numbers({"global_step": step, **values}), step)
        self._send(metrics)

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Log the numbers of a finished stage as LABEL/NAME, and its samples as a file."""
        self._send(_metrics(numbers(record, f"{label}/"), step))
        if record.get("samples"):
            samples = {"samples": record["samples"]}
            self._client.log_dict(self._run_id, samples, f"samples/{label}.json")

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Nothing: MLflow draws none."""

    def artifact(self, artifact: Artifact) -> None:
        """Log a folder or file under its name, with its metadata beside it."""
        log = self._client.log_artifacts if artifact.path.is_dir() else self._client.log_artifact
        log(self._run_id, str(artifact.path), artifact.name)
        metadata = {**artifact.metadata, "is_best": artifact.is_best}
        self._client.log_dict(self._run_id, metadata, f"{artifact.name}.json")

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Keep summary.json as a file."""
        self._client.log_dict(self._run_id, dict(content), "summary.json")

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _send(self, metrics: Sequence[Any]) -> None:
        for i in range(0, len(metrics), N_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + N_METRICS])


def experiment_id(client: Any, name: str, uri: str, out: Path) -> str:
    """Experiment of a name, made where there is none; out: folder of the runs."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # A database has no place for files; they lie beside it.
    beside = (out / "mlflow-artifacts").absolute().as_uri()
    place = beside if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=place))


def _metrics(values: Mapping[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(name, value, now_ms, step) for name, value in values.items()]


def _log_params(client: Any, run: Any, program: Mapping[str, Any]) -> None:
    """Log the program's keys as parameters; those that a continued run has can't be changed."""
    from mlflow.entities import Param

    lists = {key: json.dumps(value) for key, value in program.items() if isinstance(value, list)}
    named = {name.replace("/", "."): value for name, value in {**lists, **flat(program)}.items()}
    params = [
        Param(name, str(value)[:PARAM_CHARACTERS])
        for name, value in named.items()
        if name not in run.data.params
    ]
    for i in range(0, len(params), N_PARAMS):
        client.log_batch(run.info.run_id, params=params[i : i + N_PARAMS])


def _client() -> Any:
    try:
        from mlflow.tracking import MlflowClient  # slow to import, and for those who ask for it
    except ImportError:
        found = "the package mlflow is not installed"
        remedy = "pip install 'minitune[mlflow]'"
        raise InputError(f"log: {found}, expected it for [log] mlflow; {remedy}") from None
    calm()
    return MlflowClient


def calm() -> None:
    """Have MLflow's loggers leave out the tables that it makes in a new database, and traces of
    errors of the database: it raises these as well, and they are told in our words."""
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_trace)


def _has_no_trace(record: logging.LogRecord) -> bool:
    return record.exc_info is None


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what MLflow raises into an InputError with its own words."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        said = f"mlflow says: {reason(error)}, expected a run to begin"
        remedy = "correct [log] mlflow or MLFLOW_TRACKING_URI"
        raise InputError(f"log: {said}; {remedy}") from None
