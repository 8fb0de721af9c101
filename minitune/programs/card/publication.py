"""Files of a result as they go to the Hub: those of its folder, and its model card."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from minitune.errors import InputError
from minitune.io.json_file import read_json_object
from minitune.programs.card.model_card import FILE, Subject, base_name, is_unedited, model_card
from minitune.programs.card.opened_with import ADAPTER, kind_of
from minitune.programs.page.run_files import RunFiles, read_run
from minitune.programs.trained_state import is_run
from minitune.registry.hub_upload import Content, Target, Uploaded, require_target, text_at, upload
from minitune.registry.versions import files_at

BASE = "base_model_name_or_path"


def run_of(place: Path) -> RunFiles | None:
    """Run whose folder holds a result; None for a result elsewhere."""
    return next((read_run(one) for one in place.absolute().parents if is_run(one)), None)


def publish(
    subject: Subject,
    target: Target,
    card: str | None,
    tell: Callable[[str], None],
    *,
    minor: Sequence[str] = (),
) -> Uploaded:
    """Upload a result with its card to the Hub.

    card: text of it; README.md of the folder if absent, else one that is made from the run. One
    that somebody edited at the Hub stays in place of one that is made. minor: names of files
    whose change alone is no reason for a commit. InputError as hub_upload.require_target raises it.
    """
    kind_of(subject.place)  # what is no model is found before the Hub is asked
    listing = require_target(target)
    files: dict[str, Content] = {**files_at(subject.place)}
    if card is not None:
        files[FILE] = card.encode()
    if FILE not in files:
        there = text_at(target, listing, FILE)
        if there is None or is_unedited(there):
            files[FILE] = model_card(subject).encode()
        else:
            tell(f"card: {FILE} of {target.repo} was edited there and stays as it is")
    if ADAPTER in files:
        files[ADAPTER] = _with_base(subject, tell)
    return upload(target, files, "Upload by minitune", tell, minor=minor)


def _with_base(subject: Subject, tell: Callable[[str], None]) -> bytes:
    """Content of adapter_config.json, which names the base as others find it."""
    path = subject.place / ADAPTER
    run = subject.run
    base = subject.base or (base_name(run) if run is not None else None)
    config = read_json_object(path, "card")
    if base is not None:
        return (json.dumps({**config, BASE: base}, indent=2) + "\n").encode()
    if config.get(BASE) is not None and Path(str(config[BASE])).exists():
        found = f"{ADAPTER} names its base {config[BASE]}, a folder of this machine"
        tell(f"card: {found}; give its name at the Hub, base = OWNER/NAME")
    return path.read_bytes()


def card_text(path: Path) -> str:
    """Text of a card that somebody wrote; InputError for a file that can't be read as text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        wanted = "expected a model card in Markdown"
        raise InputError(
            f"card: {path} can't be read ({error}), {wanted}; correct the path"
        ) from None
