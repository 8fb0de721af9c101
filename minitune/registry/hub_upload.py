"""Uploads to the Hugging Face Hub, or to whatever HF_ENDPOINT names: one commit of what changed.

A file that arrived before a broken upload is not sent again: the Hub knows it by its hash.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from minitune.errors import InputError
from minitune.io.checksums import checksum
from minitune.io.safetensors_header import INDEX
from minitune.io.units import format_bytes
from minitune.registry.hub import REPO, Listing, list_files, require_package
from minitune.registry.hub_errors import Asked, explained

MAIN = "main"  # branch that a new repository has
TOKEN = "set HF_TOKEN to a token that may write, or run `hf auth login`"
CONFIGS = (INDEX, "config.json", "adapter_config.json")
Content = Path | bytes  # of a file that is sent: one on the disk, or the bytes themselves


class Target(NamedTuple):
    """Repository of models and a branch of it."""

    repo: str
    revision: str = MAIN
    private: bool = False  # of a repository that is new

    @property
    def asked(self) -> Asked:
        """Repository as messages name it."""
        return Asked(self.repo, self.revision, Path(), does="written")


class Uploaded(NamedTuple):
    """End of an upload: where the files lie, at which commit, and how many of them were sent."""

    address: str
    commit: str
    n_sent: int


def require_target(target: Target) -> Listing | None:
    """Files that a repository has; None for one that does not exist yet, and that can be made.

    InputError for a missing package, network or token, another's name, and a revision that is not
    there.
    """
    if not REPO.fullmatch(target.repo) or "/" not in target.repo:
        raise InputError(
            f"hub: {target.repo!r} is no name of a repository, expected OWNER/NAME; correct it"
        )
    require_package()
    from huggingface_hub.errors import RepositoryNotFoundError

    with explained(target.asked):
        _require_owner(target)
        try:
            listing = list_files(target.repo, target.revision, "model")
        except RepositoryNotFoundError:
            listing = None
    if listing is None and target.revision != MAIN:
        found = f"{target.repo} does not exist yet, so that it has no revision {target.revision!r}"
        raise InputError(f"hub: {found}, expected {MAIN}; upload to {MAIN} first")
    if listing is not None and target.private and not listing.private:
        found = f"{target.repo} exists and is public"
        remedy = "make it private in its settings, or choose another name"
        raise InputError(f"hub: {found}, expected a private one; {remedy}")
    return listing


def upload(
    target: Target,
    files: Mapping[str, Content],
    message: str,
    tell: Callable[[str], None],
    *,
    minor: Sequence[str] = (),
) -> Uploaded:
    """Put files into a repository, which is made if there is none, by one commit.

    files: by their names there. Weights of an earlier upload that are none of them go. Nothing is
    committed where all is as it was, up to those of the names `minor`. InputError as
    require_target raises it.
    """
    listing = require_target(target)
    import huggingface_hub as hf

    hub = hf.HfApi()
    with explained(target.asked):
        if listing is None:
            hub.create_repo(target.repo, private=target.private, exist_ok=True)
            listing = list_files(target.repo, target.revision, "model")
        changed = {name: one for name, one in files.items() if not _is_there(listing, name, one)}
        stale = _stale(listing, files)
        if not set(changed) - set(minor) and not stale:
            tell(f"hub: {target.repo} has these files already")
            return Uploaded(target.asked.address, listing.commit, 0)
        n_bytes = format_bytes(sum(map(_size, changed.values())))
        tell(f"hub: {target.repo}: {len(changed)} of {len(files)} files to send, {n_bytes}")
        for name in stale:
            tell(f"hub: {target.repo}: {name} is of an earlier upload and goes")
        operations: list[Any] = [hf.CommitOperationDelete(name) for name in stale]
        for name, content in changed.items():
            operations.append(hf.CommitOperationAdd(name, content))
        with _advice_told(target.repo, tell):
            done = hub.create_commit(
                target.repo, operations, commit_message=message, revision=target.revision
            )
    return Uploaded(target.asked.address, str(done.oid), len(changed))


def text_at(target: Target, listing: Listing | None, name: str) -> str | None:
    """Text of a file that a repository has; None where it has none."""
    if listing is None or name not in listing.sizes:
        return None
    import huggingface_hub as hf

    with explained(target.asked), TemporaryDirectory() as folder:
        file = hf.hf_hub_download(target.repo, name, revision=listing.commit, local_dir=folder)
        return Path(file).read_text("utf-8", errors="replace")


def _require_owner(target: Target) -> None:
    """InputError without a token, and for a repository of somebody else."""
    import huggingface_hub as hf

    if hf.get_token() is None:
        raise InputError(f"hub: no token for {target.repo}, expected one that may write; {TOKEN}")
    user = hf.HfApi().whoami()
    owner = target.repo.partition("/")[0]
    names = [str(user["name"]), *(str(one["name"]) for one in user.get("orgs", []))]
    if owner.casefold() not in [name.casefold() for name in names]:
        found = f"{target.repo} is of {owner}, and your token of {user['name']}"
        raise InputError(
            f"hub: {found}, expected one of {', '.join(names)} before the slash; choose another "
            f"name, or {TOKEN}"
        )
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        found = f"the token of {user['name']} may only read"
        raise InputError(f"hub: {found}, expected one that may write; {TOKEN}")


def _is_there(listing: Listing, name: str, content: Content) -> bool:
    """True if a repository has a file of that name and content."""
    if listing.sizes.get(name) != _size(content):
        return False
    if name in listing.digests:
        is_bytes = isinstance(content, bytes)
        digest = hashlib.sha256(content).hexdigest() if is_bytes else checksum(content).sha256
        return listing.digests[name] == digest
    return listing.blobs.get(name) == _git_name(content)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _git_name(content: Content) -> str:
    """Name that git gives to a content: SHA-1 of its length and its bytes."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(listing: Listing, files: Mapping[str, Content]) -> list[str]:
    """Weights and configs in the top folder of a repository that an upload takes the place of."""
    if not any(name.endswith(".safetensors") for name in files):
        return []
    model = [name for name in listing.sizes if name.endswith(".safetensors") or name in CONFIGS]
    return [name for name in model if "/" not in name and name not in files]


@contextmanager
def _advice_told(repo: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Tell what the Hub advises on the head of README.md; InputError where it refuses it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            found = f"{repo} refuses README.md ({error}), expected a head that the Hub knows"
            raise InputError(f"hub: {' '.join(found.split())}; correct it") from None
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if "README.md" in text:  # others are of its HTTP library
            tell(f"hub: {text}")
