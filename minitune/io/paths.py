"""Places of files: the shipped programs and configs, the embedded demo, and whatever a program's own paths mean."""

import os
import tempfile
from pathlib import Path

from minitune.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(kind: str = "programs") -> dict[str, Path]:
    """Shipped TOML files of a kind (programs or configs) by name: folder and file without the suffix, "demo/pretrain"."""
    root = _root(kind)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.toml"))}


def program_file(name: str) -> Path:
    """File of a program: the path itself if it exists, else the shipped program of that name, else the path as written."""
    require_possible(name)
    path = Path(name)
    if path.is_file():
        return path
    return shipped().get(name.removeprefix("programs/").removesuffix(".toml"), path)


def locate(path: str, run: Path | None = None) -> Path:
    """Place that a program's path means.

    demo and demo/... are embedded, configs/... may be shipped, run/... lies in the folder of the run that asks, the rest is
    the user's.
    """
    require_possible(path)
    head, _, rest = path.partition("/")
    if head == "demo":
        return PACKAGE / "demo" / (rest or "model")
    if head == "run" and run is not None:
        return run / rest
    if head == "configs" and not Path(path).exists():
        return _root("configs") / rest
    return expanded(path)


def expanded(path: str) -> Path:
    """Path as a user wrote it, with ~ as their home; InputError for one that no file can have."""
    require_possible(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        found = "names a home folder that this system does not know"
        raise InputError(f"paths: {path[:100]!r} {found}, expected a path; write it out") from None


def require_possible(path: str) -> None:
    """InputError for a path with a zero byte, or with a name of more than 255 bytes."""
    names = path.replace(os.sep, "/").split("/")
    if "\0" in path:
        found = "holds a zero byte"
    elif any(len(os.fsencode(name)) > 255 for name in names):
        found = "has a name of more than 255 bytes"
    else:
        return
    raise InputError(f"paths: {path[:100]!r} {found}, expected a path; correct it")


def cache() -> Path:
    """Folder where tokenized data is kept between runs: $XDG_CACHE_HOME/minitune, by default
    ~/.cache/minitune; where that can't be written, one of this user in the temporary folder."""
    wanted = _wanted_cache()
    if wanted is not None and _can_be_written(wanted):
        return wanted
    return _temporary_cache()


def cache_note() -> str | None:
    """Sentence for the user about a cache that is not where it should be; None if it is there."""
    wanted, used = _wanted_cache(), cache()
    if used == wanted:
        return None
    place = wanted or "a cache folder without a home folder"
    return f"{place} can't be written: tokenized data goes to {used}; set XDG_CACHE_HOME to keep it"


def _wanted_cache() -> Path | None:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, and a user without a name
        return None
    return root / "minitune"


def _can_be_written(path: Path) -> bool:
    """True if files can be made in a folder, or in the one in which it would be made."""
    for place in (path, *path.absolute().parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def _temporary_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"minitune-cache-{user}"
    path.mkdir(mode=0o700, exist_ok=True)
    # Anyone may write in a temporary folder: one of another user's, or a link, is not trusted.
    if path.is_symlink() or path.stat().st_uid != user or not os.access(path, os.W_OK):
        return Path(tempfile.mkdtemp(prefix="minitune-cache-"))
    return path


def _root(kind: str) -> Path:
    packaged = PACKAGE / "_shipped" / kind  # in a wheel; in a checkout they stand beside the package
    return packaged if packaged.is_dir() else PACKAGE.parent / kind
