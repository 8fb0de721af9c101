"""Places of files: the shipped programs and configs, the embedded demo, and whatever a program's
own paths mean.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from minitune.errors import InputError
from minitune.io.cache_size import MODELS

REGISTRIES = ("mlflow", "wandb", "azureml", "hf")
# what decides which registry a name is of
REGISTRY_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "WANDB_BASE_URL",
    "HF_ENDPOINT",
    "AZUREML_ARM_WORKSPACE_NAME",
)
PACKAGE = Path(__file__).resolve().parents[1]


def shipped(kind: str = "programs") -> dict[str, Path]:
    """Shipped TOML files of a kind (programs or configs) by name: folder and file without the
    suffix, "demo/pretrain".
    """
    root = _root(kind)
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.toml"))
    }


def program_file(name: str) -> Path:
    """File of a program: the path itself if it exists, else the shipped program of that name, else
    the path as written.
    """
    require_possible(name)
    path = Path(name)
    if path.is_file():
        return path
    return shipped().get(name.removeprefix("programs/").removesuffix(".toml"), path)


def locate(path: str, run: Path | None = None) -> Path:
    """Place that a program's path means.

    demo and demo/... are embedded, configs/... may be shipped, run/... lies in the folder of the
    run that asks, REGISTRY:NAME where it was fetched to, the rest is the user's.
    """
    require_possible(path)
    if is_registered_name(path):
        return _fetched(path) or Path(path)
    head, _, rest = path.partition("/")
    if head == "demo":
        embedded = PACKAGE / "demo" / (rest or "model")
        # A user may have a folder called demo too: what is not embedded lies there.
        return embedded if embedded.exists() or not Path(path).exists() else Path(path)
    if head == "run" and run is not None:
        return run / rest
    if head == "configs" and not user_path(path).exists():
        return _root("configs") / rest
    return user_path(path)


def is_registered_name(text: str) -> bool:
    """True for a text that begins as the name of a registered model does, REGISTRY:NAME:VERSION."""
    registry, colon, name = text.partition(":")
    return registry in REGISTRIES and bool(colon and name)


def registered_note(name: str) -> Path:
    """File of the cache that says where a registered model was fetched to last."""
    where = [name, os.getcwd(), *(os.environ.get(key) for key in REGISTRY_VARIABLES)]
    digest = hashlib.sha256(json.dumps(where).encode()).hexdigest()
    return cache() / MODELS / f"{digest[:32]}.json"


def _fetched(name: str) -> Path | None:
    """Folder of a registered model that was fetched; None for one that was not, or is gone."""
    try:
        folder = Path(json.loads(registered_note(name).read_bytes())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None


def user_path(text: str) -> Path:
    """Path as a user writes it, ~ replaced; InputError for an unknown home and a NUL character."""
    require_possible(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        home = text.partition("/")[0]
        raise InputError(
            f"paths: {text!r} begins with {home}, whose folder is unknown, expected a home; write "
            "the whole path"
        ) from None


def require_possible(text: str) -> None:
    """InputError for a path with a NUL character, or with a name of more than 255 bytes."""
    names = text.replace(os.sep, "/").split("/")
    if "\0" in text:
        found = "holds a NUL character"
    elif any(len(os.fsencode(name)) > 255 for name in names):
        found = "has a name of more than 255 bytes"
    else:
        return
    raise InputError(f"paths: {text[:100]!r} {found}, expected a path; correct it")


def is_present(path: Path) -> bool:
    """True if anything of that name is there, be it a link whose file is gone."""
    return os.path.lexists(path)


def cache() -> Path:
    """Folder where tokenized data is kept: $XDG_CACHE_HOME/minitune, by default ~/.cache/minitune.

    Where that can't be written (no home, a read-only one), a private temporary folder.
    """
    return _cache_and_fault()[0]


def cache_note() -> str | None:
    """Sentence for the user if tokenized data is not kept in its usual folder, else None."""
    folder, fault = _cache_and_fault()
    if fault is None:
        return None
    where = f"tokenized data is in {folder}; XDG_CACHE_HOME names another place"
    return f"the usual cache can't be used ({fault}): {where}"


def _cache_and_fault() -> tuple[Path, str | None]:
    """(folder of the cache, which can be written; why it is not the usual one, else None)."""
    try:
        folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minitune"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder, None
        fault = f"{folder} is not writable"
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    except InputError:
        fault = "the home folder is unknown"
    return _private_temporary_folder(), fault


def _private_temporary_folder() -> Path:
    """Folder of this user alone; InputError for another's, who could change the data."""
    # on Windows, which has no user numbers, each user has temporary folders of his own
    user = os.getuid() if hasattr(os, "getuid") else "cache"
    folder = Path(tempfile.gettempdir()) / f"minitune-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != user):
        raise InputError(f"paths: {folder} is not yours, expected your own; set XDG_CACHE_HOME")
    return folder


def _root(kind: str) -> Path:
    # in a wheel; in a checkout they stand beside the package
    packaged = PACKAGE / "_shipped" / kind
    return packaged if packaged.is_dir() else PACKAGE.parent / kind
