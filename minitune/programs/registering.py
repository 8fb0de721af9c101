"""Registration of what a run has saved, with what is known of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.programs.card.model_card import FILE, Subject, model_card
from minitune.programs.card.publication import publish
from minitune.programs.page.run_files import RunFiles
from minitune.registry.hub_models import HubModels
from minitune.registry.hub_upload import Target
from minitune.registry.names import Name, parsed
from minitune.registry.versions import LATEST, Facts, Store, Version, content_hash
from minitune.trackers.tracker import numbers

TEXT_CHARACTERS = 5000  # of a description, that every registry takes


class Registered(NamedTuple):
    """Version of a model in a registry."""

    name: str  # mlflow:orders:3
    is_new: bool


def check_name(text: str) -> Name:
    """Name of a model without a version, whose registry takes new ones; InputError else."""
    name = parsed(text)
    if name.version != LATEST:
        found = f"registry: {text} names a version"
        raise InputError(f"{found}, expected {name.model}: the registry gives the number")
    name.opened().check(name.name)
    return name


def register(
    name: Name,
    subject: Subject,
    aliases: Sequence[str],
    tell: Callable[[str], None],
    *,
    update: bool,
) -> Registered:
    """Register what lies at a place, and have aliases name its version.

    The same content makes no second version, unless `update` asks for it.
    """
    registry = name.opened()
    if isinstance(registry, HubModels):
        version, is_new = _on_hub(registry, name, subject, tell, update=update)
    else:
        version, is_new = _stored(registry, name, subject, update=update)
    for alias in aliases:
        registry.set_alias(name.name, alias, version)
    return Registered(f"{name.model}:{version.number}", is_new)


def move(text: str, aliases: Sequence[str]) -> Registered:
    """Have aliases name a version that is registered already."""
    name = parsed(text)
    registry = name.opened()
    version = registry.find(name.name, name.version)
    for alias in aliases:
        registry.set_alias(name.name, alias, version)
    return Registered(f"{name.model}:{version.number}", False)


def _stored(registry: Store, name: Name, subject: Subject, *, update: bool) -> tuple[Version, bool]:
    content = content_hash(subject.place)
    known = [one for one in registry.versions(name.name) if one.content == content]
    if known and not update:
        return known[-1], False
    return registry.add(name.name, subject.place, content, _facts(subject)), True


def _on_hub(
    registry: HubModels,
    name: Name,
    subject: Subject,
    tell: Callable[[str], None],
    *,
    update: bool,
) -> tuple[Version, bool]:
    minor = () if update else (FILE,)
    done = publish(subject, Target(name.name), None, tell, minor=minor)
    known = [one for one in registry.versions(name.name) if one.place == done.commit]
    if known and not update:
        return known[-1], False
    return registry.tag(name.name, done.commit), True


def _facts(subject: Subject) -> Facts:
    """Card of a model as its text; program, seed, base, hashes of inputs and figures as a table."""
    run = subject.run
    return Facts(model_card(subject)[:TEXT_CHARACTERS], {} if run is None else _table(run))


def _table(run: RunFiles) -> Mapping[str, Any]:
    figures = numbers(run.records)
    shown = {name: value for name, value in figures.items() if "/samples/" not in name}
    return {
        "seed": run.program.get("seed"),
        "base": (run.program.get("model") or {}).get("path"),
        "inputs": run.manifest.get("inputs", {}),
        "evaluation": shown,
        "program": run.program_text,
    }
