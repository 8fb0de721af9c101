"""Download verb: a model or adapter from the Hugging Face Hub, or from whatever HF_ENDPOINT names,
into a plain folder.

Everything goes through the huggingface_hub package: tokens, proxies, retries and partly finished
files are its business.
"""

import fnmatch
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minitune.errors import InputError
from minitune.io import locks
from minitune.io.atomic import require_room
from minitune.io.checksums import checksum
from minitune.io.safetensors_header import INDEX, SINGLE, read_weight_map
from minitune.io.units import format_bytes
from minitune.registry.hub_errors import Asked, RepoKind, explained

API_TIMEOUT_S = 30.0
# of the top folder: config, tokenizer, template, license
SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
ADAPTER = "adapter_model.safetensors"
REPO = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
# in the one folder that is fetched
TEMPLATE = re.compile(r"additional_chat_templates/[A-Za-z0-9_][\w.+=-]*\.jinja", re.ASCII)
# no separator, no drive, no glob, nothing hidden
FILE = re.compile(r"[A-Za-z0-9_][\w.+=-]*", re.ASCII)


class Listing(NamedTuple):
    """Files of a repository at one commit: bytes of each, the SHA-256 of those that have it, and
    what git calls the content of the others.
    """

    repo: str
    kind: RepoKind
    commit: str
    sizes: dict[str, int]
    digests: dict[str, str]
    blobs: dict[str, str]
    private: bool = False


def fetch(
    repo: str, revision: str, folder: Path, tell: Callable[[str], None]
) -> tuple[dict[str, int], str]:
    """Bring the files of a repository that a model needs into a folder: (bytes by name, commit).

    What is there already is not fetched again. InputError for a repository, revision, token,
    network or disk that won't do.
    """
    if not REPO.fullmatch(repo):
        raise InputError(
            f"hub: {repo!r} is no name of a repository, expected OWNER/NAME; correct it"
        )
    require_package()
    with explained(Asked(repo, revision, folder)):
        listing = list_files(repo, revision, "model")
        with folder_lock(folder, tell):
            # the index of the weights is a small file, so these come first
            small = {name: n for name, n in listing.sizes.items() if _is_small(name)}
            _require_room_for_missing(folder, small)
            bring(folder, listing, small)

            sizes = {**small, **_weights(repo, folder, listing.sizes)}
            _refuse_others(folder, repo, sizes)
            deliver(folder, listing, sizes, tell)
    return sizes, listing.commit


def deliver(
    folder: Path, listing: Listing, sizes: Mapping[str, int], tell: Callable[[str], None]
) -> None:
    """Bring files into a folder that has room for them, and compare them with what is listed."""
    missing = _require_room_for_missing(folder, sizes)
    if missing:
        of_all = f"{len(missing)} of {len(sizes)} files to fetch"
        tell(f"hub: {listing.repo}: {of_all}, {format_bytes(sum(missing.values()))}")
    bring(folder, listing, sizes)
    _refuse_cut(folder, listing.repo, sizes)
    new = {name: text for name, text in listing.digests.items() if name in missing}
    _remove_damaged(folder, listing.repo, new)


def require_package() -> None:
    """InputError without huggingface_hub, which is then told to be quiet."""
    try:
        from huggingface_hub import utils
    except ImportError:
        raise InputError(
            "hub: the package huggingface_hub is not installed, expected it for the Hub; pip "
            "install 'minitune[hf]'"
        ) from None
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    # what it says of its retries would stand beside the one sentence
    utils.logging.set_verbosity_error()


def list_files(repo: str, revision: str, kind: RepoKind) -> Listing:
    """Files that a repository lists."""
    import huggingface_hub as hf

    info_of = hf.HfApi().model_info if kind == "model" else hf.HfApi().dataset_info
    info = info_of(repo, revision=revision, files_metadata=True, timeout=API_TIMEOUT_S)
    files = info.siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
    blobs = {file.rfilename: file.blob_id or "" for file in files if file.lfs is None}
    return Listing(repo, kind, str(info.sha), sizes, digests, blobs, bool(info.private))


def bring(folder: Path, listing: Listing, sizes: Mapping[str, int]) -> None:
    """Fetch those of the files that are not in the folder yet."""
    import huggingface_hub as hf

    _refuse_foreign(folder, listing.repo, sizes)
    for name in _unfinished(folder, sizes):
        # huggingface_hub would take it for the whole file
        (folder / name).unlink(missing_ok=True)
    with warnings.catch_warnings():
        # a disk without room ends in a sentence of ours
        warnings.filterwarnings("ignore", message="Not enough free disk space")
        hf.snapshot_download(
            listing.repo,
            repo_type=listing.kind,
            revision=listing.commit,
            local_dir=folder,
            allow_patterns=list(sizes),
        )


def _refuse_cut(folder: Path, repo: str, sizes: Mapping[str, int]) -> None:
    """InputError for a file that did not arrive whole."""
    cut = next(iter(_unfinished(folder, sizes)), None)
    if cut is not None:
        raise InputError(
            f"hub: {folder / cut} has another size than the {sizes[cut]} bytes that {repo} lists, "
            "expected the same; run the same command again"
        )


def _remove_damaged(folder: Path, repo: str, digests: Mapping[str, str]) -> None:
    """InputError for a file without the SHA-256 that its repository lists; it is removed."""
    for name, digest in digests.items():
        if checksum(folder / name).sha256 != digest:
            (folder / name).unlink()
            raise InputError(
                f"hub: {folder / name} arrived with another SHA-256 than {repo} lists, "
                "expected the same; it was removed: run the same command again"
            )


def _is_small(name: str) -> bool:
    """True for a file of a model that is no weights."""
    in_top_folder = FILE.fullmatch(name) and any(fnmatch.fnmatch(name, glob) for glob in SMALL)
    return bool(in_top_folder or TEMPLATE.fullmatch(name))


def _weights(repo: str, folder: Path, listed: Mapping[str, int]) -> dict[str, int]:
    """Weight files: those of the index if there is one, else the single file, else an adapter's."""
    if INDEX in listed:
        names = sorted(set(read_weight_map(folder, "hub", f"tell the owner of {repo}").values()))
    else:
        names = [name for name in (SINGLE, ADAPTER) if name in listed][:1]
    odd = next((name for name in names if not (FILE.fullmatch(name) and name in listed)), None)
    if odd is not None:
        raise InputError(
            f"hub: {INDEX} of {repo} points to {odd!r}, expected one of its files; tell the owner "
            f"of {repo}"
        )
    if not names:
        some_files = ", ".join(sorted(listed)[:6]) or "nothing"
        raise InputError(
            f"hub: {repo} holds {some_files}, expected {SINGLE}, {INDEX} or {ADAPTER}; choose a "
            "repository with safetensors"
        )
    return {name: listed[name] for name in names}


def _refuse_others(folder: Path, repo: str, sizes: Mapping[str, int]) -> None:
    other = next(
        (path for path in sorted(folder.glob("*.safetensors")) if path.name not in sizes), None
    )
    if other is not None:
        raise InputError(
            f"hub: {other} is no file of {repo} at this revision, expected none beside them; "
            "remove it or choose --to"
        )


def _refuse_foreign(folder: Path, repo: str, sizes: Mapping[str, int]) -> None:
    """InputError for a file that a download would replace although none brought it, or a user
    changed it since.
    """
    for name in sizes:
        if os.path.lexists(folder / name) and not _downloaded(folder, name):
            raise InputError(
                f"hub: {folder / name} was not downloaded, or was changed since, expected nothing "
                f"of that name or the file of {repo}; move it away, or choose another folder with "
                "--to"
            )


def _downloaded(folder: Path, name: str) -> bool:
    """True if a file is as huggingface_hub left it: its record of three lines ends with the time of
    the download [s].
    """
    record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    try:
        time_s = float(record.read_text(encoding="utf-8").splitlines()[2])
        return (folder / name).is_file() and (folder / name).stat().st_mtime <= time_s + 1
    except (OSError, ValueError, IndexError):
        return False


def _unfinished(folder: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Files that are not there, or not in the size that they have to have."""

    def is_whole(name: str) -> bool:
        file = folder / name
        return file.is_file() and file.stat().st_size == sizes[name]

    return {name: n for name, n in sizes.items() if not is_whole(name)}


def _require_room_for_missing(folder: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Files that are not there yet; InputError if the disk can't take them."""
    missing = _unfinished(folder, sizes)
    require_room(folder, sum(missing.values()), "the files that are missing")
    return missing


@contextmanager
def folder_lock(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock, which falls when this process ends, however it ends: one fetches,
    others find it done.
    """
    (folder / ".cache").mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(
            folder / ".cache" / "minitune.lock",
            wait=lambda holder: tell(f"hub: waiting for {holder}, which fetches into {folder}"),
        )
    except locks.Unsupported:
        # a file system without locks: huggingface_hub still keeps two processes from writing one
        # file
        yield
        return
    with lock:
        yield
