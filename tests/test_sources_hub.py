"""Adapters of the Hugging Face hub, from a small hub on this machine: what may be taken, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="comes with vLLM and with the extra `train`")

from huggingface_hub import constants
from registry_support import make, tree

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.sources import Repository, RepositoryError, parse_repository

COMMITS = {"main": "1" * 40, "v1": "2" * 40}


class Hub(ThreadingHTTPServer):
    """Answers as the hub does.

    Attributes:
        files: content by repository, commit and file name.
        asked: files that were sent.
        status: what everything is answered with, unless it is None.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.asked: list[str] = []
        self.status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, revision: str, directory: Path) -> None:
        for path in directory.iterdir():
            self.files[repo, COMMITS[revision], path.name] = path.read_bytes()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.server.status is not None:
            self._send(self.server.status)
        elif parts[:2] == ["api", "models"]:
            self._tell_about("/".join(parts[2:4]), parts[4], parts[5])
        else:
            self._send_file("/".join(parts[:2]), parts[3], parts[4])

    def _tell_about(self, repo: str, what: str, revision: str) -> None:
        commit = COMMITS.get(revision, revision)
        files = {name: file for (of, at, name), file in self.server.files.items() if (of, at) == (repo, commit)}
        if not any(of == repo for of, *_ in self.server.files):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif not files:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            about: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            if what == "tree":
                about = [
                    {"type": "file", "path": name, "size": len(file), "oid": hashlib.sha1(file).hexdigest()}
                    for name, file in files.items()
                ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        commit = COMMITS.get(revision, revision)
        content = self.server.files.get((repo, commit, name))
        if content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.asked.append(name)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        self._send(200, headers, content)

    def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    files_at = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files_at)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


# ---------------------------------------------------------------------------------------------- what may be taken


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://org/support", Repository("org/support", "main")),
        ("hf://org/support@v1", Repository("org/support", "v1")),
        ("hf://org/sup.po_rt-2@refs/pr/7", Repository("org/sup.po_rt-2", "refs/pr/7")),
    ],
)
def test_a_repository_is_named_with_its_revision(url: str, expected: Repository) -> None:
    assert parse_repository(url, ["other/*", "org/*"]) == expected


@pytest.mark.parametrize(
    "url",
    [
        "", "org/support", "hf://support", "hf://org/support/x", "hf://org/support@", "hf:///support", "hf://org/",
        "https://huggingface.co/org/support", "hf://org/support@v1@v2", "hf://org/support\n", "hf://org/su pport",
    ],
)  # fmt: skip
def test_what_names_no_repository_is_400(url: str) -> None:
    with pytest.raises(RepositoryError, match="is not hf://ORG/REPO@REVISION") as caught:
        parse_repository(url, ["*"])
    assert caught.value.status == 400


@pytest.mark.parametrize("allowed", [[], ["other/*"], ["org"], ["org/Support"], ["support"], ["org/support@v1"]])
def test_what_is_not_allowed_is_403(allowed: list[str]) -> None:
    with pytest.raises(
        RepositoryError, match="org/support is not among the repositories of --adapter-repos"
    ) as caught:
        parse_repository("hf://org/support@v1", allowed)
    assert caught.value.status == 403


# ------------------------------------------------------------------------------------------------------- fetching


def test_an_adapters_two_files_are_copied_and_nothing_else_is_asked_for(
    hub: Hub, target: Path, tmp_path: Path
) -> None:
    adapter = make(tmp_path / "adapter", 1)
    (adapter / "training_args.bin").write_bytes(b"pickled")
    hub.add("org/support", "main", adapter)
    hub.add("org/support", "v1", make(tmp_path / "older", 2))
    Repository("org/support", "main").fetch(target)
    assert tree(target) == [CONFIG_FILE, WEIGHTS_FILE]
    assert not any(path.is_symlink() for path in target.iterdir())
    assert digest_of(target) == digest_of(adapter)
    assert sorted(hub.asked) == [CONFIG_FILE, WEIGHTS_FILE]
    Repository("org/support", "v1").fetch(target)
    assert digest_of(target) == digest_of(tmp_path / "older")


def test_a_branch_that_moved_on_is_fetched_anew(hub: Hub, target: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hub.add("org/support", "main", make(tmp_path / "one", 1))
    Repository("org/support", "main").fetch(target)
    monkeypatch.setitem(COMMITS, "main", "3" * 40)
    hub.add("org/support", "main", make(tmp_path / "two", 2))
    Repository("org/support", "main").fetch(target)
    assert digest_of(target) == digest_of(tmp_path / "two")


@pytest.mark.parametrize("repository", [Repository("org/other", "main"), Repository("org/support", "v9")])
def test_what_the_hub_has_not_is_404(hub: Hub, target: Path, tmp_path: Path, repository: Repository) -> None:
    hub.add("org/support", "main", make(tmp_path / "adapter", 1))
    with pytest.raises(
        RepositoryError, match=f"the hub has no {repository.repo} at {repository.revision}"
    ) as caught:
        repository.fetch(target)
    assert caught.value.status == 404


def test_a_repository_without_an_adapter_is_no_adapter(hub: Hub, target: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", 1)
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    hub.add("org/support", "main", adapter)
    with pytest.raises(AdapterError, match=WEIGHTS_FILE) as caught:
        Repository("org/support", "main").fetch(target)
    assert not isinstance(caught.value, RepositoryError)


@pytest.mark.parametrize("repo", ["a..b/c", "-a/b", "ö/x", "a/b.git"])
def test_a_name_that_no_repository_can_have_is_400(hub: Hub, target: Path, repo: str) -> None:
    with pytest.raises(RepositoryError, match="cannot be the name of a repository") as caught:
        parse_repository(f"hf://{repo}", ["*"]).fetch(target)
    assert caught.value.status == 400


@pytest.mark.parametrize("trouble", ["offline", "refused", "500"])
def test_a_hub_that_cannot_be_asked_is_503(
    hub: Hub, target: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.status = 500
    with pytest.raises(RepositoryError, match="org/support cannot be fetched from the hub now") as caught:
        Repository("org/support", "main").fetch(target)
    assert caught.value.status == 503


def test_a_target_that_cannot_be_written_is_503(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/support", "main", make(tmp_path / "adapter", 1))
    with pytest.raises(RepositoryError, match="No such file or directory") as caught:
        Repository("org/support", "main").fetch(tmp_path / "nowhere")
    assert caught.value.status == 503
