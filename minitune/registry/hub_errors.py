"""Sentences for what huggingface_hub and its HTTP library raise."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from minitune.errors import DiskFullError, InputError, nearest
from minitune.io.atomic import NO_ROOM

N_GUESSES = 100  # names that a message about an unknown one chooses from
# exceptions of huggingface_hub.errors, of which the first that fits counts
REFUSALS = (
    (
        "GatedRepoError",
        "{repo} is gated, expected access; accept its terms at {where}, then set HF_TOKEN to your "
        "token",
    ),
    (
        "RepositoryNotFoundError",
        "{repo} is not at {endpoint} or not open to you, expected OWNER/NAME of a {kind}{near}; "
        "correct the name, or set HF_TOKEN to a token that may read it",
    ),
    (
        "RevisionNotFoundError",
        "{repo} has no revision {revision!r}, expected a branch, a tag or a commit; see "
        "{where}/tree/main",
    ),
    (
        "OfflineModeIsEnabled",
        "{repo} can't be {does} with HF_HUB_OFFLINE set, expected a network; unset it, or use a "
        "folder that is there",
    ),
    (
        "HFValidationError",
        "{repo!r} is no name of a repository ({cause}), expected OWNER/NAME; correct it",
    ),
)
RepoKind = Literal["model", "dataset"]
HTTP_LIBRARIES = ("httpx", "httpx2", "requests", "urllib3")


class Asked(NamedTuple):
    """Repository that a command asks for, and the folder that its files go to."""

    repo: str
    revision: str
    folder: Path
    kind: RepoKind = "model"
    elsewhere: str = "--to"  # what names another folder
    does: Literal["fetched", "written"] = "fetched"  # what becomes of the repository

    @property
    def address(self) -> str:
        """Address of the repository, on the server that HF_ENDPOINT names."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


@contextmanager
def explained(asked: Asked) -> Iterator[None]:
    """Turn what goes wrong with a repository, the network or the disk into an InputError."""
    import huggingface_hub.errors as hf

    try:
        yield
    # what its HTTP library raises is of a package that is no dependency here
    except Exception as error:
        # of uploads RuntimeError names the file, and its cause says why
        is_wrapped = isinstance(error, hf.LocalEntryNotFoundError | RuntimeError)
        cause = (error.__cause__ if is_wrapped else None) or error
        said = (
            _refusal(cause, asked)
            or _answer(cause, asked)
            or _disk(cause, asked)
            or _network(cause, asked)
        )
        if said is None:
            raise
        is_full = isinstance(cause, OSError) and cause.errno in NO_ROOM
        kind = DiskFullError if is_full else InputError
        raise kind(f"hub: {' '.join(said.split())}") from None


def _refusal(cause: BaseException, asked: Asked) -> str | None:
    """Sentence for what huggingface_hub has an exception of its own for."""
    import huggingface_hub.errors as hf
    from huggingface_hub import constants

    fitting = (words for name, words in REFUSALS if isinstance(cause, getattr(hf, name)))
    words = next(fitting, None)
    if words is None:
        return None
    return words.format(
        repo=asked.repo,
        kind="data set" if asked.kind == "dataset" else "model",
        where=asked.address,
        endpoint=constants.ENDPOINT,
        revision=asked.revision,
        does=asked.does,
        cause=cause,
        near=_near_names(asked) if "{near}" in words else "",
    )


def _answer(cause: BaseException, asked: Asked) -> str | None:
    """Sentence for any other answer of the server."""
    response = getattr(cause, "response", None)
    if response is None:
        return None
    status = getattr(response, "status_code", "no status")
    remedy = "try again later"
    if status in (401, 403):
        may = "read" if asked.does == "fetched" else "write"
        remedy = f"set HF_TOKEN to a token that may {may} it"
    if asked.does == "written":
        return f"{asked.address} answered {status}, expected it to take files; {remedy}"
    return f"{asked.address} answered {status}, expected its files; {remedy}"


def _disk(cause: BaseException, asked: Asked) -> str | None:
    """Sentence for a disk that is full, and for a file that can't be written."""
    if not isinstance(cause, OSError):
        return None
    if cause.errno in NO_ROOM:
        return (
            f"the disk of {asked.folder} is full, expected room for {asked.repo}; free some space "
            f"or choose another with {asked.elsewhere}"
        )
    if cause.filename is not None:
        return (
            f"{cause.filename} can't be written ({cause.strerror}), expected a folder of yours; "
            f"choose another with {asked.elsewhere}"
        )
    return None


def _network(cause: BaseException, asked: Asked) -> str | None:
    """Sentence for a server that does not answer."""
    library = type(cause).__module__.partition(".")[0]
    if not isinstance(cause, OSError) and library not in HTTP_LIBRARIES:
        return None
    return (
        f"{asked.address} can't be reached ({cause}), expected an answer; check the network, "
        "HF_ENDPOINT and the proxy"
    )


def _near_names(asked: Asked) -> str:
    """End of a message about an unknown name: one that is near, of the same owner or of others."""
    import huggingface_hub as hf

    owner, _, name = asked.repo.rpartition("/")
    hub = hf.HfApi()
    listed = hub.list_models if asked.kind == "model" else hub.list_datasets
    try:
        near = list(listed(author=owner, limit=N_GUESSES)) if owner else []
        near += listed(search=name, limit=N_GUESSES)
    except Exception:  # a guess that fails is none, whatever its HTTP library raises
        return ""
    return nearest(asked.repo, [one.id for one in near])
