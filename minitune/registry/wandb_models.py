"""Registry of Weights & Biases: model artifacts of a project, with their versions and aliases."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.registry.versions import CONTENT, LATEST, Facts, Version, absent
from minitune.trackers.background import reason

OFFLINE = "offline"  # number of a version that W&B will give one when it is uploaded
TYPE = "model"


class WandbModels:
    """Model artifacts of W&B, by ENTITY/PROJECT/NAME or PROJECT/NAME."""

    def __init__(self) -> None:
        try:
            import wandb  # slow to import
        except ImportError:
            found = "the package wandb is not installed, expected it for W&B's registry"
            raise InputError(f"registry: {found}; pip install wandb") from None
        self._wandb: Any = wandb

    def check(self, name: str) -> None:
        """InputError without a login, where W&B is online."""
        if not self._is_offline():
            self.versions(name)

    def add(self, name: str, place: Path, content: str, facts: Facts) -> Version:
        """New version, which a run of job type `register` logs; W&B keeps one version of the same
        content."""
        *owner, project, artifact_name = name.split("/")
        table = {**facts.table, CONTENT: content}
        logged = self._wandb.Artifact(
            artifact_name, type=TYPE, description=facts.text, metadata=table
        )
        logged.add_dir(str(place)) if place.is_dir() else logged.add_file(str(place))
        with _explained():
            place_of_run = {"project": project, "entity": next(iter(owner), None)}
            settings = self._wandb.Settings(silent=True)
            run = self._wandb.init(job_type="register", settings=settings, **place_of_run)
            try:
                kept = run.log_artifact(logged, aliases=[LATEST])
                if self._is_offline():
                    return Version(OFFLINE, content, str(Path(run.dir).parent))
                kept.wait()
            finally:
                run.finish()
        return Version(str(kept.version).removeprefix("v"), content, f"{name}:{kept.version}")

    def versions(self, name: str) -> Sequence[Version]:
        """Versions by their numbers; none of an artifact that is not there, and offline."""
        if self._is_offline():
            return []
        with _explained():
            api = self._wandb.Api()
            if not api.artifact_collection_exists(name, TYPE):
                return []
            found = list(api.artifacts(TYPE, name))
        versions = [_version(name, one) for one in found]
        return sorted(versions, key=lambda one: int(one.number))

    def find(self, name: str, wanted: str) -> Version:
        """Version of a number or an alias."""
        self._require_online(f"{name}:{wanted}")
        alias = f"v{wanted}" if wanted.isdigit() else wanted
        with _explained():
            api = self._wandb.Api()
            if api.artifact_exists(f"{name}:{alias}", TYPE):
                return _version(name, api.artifact(f"{name}:{alias}", TYPE))
        raise absent(f"wandb:{name}", wanted, [one.number for one in self.versions(name)])

    def set_alias(self, name: str, alias: str, version: Version) -> None:
        """Have an alias name a version; W&B takes it from the one that had it."""
        if alias == LATEST:
            return
        self._require_online(f"an alias of {name}")
        with _explained():
            artifact = self._wandb.Api().artifact(version.place, TYPE)
            if alias not in artifact.aliases:
                artifact.aliases.append(alias)
                artifact.save()

    def fetch(self, name: str, version: Version, folder: Path, tell: Callable[[str], None]) -> Path:
        """Given folder with the files of a version."""
        tell(f"registry: fetching wandb:{name}:{version.number}")
        with _explained():
            self._wandb.Api().artifact(version.place, TYPE).download(root=str(folder))
        return folder

    def _is_offline(self) -> bool:
        return os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")

    def _require_online(self, what: str) -> None:
        if self._is_offline():
            found = f"W&B is offline (WANDB_MODE={os.environ['WANDB_MODE']})"
            remedy = "unset WANDB_MODE, or use a folder"
            raise InputError(f"registry: {found}, expected a network for {what}; {remedy}")


def _version(name: str, artifact: Any) -> Version:
    content = dict(artifact.metadata or {}).get(CONTENT)
    number = str(artifact.version).removeprefix("v")
    return Version(number, content, f"{name}:{artifact.version}")


@contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever wandb raises into an InputError with its own words."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        remedy = "correct the name, run `wandb login`, or set WANDB_MODE=offline"
        raise InputError(
            f"registry: wandb says: {reason(error)}, expected it to answer; {remedy}"
        ) from None
