"""Data sets of the Hub: the files of one split, in a folder of their own."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.registry.hub import bring, deliver, folder_lock, list_files, require_package
from minitune.registry.hub_errors import Asked, explained
from minitune.registry.hub_splits import DataName, files_of

README = "README.md"
# nothing hidden, no way out of the folder, no drive, no glob
SAFE = re.compile(r"([A-Za-z0-9_][\w.+=,@ -]*/)*[A-Za-z0-9_][\w.+=,@ -]*", re.ASCII)


class FetchedData(NamedTuple):
    """Files of a split, and the commit that they are of."""

    files: list[Path]
    commit: str
    n_bytes: int


def fetch_data(
    name: DataName,
    folder_of: Callable[[str], Path],
    is_data_file: Callable[[str], bool],
    tell: Callable[[str], None],
    elsewhere: str,
) -> FetchedData:
    """Bring the files of a split, and the README, into the folder of their commit.

    What is there already is not fetched again. elsewhere: what names another folder, for messages.
    InputError for a repository, revision, config, split, token, network or disk that won't do.
    """
    require_package()
    with explained(Asked(name.repo, name.revision, folder_of(""), "dataset", elsewhere)):
        listing = list_files(name.repo, name.revision, "dataset")
        folder = folder_of(listing.commit)
        safe = {file: n for file, n in listing.sizes.items() if SAFE.fullmatch(file)}
        with folder_lock(folder, tell):
            readme = {file: n for file, n in safe.items() if file == README}
            bring(folder, listing, readme) if readme else None
            rows = sorted(file for file in safe if is_data_file(file))
            files = files_of(name, rows, _card(folder / README) if readme else {})
            sizes = {file: safe[file] for file in files}
            deliver(folder, listing, {**readme, **sizes}, tell)
    return FetchedData([folder / file for file in files], listing.commit, sum(sizes.values()))


def _card(readme: Path) -> Mapping[str, Any]:
    """Head of a README as a dict; nothing where it has none, or one that is no YAML."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(readme) or {}
    except Exception:  # of a YAML library that is no dependency here
        return {}
