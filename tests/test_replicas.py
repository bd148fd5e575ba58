"""Two real servers on one source: what one of them is told, both serve, and a server that is killed amid a change
leaves the old content or the new one.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

from object_store import Server as ObjectStore
from object_store import new_store
from server_process import ADMIN_KEY, ServerProcess
from tiny_models import ATTENTION, make_model, make_qaa

PATIENCE_S = 90
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GREEDY = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def object_store():
    server = ObjectStore()
    yield server
    server.close()


@pytest.fixture(scope="module", params=["directory", "s3"])
def stage(request, tmp_path_factory, object_store):
    """A base, adapters in four versions, a source with `one` in it, and servers that follow it."""
    root = tmp_path_factory.mktemp("replicas")
    base = make_model(root / "base", "llama")
    versions = [root / f"v{i}" for i in range(4)]
    for i, version in enumerate(versions):
        make_qaa(version, base, ATTENTION["llama"], i)
    environment = {}
    if request.param == "directory":
        source = str(root / "adapters")
        shutil.copytree(versions[0], root / "adapters" / "one")
    else:
        store = new_store("s3", object_store)
        store.upload(versions[0], "one")
        source = store.url
        environment = {
            "AWS_ENDPOINT_URL": object_store.options["endpoint_url"], "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip

    def start(name: str) -> ServerProcess:
        return ServerProcess(
            ["qaa-serve", str(base), "--adapters", source, "--state-dir", str(root / f"state-{name}"),
             "--adapters-poll", "1", "--dtype", "float32", "--max-model-len", "64",
             "--kv-cache-memory-bytes", "16M", "--max-loras", "2", "--max-lora-rank", "8"],
            root / f"{name}.log", forked=True, environment=environment,
        )  # fmt: skip

    servers = [start("a").wait_ready(), start("b").wait_ready()]
    yield SimpleNamespace(kind=request.param, versions=versions, servers=servers, start=start, root=root)
    for server in servers:
        server.stop()


def upload(server: ServerProcess, name: str, directory, **headers: str) -> httpx.Response:
    files = {"config": (directory / CONFIG).read_bytes(), "weights": (directory / WEIGHTS).read_bytes()}
    with server.admin() as admin:
        return admin.put(f"/v1/adapters/{name}", files=files, headers=headers)


def answer(server: ServerProcess, model: str, **more) -> tuple[str, str | None]:
    """The text, and which revision it is said to be of."""
    raw = server.client().completions.with_raw_response.create(model=model, prompt="t5 t6", **GREEDY, **more)
    return raw.parse().choices[0].text, raw.headers.get("x-qaa-revision")


def models(server: ServerProcess) -> list[str]:
    return [model.id for model in server.client().models.list()]


def fingerprint(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/ready", timeout=60).json()["catalogue"]


def test_what_is_put_rolled_back_and_deleted_on_one_is_so_on_the_other(stage):
    first, second = stage.servers
    told = upload(first, "new", stage.versions[1])
    assert told.status_code == 200, told.text
    text, revision = answer(first, "new")
    assert revision == told.json()["revision"]
    eventually(lambda: "new" in second.adapters(), "the other replica sees it")
    assert answer(second, "new") == (text, revision)
    replaced = upload(second, "new", stage.versions[2]).json()["revision"]
    eventually(lambda: first.adapter("new")["revision"] == replaced, "the first sees what the other put")
    assert answer(first, "new") == answer(second, "new")
    assert answer(first, "new") != (text, revision)
    assert answer(first, revision) == (text, revision), "a former content can be asked for on every replica"
    assert answer(second, revision) == (text, revision)
    with first.admin() as admin:
        assert admin.post("/v1/adapters/new/rollback").json()["revision"] == revision
    eventually(lambda: second.adapter("new")["revision"] == revision, "a step back is seen")
    eventually(lambda: fingerprint(first) == fingerprint(second), "both say that they agree")
    with second.admin() as admin:
        assert admin.delete("/v1/adapters/new").status_code == 200
    eventually(lambda: "new" not in first.adapters(), "a removal is seen")
    eventually(lambda: fingerprint(first) == fingerprint(second), "both say that they agree")


def test_of_two_who_change_at_once_one_is_told_that_it_was_too_late(stage):
    first, second = stage.servers
    began = upload(first, "contested", stage.versions[1])
    etag = began.headers["etag"]
    eventually(lambda: "contested" in second.adapters(), "the other replica sees it")
    assert upload(second, "contested", stage.versions[2], **{"If-None-Match": "*"}).status_code == 412
    won = upload(second, "contested", stage.versions[2], **{"If-Match": etag})
    assert won.status_code == 200, won.text
    lost = upload(first, "contested", stage.versions[3], **{"If-Match": etag})
    assert lost.status_code == 412, "whether the first has seen the other's change or not"
    eventually(lambda: first.adapter("contested")["revision"] == won.json()["revision"], "the winner is served")
    with first.admin() as admin:
        assert admin.delete("/v1/adapters/contested", headers={"If-Match": etag}).status_code == 412
        assert admin.delete("/v1/adapters/contested?purge=true", headers={"If-Match": "*"}).status_code == 200
        assert admin.post("/v1/adapters/contested/rollback").status_code == 404, "nothing is left of it"


def test_pins_and_aliases_are_on_every_replica(stage):
    first, second = stage.servers
    revisions = [upload(first, "canary", version).json()["revision"] for version in stage.versions[1:3]]
    with first.admin() as admin:
        shares = dict.fromkeys(revisions, 50)
        made = admin.put("/v1/aliases/chat", json={"to": shares})
        assert made.status_code == 200, made.text
        assert admin.post("/v1/adapters/one/pin").status_code == 200
    eventually(
        lambda: "chat" in [m.id for m in second.client().models.list()], "the alias is on the other replica"
    )
    eventually(lambda: second.adapter("one")["pinned"], "the pin too")
    by_user = {user: answer(first, "chat", user=user)[1] for user in map(str, range(24))}
    assert set(by_user.values()) == set(revisions)
    assert {user: answer(second, "chat", user=user)[1] for user in by_user} == by_user, (
        "a user always has the same"
    )
    raw = second.client().completions.with_raw_response.create(
        model="chat", prompt="t5", max_tokens=1, extra_headers={"x-qaa-user": "7"}
    )
    assert raw.parse().model == "chat", "what was asked for"
    assert raw.headers["x-qaa-revision"] in revisions
    page = httpx.get(f"{first.url}/metrics", timeout=60).text
    assert all(
        f'qaa_alias_requests_total{{alias="chat",revision="{r}",outcome="success"}}' in page for r in revisions
    )
    with second.admin() as admin:
        refused = admin.delete("/v1/adapters/canary")
        assert (refused.status_code, "alias 'chat'" in refused.text) == (409, True)
        assert admin.put("/v1/aliases/one", json={"to": "canary"}).status_code == 422, "an adapter has that name"
        assert admin.delete("/v1/aliases/chat").status_code == 200
        assert admin.delete("/v1/adapters/canary").status_code == 200
        assert admin.post("/v1/adapters/one/unpin").status_code == 200
    eventually(
        lambda: "chat" not in [m.id for m in first.client().models.list()], "the alias has ended everywhere"
    )


def test_what_people_put_into_the_source_is_served_by_both(stage, object_store):
    first, second = stage.servers
    if stage.kind == "directory":
        shutil.copytree(stage.versions[3], stage.root / "adapters" / ".coming")
        (stage.root / "adapters" / ".coming").rename(stage.root / "adapters" / "by-hand")
    else:
        pytest.skip("test_sources_objects.py has it")
    for server in (first, second):
        eventually(lambda server=server: "by-hand" in server.adapters(), "it is there")
    assert answer(first, "by-hand") == answer(second, "by-hand")


def test_an_adapter_may_be_loaded_before_it_is_asked_for_and_lists_have_pages(stage):
    first, _ = stage.servers
    for i in range(3):
        assert upload(first, f"page-{i}", stage.versions[i]).status_code == 200
    with first.admin() as admin:
        assert admin.post("/v1/adapters/page-0/load").json()["revisions"][0]["loaded"]
        page = admin.get("/v1/adapters", params={"q": "page-", "limit": 2}).json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == (["page-0", "page-1"], True)
        page = admin.get("/v1/adapters", params={"q": "page-", "limit": 2, "after": "page-1"}).json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == (["page-2"], False)
        assert not admin.get("/v1/adapters", params={"q": "page-", "state": "rejected"}).json()["data"]
        for i in range(3):
            admin.delete(f"/v1/adapters/page-{i}")


def test_a_server_that_is_killed_amid_a_put_leaves_the_old_or_the_new(stage, object_store):
    """The last test: `b` is killed, and comes back with its state directory deleted."""
    first, second = stage.servers
    before = upload(first, "one", stage.versions[1]).json()["revision"]
    eventually(lambda: second.adapter("one")["revision"] == before, "both have it")
    amid, go_on = threading.Event(), threading.Event()

    def lose(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith(WEIGHTS):
            amid.set()
            go_on.wait(PATIENCE_S)
        return False

    putting = threading.Thread(target=lambda: _ignoring(lambda: upload(second, "one", stage.versions[2])))
    if stage.kind == "s3":
        object_store.lose = lose
        putting.start()
        assert amid.wait(PATIENCE_S)
    else:
        putting.start()
        time.sleep(0.05)  # test_sources_crash.py kills at every single step
    second.process.kill()
    second.stop()
    go_on.set()
    object_store.lose = lambda method, path: False
    putting.join(PATIENCE_S)
    # What was put just before the end may reach it between the two questions.
    eventually(lambda: answer(first, "one")[1] == first.adapter("one")["revision"], "it serves what it has")
    shutil.rmtree(stage.root / "state-b")
    stage.servers[1] = again = stage.start("b").wait_ready()
    eventually(lambda: again.adapter("one")["revision"] == first.adapter("one")["revision"], "both agree again")
    assert answer(again, "one") == answer(first, "one")
    after = upload(again, "one", stage.versions[3])
    assert after.status_code == 200, after.text
    eventually(lambda: first.adapter("one")["revision"] == after.json()["revision"], "and go on")


def _ignoring(call: Callable[[], object]) -> None:
    with suppress(httpx.HTTPError):
        call()


def test_the_admin_key_is_needed_for_aliases(stage):
    server = stage.servers[0]
    for key, status in ((None, 401), ("wrong", 401), (ADMIN_KEY, 200)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/aliases", headers=headers, timeout=60).status_code == status
