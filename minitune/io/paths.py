"""Places of files: the shipped programs and configs, the embedded demo, and whatever a program's own paths mean."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(kind: str = "programs") -> dict[str, Path]:
    """Shipped TOML files of a kind (programs or configs) by name: folder and file without the suffix, "demo/pretrain"."""
    root = _root(kind)
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.toml"))}


def program_file(name: str) -> Path:
    """File of a program: the path itself if it exists, else the shipped program of that name, else the path as written."""
    path = Path(name)
    if path.is_file():
        return path
    return shipped().get(name.removeprefix("programs/").removesuffix(".toml"), path)


def locate(path: str, run: Path | None = None) -> Path:
    """Place that a program's path means.

    demo and demo/... are embedded, configs/... may be shipped, run/... lies in the folder of the run that asks, the rest is
    the user's.
    """
    head, _, rest = path.partition("/")
    if head == "demo":
        return PACKAGE / "demo" / (rest or "model")
    if head == "run" and run is not None:
        return run / rest
    if head == "configs" and not Path(path).exists():
        return _root("configs") / rest
    return Path(path).expanduser()


def cache() -> Path:
    """Folder where tokenized data is kept between runs: $XDG_CACHE_HOME/minitune, by default ~/.cache/minitune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minitune"


def _root(kind: str) -> Path:
    packaged = PACKAGE / "_shipped" / kind  # in a wheel; in a checkout they stand beside the package
    return packaged if packaged.is_dir() else PACKAGE.parent / kind
