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

from minitune.errors import DiskFullError, InputError, nearest
from minitune.io import locks
from minitune.io.atomic import NO_ROOM, require_room
from minitune.io.checksums import checksum
from minitune.io.safetensors_header import INDEX, SINGLE, read_weight_map
from minitune.io.units import format_bytes

API_TIMEOUT_S = 30.0
N_GUESSES = 100  # names that a message about an unknown one chooses from
# of the top folder: config, tokenizer, template, license
SMALL = ("*.json", "*.model", "*.jinja", "*.txt")
ADAPTER = "adapter_model.safetensors"
REPO = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
# in the one folder that is fetched
TEMPLATE = re.compile(r"additional_chat_templates/[A-Za-z0-9_][\w.+=-]*\.jinja", re.ASCII)
# no separator, no drive, no glob, nothing hidden
FILE = re.compile(r"[A-Za-z0-9_][\w.+=-]*", re.ASCII)


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
    try:
        import huggingface_hub as hf
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError:
        raise InputError(
            "hub: the package huggingface_hub is not installed, expected it for downloads; pip "
            "install 'minitune[hf]'"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    set_verbosity_error()  # what it says of its retries would stand beside the one sentence
    with _explained(repo, revision, folder):
        how = {"files_metadata": True, "timeout": API_TIMEOUT_S}
        info = hf.HfApi().model_info(repo, revision=revision, **how)
        files = info.siblings or []
        listed = {file.rfilename: file.size or 0 for file in files}
        digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
        small = {name: n for name, n in listed.items() if _is_small(name)}
        commit = str(info.sha)

        def bring(sizes: Mapping[str, int]) -> None:
            _refuse_foreign(folder, repo, sizes)
            for name in _unfinished(folder, sizes):
                # huggingface_hub would take it for the whole file
                (folder / name).unlink(missing_ok=True)
            with warnings.catch_warnings():
                # a disk without room ends in a sentence of ours
                warnings.filterwarnings("ignore", message="Not enough free disk space")
                names = list(sizes)
                hf.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=names)

        with folder_lock(folder, tell):
            _require_room_for_missing(folder, small)
            bring(small)
            sizes = {**small, **_weights(repo, folder, listed)}
            _refuse_others(folder, repo, sizes)
            missing = _require_room_for_missing(folder, sizes)
            if missing:
                tell(
                    f"hub: {repo}: {len(missing)} of {len(sizes)} files to fetch, "
                    f"{format_bytes(sum(missing.values()))}"
                )
            bring(sizes)
            if cut := next(iter(_unfinished(folder, sizes)), None):
                raise InputError(
                    f"hub: {folder / cut} has another size than the {sizes[cut]} bytes that "
                    f"{repo} lists, expected the same; "
                    "run the same command again"
                )
            new = {name: digest for name, digest in digests.items() if name in missing}
            _remove_damaged(folder, repo, new)
    return sizes, commit


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
                "of that name or the file "
                f"of {repo}; move it away, or choose another folder with --to"
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
    there = {
        name: (folder / name).stat().st_size if (folder / name).is_file() else -1 for name in sizes
    }
    return {name: n for name, n in sizes.items() if there[name] != n}


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


@contextmanager
def _explained(repo: str, revision: str, folder: Path) -> Iterator[None]:
    import huggingface_hub.errors as hf
    from huggingface_hub import constants

    try:
        yield
    # what its HTTP library raises is of a package that is no dependency here
    except Exception as error:
        cause = (
            error.__cause__
            if isinstance(error, hf.LocalEntryNotFoundError) and error.__cause__
            else error
        )
        response = getattr(cause, "response", None)
        where = f"{constants.ENDPOINT}/{repo}"
        if isinstance(cause, hf.GatedRepoError):
            said = (
                f"{repo} is gated, expected access; accept its terms at {where}, then set "
                "HF_TOKEN to "
                "your token"
            )
        elif isinstance(cause, hf.RepositoryNotFoundError):
            said = (
                f"{repo} is not at {constants.ENDPOINT} or not open to you, expected OWNER/NAME of "
                f"a model{_near_names(repo)}; correct the name, or set HF_TOKEN to a token that "
                "may read it"
            )
        elif isinstance(cause, hf.RevisionNotFoundError):
            said = (
                f"{repo} has no revision {revision!r}, expected a branch, a tag or a commit; see "
                f"{where}/tree/main"
            )
        elif isinstance(cause, hf.OfflineModeIsEnabled):
            said = (
                f"{repo} can't be fetched with HF_HUB_OFFLINE set, expected a network; unset it, "
                "or "
                "use a folder that is there"
            )
        elif response is not None:
            status = getattr(response, "status_code", "no status")
            said = f"{where} answered {status}, expected its files; " + (
                "set HF_TOKEN to a token that may read it"
                if status in (401, 403)
                else "try again later"
            )
        elif isinstance(cause, OSError) and cause.errno in NO_ROOM:
            said = (
                f"the disk of {folder} is full, expected room for {repo}; free some space or "
                "choose "
                "another with --to"
            )
        elif isinstance(cause, OSError) and cause.filename is not None:
            said = (
                f"{cause.filename} can't be written ({cause.strerror}), expected a folder of "
                "yours; "
                "choose another with --to"
            )
        elif isinstance(cause, hf.HFValidationError):
            said = f"{repo!r} is no name of a repository ({cause}), expected OWNER/NAME; correct it"
        elif isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] in (
            "httpx",
            "httpx2",
            "requests",
            "urllib3",
        ):
            said = (
                f"{where} can't be reached ({cause}), expected an answer; check the network, "
                "HF_ENDPOINT and the proxy"
            )
        else:
            raise
        is_full = isinstance(cause, OSError) and cause.errno in NO_ROOM
        kind = DiskFullError if is_full else InputError
        raise kind(f"hub: {' '.join(said.split())}") from None


def _near_names(repo: str) -> str:
    """End of a message about an unknown name: one that is near, of the same owner or of others."""
    import huggingface_hub as hf

    owner, _, name = repo.rpartition("/")
    hub = hf.HfApi()
    try:
        models = list(hub.list_models(author=owner, limit=N_GUESSES)) if owner else []
        models += hub.list_models(search=name, limit=N_GUESSES)
    except Exception:  # a guess that fails is none, whatever its HTTP library raises
        return ""
    return nearest(repo, [model.id for model in models])
