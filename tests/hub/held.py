"""What the stand-in for the Hub holds: repositories in memory, one commit after the other."""

import hashlib
from dataclasses import dataclass, field


@dataclass
class Repo:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        text = repr((len(self.commits), sorted(files.items())))
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """What the server holds; `url` is its HF_ENDPOINT."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Makes a repository as if it had been pushed; its commit."""
        return self.repos.setdefault(name, Repo()).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        return self.repos[name].commits[-1][1]


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    record = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        record["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return record
