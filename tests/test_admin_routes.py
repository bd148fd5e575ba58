"""The routes that change the source, over a real catalogue and a real directory: statuses, conditions, pages."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from fastapi import FastAPI
from registry_support import OddSource, Place, in_a_loop

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.registry import Catalogue
from qaa_serve.server.admin import make_router
from qaa_serve.server.aliases import make_alias_router
from qaa_serve.server.audit import AuditLog
from qaa_serve.server.errors import answer_errors
from qaa_serve.sources import DirectorySource, ReadOnlyError


class Audit:
    """Takes note of what is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def changed(self, *line: Any) -> None:
        self.lines.append(line)


@asynccontextmanager
async def admin(
    place: Place, audit: Audit | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Catalogue]]:
    """A client of the routes, and the catalogue behind them."""
    async with place.server(**settings) as catalogue:
        app = FastAPI()
        monitor: Any = SimpleNamespace(account=SimpleNamespace(adapters={}))
        turns: Any = SimpleNamespace(counts=lambda name: (0, 0))
        told: Any = audit or Audit()
        app.include_router(make_router(catalogue, monitor, turns, told, ["my-org/*"]))
        app.include_router(make_alias_router(catalogue, told))
        answer_errors(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client, catalogue


def files(directory: Path) -> dict[str, bytes]:
    return {"config": (directory / CONFIG_FILE).read_bytes(), "weights": (directory / WEIGHTS_FILE).read_bytes()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@in_a_loop
async def test_a_change_may_be_made_only_if_what_is_there_is_what_one_saw(place: Place) -> None:
    old, new = place.version(1), place.version(2)
    async with admin(place) as (client, _):
        url = "/v1/adapters/a"
        missing = await client.put(url, files=files(old), headers={"If-Match": "*"})
        assert missing.status_code == 412
        made = await client.put(url, files=files(old), headers={"If-None-Match": "*"})
        assert (made.status_code, made.headers["etag"]) == (200, f'"{digest_of(old)}"')
        assert (await client.put(url, files=files(new), headers={"If-None-Match": "*"})).status_code == 412
        stale = {"If-Match": f'"{"0" * 64}"'}
        for refused in (
            await client.put(url, files=files(new), headers=stale),
            await client.delete(url, headers=stale),
            await client.post(f"{url}/rollback", headers=stale, json={"revision": digest_of(old)}),
        ):
            assert refused.status_code == 412, refused.text
            assert refused.json()["error"]["type"] == "PreconditionFailedError"
        short = {"If-Match": f'"a@{digest_of(old)[:12]}"'}
        assert (await client.put(url, files=files(new), headers=short)).status_code == 200
        for nonsense in ("a", '"12"', '"a@xyz"', ""):
            answer = await client.delete(url, headers={"If-Match": nonsense})
            assert answer.status_code == 400, nonsense
        assert (await client.get(url)).json()["revision"] == f"a@{digest_of(new)[:12]}"


@in_a_loop
async def test_a_name_that_nothing_can_have_is_refused_in_words(place: Place) -> None:
    async with admin(place) as (client, _):
        for path in ("adapters/a%20b", "adapters/.x", "adapters/other", "aliases/a@b", "adapters/-/rollback"):
            method = "POST" if path.endswith("rollback") else "PUT"
            answer = await client.request(method, f"/v1/{path}", json={"to": "a"})
            assert answer.status_code == 400, path
            message = answer.json()["error"]["message"]
            assert "cannot be an adapter's name: " in message
            assert "\n" not in message
            assert message.endswith("Choose another")


@in_a_loop
async def test_a_full_directory_of_temporary_files_is_no_error_of_the_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    async with admin(place) as (client, _):
        monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", Full)
        answer = await client.put("/v1/adapters/a", files=files(place.version(1)))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
        assert "No space left" in answer.json()["error"]["message"]
        monkeypatch.undo()
        assert (await client.put("/v1/adapters/a", files=files(place.version(1)))).status_code == 200


@in_a_loop
async def test_a_source_that_cannot_be_written_is_a_conflict_that_says_so(place: Place) -> None:
    place.drop("a", 1)
    odd = OddSource(DirectorySource(place.adapters))
    odd.fail(ReadOnlyError("the directory is mounted read-only: change it where it is written"),
             "put", "remove", "write_settings", "keep", "prune")  # fmt: skip
    audit = Audit()
    async with admin(place, audit, source=odd) as (client, _):
        for answer in (
            await client.put("/v1/adapters/a", files=files(place.version(2))),
            await client.delete("/v1/adapters/a"),
            await client.post("/v1/adapters/a/pin"),
            await client.put("/v1/aliases/b", json={"to": "a"}),
        ):
            assert (answer.status_code, "read-only" in answer.text) == (409, True), answer.text
        assert (await client.get("/v1/adapters/a")).json()["revision"] == f"a@{digest_of(place.version(1))[:12]}"
    refused = [line for line in audit.lines if line[-1].startswith("409")]
    assert [line[0] for line in refused] == ["put", "delete", "pin", "alias"], "and each is told"


@in_a_loop
async def test_lists_have_pages_and_are_searched(place: Place) -> None:
    for i in range(25):
        place.drop(f"team-{i:02}", i % 3)
    place.drop("other-team", 1)
    async with admin(place) as (client, _):
        seen, after = [], None
        while True:
            asked = {"q": "team-", "limit": 10, **({} if after is None else {"after": after})}
            page = (await client.get("/v1/adapters", params=asked)).json()
            assert page["total"] == 26
            seen += [item["id"] for item in page["data"]]
            if not page["has_more"]:
                break
            after = seen[-1]
        assert seen == [f"team-{i:02}" for i in range(25)]
        states = [item["state"] for item in (await client.get("/v1/adapters")).json()["data"]]
        assert states == ["known"] * 26, "nobody has asked for them"
        assert (await client.post("/v1/adapters/team-03/load")).json()["revisions"][0]["loaded"]
        page = (await client.get("/v1/adapters", params={"state": "served"})).json()
        assert [item["id"] for item in page["data"]] == ["team-03"]
        assert (await client.get("/v1/adapters", params={"limit": 0})).status_code == 422


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"to": "a"}, 200),
        ({"to": {"a": 1, "b": 3}}, 200),
        ({"to": {"a": 0}}, 422),
        ({"to": {"a": -1}}, 422),
        ({"to": {}}, 422),
        ({"to": "nobody"}, 404),
        ({"to": "a@000000000000"}, 404),
        ({"to": {"a": 1, "a b": 1}}, 422),
        ({"to": 5}, 422),
        ({}, 422),
        ({"to": "a", "more": 1}, 422),
    ],
    ids=str,
)
def test_what_an_alias_may_be(place: Place, body: Any, status: int) -> None:
    @in_a_loop
    async def run() -> None:
        for name in ("a", "b"):
            place.drop(name, 1)
        async with admin(place) as (client, catalogue):
            answer = await client.put("/v1/aliases/chat", json=body)
            assert answer.status_code == status, answer.text
            assert ("chat" in catalogue.settings.aliases) == (status == 200)
            if status == 200:
                taken = await client.put("/v1/adapters/chat", files=files(place.version(2)))
                assert (taken.status_code, "alias" in taken.text) == (422, True)
                assert (await client.delete("/v1/aliases/chat")).status_code == 200
            assert (await client.delete("/v1/aliases/chat")).status_code == 404

    run()


@in_a_loop
async def test_the_audit_log_can_be_asked_for(place: Place) -> None:
    audit: Any = AuditLog(logging.getLogger("test"))
    async with admin(place, audit) as (client, _):
        assert (await client.delete("/v1/adapters/a")).status_code == 404
        assert (await client.delete("/v1/adapters/b")).status_code == 404
        answer = (await client.get("/v1/audit", params={"adapter": "a"})).json()
        (line,) = answer["data"]
        assert (line["action"], line["adapter"], line["result"][:4]) == ("delete", "a", "404:")
        assert {"time", "key", "from", "before", "after"} < set(line)
        (newest,) = (await client.get("/v1/audit", params={"limit": 1})).json()["data"]
        assert newest["adapter"] == "b"


@in_a_loop
async def test_repositories_of_the_hub_are_taken_from_a_list_alone(place: Place) -> None:
    async with admin(place) as (client, _):
        for source, status in (
            ("hf://their-org/x", 403), ("hf://my-org", 400), ("https://my-org/x", 400),
            ("hf://my-org/x@../y", 400),
        ):  # fmt: skip
            answer = await client.put("/v1/adapters/a", json={"source": source})
            assert answer.status_code == status, answer.text
        for nonsense in ({}, {"path": "a", "source": "hf://my-org/x"}, {"paht": "a"}):
            assert (await client.put("/v1/adapters/a", json=nonsense)).status_code == 400


@in_a_loop
async def test_what_was_gone_back_to_is_shown_once(place: Place) -> None:
    async with admin(place) as (client, _):
        for seed in (1, 2):
            await client.put("/v1/adapters/a", files=files(place.version(seed)))
        shown = (await client.post("/v1/adapters/a/rollback")).json()["revisions"]
        digests = [digest_of(place.version(seed))[:12] for seed in (1, 2)]
        assert [(item["revision"], item["state"]) for item in shown] == [
            (f"a@{digests[0]}", "current"), (f"a@{digests[1]}", "kept"),
        ]  # fmt: skip
