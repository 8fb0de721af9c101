"""Registered models in the cache: each content once, whatever it is called."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io.atomic import atomic_folder, write_atomic
from minitune.io.cache_size import MODELS
from minitune.io.paths import cache, locate, registered_note
from minitune.registry.hub_models import HubModels
from minitune.registry.names import Name, parsed
from minitune.registry.versions import Version, content_hash, only_folder


class Opened(NamedTuple):
    """Folder of a registered model, and the version that it is."""

    folder: Path
    words: str  # "mlflow:orders:3"


def bring(text: str, tell: Callable[[str], None]) -> Opened:
    """Folder of the model that a name means now, fetched where it is not here yet.

    Without the registry it is what was fetched last, and a line says so; InputError where that is
    nothing, for a version that there is not, and for files that are not those that were registered.
    """
    name = parsed(text)
    try:
        version = name.opened().find(name.name, name.version)
    except InputError as error:
        before = locate(text)
        if not before.is_dir():
            raise
        tell(f"registry: {text} is what was fetched earlier ({error})")
        return Opened(before, text)
    folder = _folder(name, version, tell)
    note = registered_note(text)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps({"folder": str(folder)}).encode())
    return Opened(folder, f"{name.model}:{version.number}")


def _folder(name: Name, version: Version, tell: Callable[[str], None]) -> Path:
    registry = name.opened()
    identity = version.content or f"{name.model} {version.place}"
    home = cache() / MODELS / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if isinstance(registry, HubModels):
        return registry.fetch(name.name, version, home, tell)
    if home.is_dir():
        return only_folder(home)
    (cache() / MODELS).mkdir(parents=True, exist_ok=True)
    with atomic_folder(home) as aside:
        found = registry.fetch(name.name, version, aside, tell)
        if version.content is not None and content_hash(found) != version.content:
            what = f"registry: {name.model}:{version.number} has other files than were registered"
            raise InputError(f"{what}, expected the same bytes; register it again")
        inside = found.relative_to(aside) if found.is_relative_to(aside) else None
    if inside is None:
        # they lie on this machine already
        home.rmdir()
        return found
    return home / inside
