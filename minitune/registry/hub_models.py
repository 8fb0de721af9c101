"""Registry in a repository of the Hugging Face Hub: the tags v1, v2, ... are versions, others are
aliases."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitune.registry.hub import fetch, require_package
from minitune.registry.hub_errors import explained
from minitune.registry.hub_upload import MAIN, Target, require_target
from minitune.registry.versions import LATEST, Version, absent

NUMBERED = re.compile(r"v(\d+)")


class HubModels:
    """Tagged commits of a repository."""

    def __init__(self) -> None:
        require_package()

    def check(self, name: str) -> None:
        """InputError for a repository that takes no upload."""
        require_target(Target(name))

    def tag(self, name: str, commit: str) -> Version:
        """New version at a commit."""
        import huggingface_hub as hf

        numbers = [int(one.number) for one in self.versions(name)]
        number = max(numbers, default=0) + 1
        with explained(Target(name).asked):
            hf.HfApi().create_tag(name, tag=f"v{number}", revision=commit)
        return Version(str(number), None, commit)

    def versions(self, name: str) -> Sequence[Version]:
        """Versions by their numbers; none of a repository that is not there."""
        tags = {NUMBERED.fullmatch(tag): commit for tag, commit in self._tags(name).items()}
        found = [Version(match[1], None, commit) for match, commit in tags.items() if match]
        return sorted(found, key=lambda one: int(one.number))

    def find(self, name: str, wanted: str) -> Version:
        """Version of a number, of another tag, or the newest; without versions, the branch main."""
        known = self.versions(name)
        if wanted == LATEST:
            return known[-1] if known else Version(MAIN, None, MAIN)
        tags = self._tags(name)
        commit = tags.get(f"v{wanted}", tags.get(wanted))
        if commit is None:
            names = [tag for tag in tags if not NUMBERED.fullmatch(tag)]
            raise absent(f"hf:{name}", wanted, [*names, *(one.number for one in known)])
        return next((one for one in known if one.place == commit), Version(wanted, None, commit))

    def set_alias(self, name: str, alias: str, version: Version) -> None:
        """Have a tag name a version's commit."""
        if alias == LATEST:
            return
        import huggingface_hub as hf

        there = self._tags(name).get(alias)
        if there == version.place:
            return
        with explained(Target(name).asked):
            if there is not None:
                hf.HfApi().delete_tag(name, tag=alias)
            hf.HfApi().create_tag(name, tag=alias, revision=version.place)

    def fetch(self, name: str, version: Version, folder: Path, tell: Callable[[str], None]) -> Path:
        """Given folder with the files of a version that a model needs."""
        fetch(name, version.place, folder, tell)
        return folder

    def _tags(self, name: str) -> dict[str, str]:
        """Commits by tag; none of a repository that is not there."""
        import huggingface_hub as hf
        from huggingface_hub.errors import RepositoryNotFoundError

        with explained(Target(name).asked._replace(does="fetched")):
            try:
                refs: Any = hf.HfApi().list_repo_refs(name)
            except RepositoryNotFoundError:
                return {}
        return {one.name: one.target_commit for one in refs.tags}
