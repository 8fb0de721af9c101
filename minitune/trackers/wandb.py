"""Weights & Biases: settings in a program, their check before a run, and the run itself."""

import inspect
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from minitune.errors import InputError
from minitune.io.atomic import write_atomic
from minitune.trackers.background import reason
from minitune.trackers.reach import unreachable
from minitune.trackers.tracker import (
    PROGRAM_FILE,
    WANDB_ID,
    Artifact,
    Histogram,
    Kept,
    StepValues,
    flat,
)

Mode = Literal["online", "offline", "disabled", "shared"]
FINISH_S = 30.0  # that the end of a run may upload
OWN_KEYS = ("artifacts",)  # which wandb.init does not know
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
OFFLINE = 'or set log.wandb.mode = "offline" (WANDB_MODE=offline), then upload by `wandb sync`'


class WandbConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keywords of wandb.init; what is absent is wandb's own default."""

    project: str | None = None  # project that the run belongs to, as in wandb.init
    entity: str | None = None  # user or team that owns the project, as in wandb.init
    name: str | None = None  # name of the run on the page, as in wandb.init
    id: str | None = None  # id of the run, by which it is continued, as in wandb.init
    group: str | None = None  # group of runs that belong together, as in wandb.init
    job_type: str | None = None  # kind of run within a group, as in wandb.init
    tags: Sequence[str] | None = None  # words to find the run by, as in wandb.init
    notes: str | None = None  # longer description of the run, as in wandb.init
    # online; offline: upload later with wandb sync; disabled: log nothing; as in wandb.init
    mode: Mode | None = None
    dir: str | None = None  # folder of wandb's own files, as in wandb.init
    config: dict[str, Any] | None = None  # keys to add to the program's own, as in wandb.init
    config_exclude_keys: list[str] | None = None  # keys of config to leave out, as in wandb.init
    config_include_keys: list[str] | None = None  # keys of config to keep alone, as in wandb.init
    allow_val_change: bool | None = None  # let config values change later, as in wandb.init
    force: bool | None = None  # refuse to run without a login, as in wandb.init
    reinit: bool | str | None = None  # what a second run in one process does, as in wandb.init
    resume: bool | str | None = None  # continue the run of this id, as in wandb.init
    resume_from: str | None = None  # run and step to go back to and continue from, as in wandb.init
    fork_from: str | None = None  # run and step to begin a new run from, as in wandb.init
    save_code: bool | None = None  # upload the script, as in wandb.init
    # fields of wandb.Settings; finish_timeout is how long the end may upload [s]
    settings: dict[str, Any] | None = None
    # what is kept as model artifacts once it is written: deltas, merged, params, checkpoints
    artifacts: tuple[Kept, ...] = ()

    def keywords(self) -> dict[str, Any]:
        """Keywords of wandb.init that are given."""
        fields = msgspec.to_builtins(self)
        return {
            name: value
            for name, value in fields.items()
            if value is not None and name not in OWN_KEYS
        }

    def check(self) -> None:
        """InputError for what would stop wandb at the beginning of a run: names, mode, key,
        network."""
        wandb = _imported()
        given = self.keywords()
        names = {"project": "project", "entity": "entity", "id": "run_id", "mode": "mode"}
        with _explained():
            wandb.Settings(**{field: given[key] for key, field in names.items() if key in given})
            settings = wandb.setup().settings
        if (self.mode or settings.mode) not in ("online", "run", "shared"):
            return
        host = urlsplit(settings.base_url)
        if not _has_key(str(host.hostname)):
            found = f"wandb has no API key for {host.hostname}, expected one"
            raise InputError(f"log: {found}; run `wandb login`, set WANDB_API_KEY, {OFFLINE}")
        fault = unreachable(settings.base_url)
        if fault is not None:
            found = f"{host.hostname}, the server of wandb, can't be reached ({fault})"
            raise InputError(f"log: {found}, expected a network; mend it, {OFFLINE}")
        if "prompt" in inspect.signature(wandb.login).parameters:  # of wandb 0.23 and later
            with _explained(), redirect_stderr(io.StringIO()):
                wandb.login(prompt=False)

    def start(self, folder: Path, program: Mapping[str, Any]) -> "WandbRun":
        """Run of wandb, which keeps the program as its config and as a file."""
        id_file = folder / WANDB_ID
        given = self.keywords()
        ours: dict[str, Any] = {
            "name": program.get("name"),
            "dir": os.environ.get("WANDB_DIR", str(folder)),
            "id": id_file.read_text("utf-8")
            if id_file.exists()
            else os.environ.get("WANDB_RUN_ID"),
            "resume": "allow",
        }
        settings = {**_finish_settings(), **given.get("settings", {})}
        config_of_run = {**program, **given.get("config", {})}
        keywords = {**ours, **given, "config": config_of_run, "settings": settings}
        with _explained():
            run = _imported().init(**keywords)
            if (folder / PROGRAM_FILE).is_file():
                run.save(str(folder / PROGRAM_FILE), base_path=str(folder), policy="now")
        write_atomic(id_file, run.id.encode())
        return WandbRun(run)


class WandbRun:
    """Run of wandb with the program as its config; a run that is continued keeps its id."""

    def __init__(self, run: Any) -> None:
        """run: as wandb.init gives it."""
        self._run = run

    def log(self, rows: Sequence[StepValues]) -> None:
        """Log rows; wandb itself drops the steps that it already has."""
        for step, values in rows:
            self._run.log({"global_step": step, **values}, step=step)

    def record(self, step: int, label: str, record: Mapping[str, Any]) -> None:
        """Log the figures of a finished stage as LABEL/NAME, and its samples as a table."""
        values: dict[str, Any] = {"global_step": step, **flat(record, f"{label}/")}
        samples = record.get("samples")
        if samples:
            columns = list(samples[0])
            rows = [[str(sample.get(column, "")) for column in columns] for sample in samples]
            values[f"{label}/samples"] = _imported().Table(columns=columns, data=rows)
        self._run.log(values, step=step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log histograms under the names that wandb.watch gives them."""
        histogram = _imported().Histogram
        values = {name: histogram(np_histogram=tuple(h)) for name, h in histograms.items()}
        self._run.log(values, step=step)

    def artifact(self, artifact: Artifact) -> None:
        """Log a folder or file as a model artifact, whose newest version is `latest`."""
        logged = _imported().Artifact(artifact.name, type="model", metadata=dict(artifact.metadata))
        if artifact.path.is_dir():
            logged.add_dir(str(artifact.path))
        else:
            logged.add_file(str(artifact.path))
        self._run.log_artifact(logged, aliases=["latest", *["best"] * artifact.is_best])

    def summarize(self, content: Mapping[str, Any]) -> None:
        """Write the figures of summary.json into the run's summary."""
        self._run.summary.update(flat(content))

    def finish(self, *, failed: bool) -> None:
        """End the run, which uploads what is left.

        Without a network that waits no longer than FINISH_S, and the rest stays on the disk.
        """
        folder = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            left = f"what is left was not uploaded in time and lies in {folder}"
            raise TimeoutError(f"{left}; `wandb sync {folder}` sends it") from None


def _finish_settings() -> dict[str, Any]:
    """Settings by which `finish` ends in time and says what it left; an old wandb has none."""
    bounds = {"finish_timeout": FINISH_S, "finish_timeout_raises": True}
    known = _imported().Settings.model_fields
    given = {name for name in bounds if f"WANDB_{name.upper()}" in os.environ}
    return {name: value for name, value in bounds.items() if name in known and name not in given}


def _imported() -> Any:
    try:
        import wandb  # slow to import, and only for those who ask for it
    except ImportError:
        found = "the package wandb is not installed"
        raise InputError(f"log: {found}, expected it for [log] wandb; pip install wandb") from None
    return wandb


def _has_key(host: str) -> bool:
    """True if wandb will find a key where it looks: its variables, then the file of passwords."""
    if any(os.environ.get(name) for name in KEYS):
        return True
    for name in (os.environ.get("NETRC") or "~/.netrc", "~/_netrc"):
        try:
            if netrc(os.path.expanduser(name)).authenticators(host) is not None:
                return True
        except (OSError, NetrcParseError):
            continue
    return False


@contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever wandb raises into an InputError with its own words."""
    try:
        yield
    except Exception as error:
        said = f"wandb says: {reason(error)}"
        raise InputError(f"log: {said}; correct [log] wandb, {OFFLINE}") from None
