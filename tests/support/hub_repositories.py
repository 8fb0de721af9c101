"""Repositories of models that take uploads as the Hub takes them: create, preupload, LFS, commit, branches and tags."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping

OWNER, TOKEN = "somebody", "hf_writes"
LFS_ENDS = (".safetensors", ".gguf", "tokenizer.json")
Answer = tuple[bytes, dict[str, str], int]


class Repository:
    """Files by commit, and the commits that branches and tags name."""

    def __init__(self, private: bool) -> None:
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.private, self.commits, self.messages = private, {"0" * 40: first}, []
        self.branches, self.tags = {"main": "0" * 40}, {}

    def commit_of(self, revision: str) -> str | None:
        named = {**self.branches, **self.tags}
        return named.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[str(self.commit_of(revision))]


class Repositories:
    """Repositories by name; `sent` holds the names of what came over the line, `broken_after` makes it break."""

    def __init__(self) -> None:
        self.by_name: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.stored: list[str] = []  # SHA-256 of each object that was sent, in order
        self.broken_after: int | None = None  # objects, after which storage answers with an error
        self.advice: list[str] = []  # on the head of a README.md
        self.faults: list[str] = []  # of the head of a README.md
        self.role = "write"  # of the token

    def answer(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer | None:
        """Answer to a request; None for one that no repository here is asked with."""
        is_json = str(headers.get("Content-Type", "")).endswith("json") and "ndjson" not in headers["Content-Type"]
        content = json.loads(body) if is_json and body else {}
        if path == "/api/whoami-v2":
            return self._whoami(headers)
        if path == "/api/validate-yaml":
            told = {"warnings": [{"message": one} for one in self.advice], "errors": [{"message": one} for one in self.faults]}
            return _json(told, 400 if self.faults else 200)
        if path == "/api/repos/create":
            name = f"{content.get('organization') or OWNER}/{content['name']}"
            if name in self.by_name:
                return _json({"error": "exists"}, 409)
            self.by_name[name] = Repository(content.get("visibility") == "private" or bool(content.get("private")))
            return _json({"url": f"http://{headers['Host']}/{name}"})
        if match := re.fullmatch(r"/storage/(\w{64})", path):
            return self._store(match[1], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(content, headers) if match[1] in self.by_name else None
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:/([a-z]+)(?:/(.+))?)?", path)
        if match is None or match[1] not in self.by_name:
            return None
        return self._of_one(
            self.by_name[match[1]], match[1], method, match[2] or "revision", match[3] or "main", body, headers["Host"]
        )

    def _of_one(self, one: Repository, name: str, method: str, what: str, rest: str, body: bytes, host: str) -> Answer:
        if what == "refs":
            named = {"branches": one.branches, "tags": one.tags}
            listed = {kind: [{"name": n, "ref": n, "targetCommit": c} for n, c in refs.items()] for kind, refs in named.items()}
            return _json({**listed, "converts": []})
        if what == "tag" and method == "DELETE":
            return _json({}) if one.tags.pop(rest, None) else _refused(404, "RevisionNotFound")
        revision, _, file = rest.partition("/") if what == "resolve" else (rest, "", "")
        commit = one.commit_of(revision)
        if commit is None:
            return _refused(404, "RevisionNotFound")
        if what == "tag":
            tag = json.loads(body)["tag"]
            if tag in one.tags:
                return _refused(409, "exists")
            one.tags[tag] = commit
            return _json({})
        if what == "preupload":
            return _json({"files": [_mode(asked, one.commits[commit]) for asked in json.loads(body)["files"]]})
        if what == "commit":
            return self._commit(one, revision, body, f"http://{host}/{name}")
        files = one.commits[commit]
        if what == "resolve":
            if file not in files:
                return _refused(404, "EntryNotFound")
            digest = hashlib.sha256(files[file]).hexdigest()
            return files[file], {"ETag": f'"{digest}"', "X-Repo-Commit": commit}, 200
        entries = [_entry(file, data) for file, data in files.items()]
        if what == "tree":
            return _json([{"type": "file", "oid": e["blobId"], "size": e["size"], "path": e["rfilename"]} for e in entries])
        return _json({"id": name, "sha": commit, "siblings": entries, "private": one.private})

    def _whoami(self, headers: Mapping[str, str]) -> Answer:
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refused(401, "")
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": self.role}}
        return _json({"type": "user", "name": OWNER, "orgs": [{"name": "their-team"}], "auth": auth})

    def _batch(self, content: dict, headers: Mapping[str, str]) -> Answer:
        """Answer with a place for each object that is not here yet."""
        objects = [{"oid": one["oid"], "size": one["size"]} for one in content["objects"]]
        for one in objects:
            if one["oid"] not in self.objects:
                one["actions"] = {"upload": {"href": f"http://{headers['Host']}/storage/{one['oid']}"}}
        return _json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> Answer:
        if self.broken_after is not None and len(self.stored) >= self.broken_after:
            return _refused(403, "")
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self.stored.append(oid)
        return b"", {}, 200

    def _commit(self, one: Repository, branch: str, body: bytes, address: str) -> Answer:
        """Make a commit of lines of JSON: a header, files in base64, LFS files by hash, deleted ones."""
        files = dict(one.files(branch))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                one.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(str(len(one.commits)).encode()).hexdigest()
        one.commits[commit] = files
        one.branches[branch] = commit
        return _json({"commitUrl": f"{address}/commit/{commit}", "commitOid": commit, "success": True})


def _mode(asked: dict, files: Mapping[str, bytes]) -> dict:
    """Way in which the Hub wants a file, and what git calls the one that it has."""
    path = asked["path"]
    mode = "lfs" if path.endswith(LFS_ENDS) else "regular"
    entry = _entry(path, files[path]) if path in files else {}
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": entry.get("blobId")}


def _entry(path: str, data: bytes) -> dict:
    """Entry of a file as model_info(files_metadata=True) has it."""
    entry = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.endswith(LFS_ENDS):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _json(content: object, status: int = 200) -> Answer:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}, status


def _refused(status: int, code: str) -> Answer:
    return b"{}", {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"}, status
