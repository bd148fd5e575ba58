"""Adapters that come, change and go while a real server is busy; and what happens when things around it fail.

The long forms of the first tests are in benchmarks/faults.py.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

import faults
from faults import CONFIG, NAMES, PROMPTS, WEIGHTS, Keys, Stage, greedy, rename_into_place, words
from server_process import START_LIMIT_S, ServerProcess, gone
from tiny_models import ReferenceModel

from qaa_serve.adapters import load_adapter

KEYS = Keys(client="client-secret-1", admin="admin-secret-1")
NARROW = "narrow-secret-1"
ASK = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    root = tmp_path_factory.mktemp("swap")
    stage = Stage.make(root)
    (root / "clients").write_text(f"# who may use what\n{KEYS.client}\n{NARROW} n0 n[12]  # no base model\n")
    (root / "admins").write_text(f"{KEYS.admin}\n")
    return stage


@pytest.fixture(scope="module")
def expected(stage):
    return stage.answers()


@pytest.fixture(scope="module")
def server(stage):
    server = faults.start(
        stage, "--api-key-file", str(stage.root / "clients"), "--admin-key-file", str(stage.root / "admins"),
        "--adapter-max-running", "3", "--adapter-max-queue", "2", "--drain-timeout", "60",
    )  # fmt: skip
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def admin(server):
    with httpx.Client(base_url=server.url, headers=KEYS.headers, timeout=30) as client:
        yield client


def ask(server: ServerProcess, model: str, prompt: str = PROMPTS[0], key: str = KEYS.client) -> str:
    return server.client(key).completions.create(model=model, prompt=prompt, **ASK).choices[0].text.strip()


def wait_until(condition, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def long_stream(server: ServerProcess, model: str) -> openai.Stream:
    """A stream that has begun: its headers have come."""
    return server.client(KEYS.client).completions.create(
        model=model, prompt="t5 t6", max_tokens=250, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip


def put(admin: httpx.Client, stage: Stage, name: str, version: str, of: str | None = None) -> dict:
    answer = admin.put(f"/v1/adapters/{name}", json={"path": f".versions/{of or name}-{version}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_swaps_under_load_are_noticed_by_nobody(server, stage):
    report = asyncio.run(faults.swap_under_load(server, stage, 2 * len(NAMES), KEYS, clients=2, quiet_s=1))
    assert report.swaps == 2 * len(NAMES), "each name to its other version and back"
    assert report.requests > 0
    assert (report.failed, report.mixed, report.stale) == ([], [], [])


@pytest.mark.parametrize("way", ["path", "upload", "directory"])
def test_a_replaced_adapter_never_answers_with_the_old_one_s_cache(server, stage, way):
    """vLLM's prefix cache is keyed by an adapter's name: the same long prompt, before and after."""
    name = NAMES[faults.WAYS.index(way)]
    prompt = words(5, 120)
    reference = ReferenceModel(stage.base)
    expected = [
        greedy(reference, load_adapter(stage.version(name, version)), prompt)
        if (stage.version(name, version) / CONFIG).read_text().count('"QAA"')
        else greedy(reference, stage.version(name, version), prompt)
        for version in "AB"
    ]
    assert expected[0] != expected[1]

    async def replace(version):
        async with faults.Admin(server.url, KEYS) as admin:
            await admin.replace(stage, name, version, way)

    assert [ask(server, name, prompt) for _ in range(2)] == [expected[0]] * 2
    asyncio.run(replace("B"))
    assert [ask(server, name, prompt) for _ in range(2)] == [expected[1]] * 2
    asyncio.run(replace("A"))
    assert ask(server, name, prompt) == expected[0]


def test_damaged_adapters_are_refused_with_their_reason(server, stage):
    """Each kind of damage once, while the good adapters answer."""
    report = asyncio.run(faults.drop_damaged(server, stage, len(faults.DAMAGES) + 2, KEYS))
    assert report.dropped == len(faults.DAMAGES) + 2
    assert (report.wrong, report.served, report.without_reason) == ([], [], [])
    assert "NaN" in report.reasons["NaN"]
    assert "pickle" in report.reasons["pickle only"]
    assert "another base" in report.reasons["another base"]


def test_a_rejected_change_leaves_the_last_good_revision_serving(server, stage, admin, expected):
    before = admin.get("/v1/adapters/n6").json()
    broken = stage.root / "broken"
    shutil.copytree(stage.version("n6", "B"), broken)
    (broken / WEIGHTS).write_bytes(b"short")
    rename_into_place(broken, stage.adapters / "n6")
    wait_until(lambda: admin.get("/v1/adapters/n6").json()["rejection"])
    after = admin.get("/v1/adapters/n6").json()
    assert after["revision"] == before["revision"]
    assert "damaged" in after["rejection"]["reason"]
    assert 'qaa_adapter_rejected{adapter="n6"} 1.0' in httpx.get(f"{server.url}/metrics", timeout=60).text
    assert "Not serving adapter 'n6'" in server.text()
    assert ask(server, "n6") == expected["n6", "A", PROMPTS[0]]
    rename_into_place(stage.version("n6", "A"), stage.adapters / "n6")
    wait_until(lambda: not admin.get("/v1/adapters/n6").json()["rejection"])


def test_revisions_can_be_asked_for_rolled_back_to_and_pinned(server, stage, admin, expected):
    put(admin, stage, "n0", "A")
    put(admin, stage, "n0", "B")
    old, new = stage.revision("n0", "A"), stage.revision("n0", "B")
    answer = server.client(KEYS.client).completions.create(model=old, prompt=PROMPTS[0], **ASK)
    assert (answer.model, answer.choices[0].text.strip()) == (old, expected["n0", "A", PROMPTS[0]])
    assert ask(server, "n0") == ask(server, new) == expected["n0", "B", PROMPTS[0]]

    rolled_back = admin.post("/v1/adapters/n0/rollback").json()
    assert rolled_back["revision"] == old
    assert ask(server, "n0") == expected["n0", "A", PROMPTS[0]]
    assert admin.post("/v1/adapters/n0/rollback", json={"revision": new}).json()["revision"] == new
    assert admin.post("/v1/adapters/n0/rollback", json={"revision": "n0@000000000000"}).status_code == 404

    assert admin.post("/v1/adapters/n0/pin", json={"revision": old}).status_code == 200
    pins = {r["revision"]: r["pinned"] for r in admin.get("/v1/adapters/n0").json()["revisions"]}
    assert pins == {new: False, old: True}
    assert admin.post("/v1/adapters/n0/unpin", json={"revision": old}).status_code == 200
    assert admin.post("/v1/adapters/nobody/pin").status_code == 404
    put(admin, stage, "n0", "A")


def test_bytes_are_told_by_tier(server, stage, admin):
    def asked_and_in_a_slot():  # the engine's account of its slots is some seconds old
        ask(server, "n0")
        return admin.get("/v1/adapters/n0").json()["bytes"]["slot"]

    wait_until(asked_and_in_a_slot)
    found = admin.get("/v1/adapters/n0").json()["bytes"]
    weights = stage.version("n0", "A") / WEIGHTS
    assert found["store"] == weights.stat().st_size
    # B, and in place of angles the tables that the compiled kernels read, which in so small a model weigh more.
    assert 0.8 * found["store"] < found["host"] < 1.5 * found["store"]
    assert found["slot"] > 0


def test_running_requests_end_on_the_revision_they_began_with(server, stage, admin, expected):
    """Replaced, and then removed, in the middle of their streams."""
    put(admin, stage, "guest", "A", of="n1")
    reference = ReferenceModel(stage.base)
    adapter = load_adapter(stage.version("n1", "A"))
    texts = []

    def stream(then):
        chunks = server.client(KEYS.client).completions.create(
            model="guest", prompt=PROMPTS[1], stream=True, **ASK | {"max_tokens": 60}
        )
        text = ""
        for i, chunk in enumerate(chunks):
            text += chunk.choices[0].text if chunk.choices else ""
            if i == 0:
                then()
        texts.append(text.strip())

    stream(lambda: put(admin, stage, "guest", "B", of="n1"))
    assert texts == [greedy(reference, adapter, PROMPTS[1], 60)]
    assert ask(server, "guest", PROMPTS[1]) == expected["n1", "B", PROMPTS[1]]
    revision = admin.get("/v1/adapters/guest").json()["revision"]
    stream(lambda: admin.delete("/v1/adapters/guest").raise_for_status())
    assert texts[1] == greedy(reference, load_adapter(stage.version("n1", "B")), PROMPTS[1], 60)
    with pytest.raises(openai.NotFoundError):
        ask(server, "guest")
    # It leaves the engine and the store with its last request.
    wait_until(lambda: not list((stage.root / "state" / "revisions").glob(f"{revision}*")))


def test_vllms_own_routes_go_through_the_registry(server, admin, expected):
    load = {"lora_name": "by-vllm", "lora_path": ".versions/n2-B"}
    assert admin.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert ask(server, "by-vllm") == expected["n2", "B", PROMPTS[0]]
    assert admin.post("/v1/load_lora_adapter", json=load).status_code == 400
    replaced = admin.post(
        "/v1/load_lora_adapter", json=load | {"lora_path": ".versions/n2-A", "load_inplace": True}
    )
    assert replaced.status_code == 200
    assert ask(server, "by-vllm") == expected["n2", "A", PROMPTS[0]]
    assert (
        admin.post("/v1/load_lora_adapter", json=load | {"lora_name": "x", "lora_path": "/etc"}).status_code == 403
    )
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "by-vllm"}).status_code == 200
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "by-vllm"}).status_code == 404


def test_what_an_upload_may_be(server, stage, admin):
    url, place = "/v1/adapters/upload", stage.version("n3", "A")
    good = {"config": (place / CONFIG).read_bytes(), "weights": (place / WEIGHTS).read_bytes()}
    assert admin.put(url, files=good | {"weights": b"no"}).status_code == 422
    assert admin.put(url, files={"config": good["config"]}).status_code == 400
    assert admin.put(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert admin.put(url, json={"path": "nowhere"}).status_code == 404
    assert admin.put(url, json={"path": "../.."}).status_code == 403
    assert admin.put(url, json={"other": 1}).status_code == 400
    assert admin.put("/v1/adapters/base", files=good).status_code == 422, "the base model's name"
    assert admin.put("/v1/adapters/%2e%2e", files=good).status_code in (400, 404, 405)
    assert admin.get(url).status_code == 404
    assert admin.put(url, files=good).json()["revision"].startswith("upload@")
    assert list((stage.root / "state").glob(".upload-*")) == []


def test_keys_open_what_they_are_for(server, expected):
    chat = f"{server.url}/v1/completions"
    assert httpx.post(chat, json={"model": "n0", "prompt": "t5"}, timeout=60).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        ask(server, "n0", key="wrong")
    assert ask(server, "n1", key=NARROW) == expected["n1", "A", PROMPTS[0]]
    for model in ("n3", "base", "nobody", "n3@000000000000"):
        with pytest.raises(openai.PermissionDeniedError):
            ask(server, model, key=NARROW)
    assert {model.id for model in server.client(NARROW).models.list()} == {"n0", "n1", "n2"}
    assert {"base", "n0", "n7"} <= {model.id for model in server.client(KEYS.client).models.list()}
    adapters = f"{server.url}/v1/adapters"
    for key, status in ((None, 401), (KEYS.client, 403), (NARROW, 403), ("wrong", 401), (KEYS.admin, 200)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert httpx.get(adapters, headers=headers, timeout=60).status_code == status
        if status != 200:
            assert httpx.delete(f"{adapters}/n0", headers=headers, timeout=60).status_code == status
    with pytest.raises(openai.AuthenticationError):
        ask(server, "n0", key=KEYS.admin)
    assert httpx.get(f"{server.url}/ready", timeout=60).json()["status"] == "ready"


def test_requests_tokens_and_refusals_are_counted_by_key(server, admin):
    def series(name):
        time.sleep(1.1)  # a page is a second old at most
        page = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text)
        samples = (sample for family in page for sample in family.samples if sample.name == name)
        return {tuple(sample.labels.values()): sample.value for sample in samples}

    refused = series("qaa_wrong_keys_total")
    before = series("qaa_key_tokens_total")
    for key, count in ((KEYS.client, 3), (NARROW, 1)):
        for _ in range(count):
            ask(server, "n0", key=key)
    with pytest.raises(openai.AuthenticationError):
        ask(server, "n0", key="none of these")
    assert httpx.get(f"{server.url}/v1/adapters", headers={"Authorization": "Bearer no"}, timeout=60).is_error
    after = series("qaa_key_tokens_total")
    grown = {labels: after[labels] - before.get(labels, 0) for labels in after if labels[1] == "generated"}
    assert sorted(grown.values())[-2:] == [12, 36]
    assert {key for key, _ in series("qaa_key_requests_total")} == {key for key, _ in after}
    assert not {KEYS.client, NARROW} & {key for key, _ in after}, "a key's name is not the key"
    now = series("qaa_wrong_keys_total")
    assert {role: now[role] - refused[role] for role in now} == {("client",): 1, ("admin",): 1}


def test_one_adapter_s_crowd_is_held_back_and_another_is_served(server, expected):
    """3 may run and 2 wait, of one key of several 2 and 2: of 8 long requests, 4 are told to come again."""

    async def crowd():
        async with faults.openai_client(server, KEYS) as client, faults.Admin(server.url, KEYS) as admin:
            for name in ("n4", "n5"):  # what is in the engine's memory need not be loaded while it stands still
                await faults.complete(client, name, PROMPTS[0], stream=False)
            with server.held():
                long = [
                    asyncio.create_task(
                        client.completions.create(
                            model="n4", prompt=f"t{20 + i}", max_tokens=200, extra_body={"ignore_eos": True}
                        )
                    )
                    for i in range(8)
                ]
                other = asyncio.create_task(faults.complete(client, "n5", PROMPTS[0], stream=False))
                async with asyncio.timeout(30):
                    while (await turns(admin, "n4"), await turns(admin, "n5")) != ((2, 2), (1, 0)):
                        await asyncio.sleep(0.05)
                    while sum(task.done() for task in long) < 4:
                        await asyncio.sleep(0.05)
            return await other, await asyncio.gather(*long, return_exceptions=True)

    async def turns(admin, name):
        found = await admin.get(name)
        return found["running"], found["waiting"]

    other, results = asyncio.run(crowd())
    assert other == expected["n5", "A", PROMPTS[0]]
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert len(refused) == 4
    assert all(int(error.response.headers["Retry-After"]) >= 1 for error in refused)
    assert sum(not isinstance(result, Exception) for result in results) == 4


def test_a_client_that_goes_away_leaves_nothing_behind(server, admin):
    begun = long_stream(server, "n1")
    next(begun)
    with server.held():
        streams = [begun, long_stream(server, "n1")]
        assert admin.get("/v1/adapters/n1").json()["running"] >= 1
        for stream in streams:
            stream.close()
        wait_until(lambda: admin.get("/v1/adapters/n1").json()["running"] == 0)
        wait_until(lambda: admin.get("/v1/adapters/n1").json()["revisions"][0]["in_flight"] == 0)


def test_generated_requests_find_no_error_of_the_server(server):
    status, text = faults.fuzz_schema(server, KEYS, 15)
    assert status == 0, text[-4000:]


def test_no_secret_is_logged(server):
    text = server.text()
    assert not [key for key in (KEYS.client, KEYS.admin, NARROW) if key in text]


def test_sigterm_under_load_drains_and_ends_every_process(server):
    """The last test of this server: streams that run end whole, a new request is turned away."""
    family = server.family()
    begun = long_stream(server, "n5")
    chunks = [next(begun)]
    with server.held():
        streams = [begun, long_stream(server, "n5")]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/ready", timeout=60).status_code == 503)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        with pytest.raises(openai.InternalServerError) as turned_away:
            ask(server, "n4")
        assert turned_away.value.status_code == 503
    for stream in streams:
        chunks += stream
        *_, last, usage = chunks
        assert last.choices[0].finish_reason == "length"
        assert usage.usage.completion_tokens == 250
    assert server.wait_exit() == 0
    assert gone(family) == []


# ------------------------------------------------- the next server: the same state, on a disk that fills up


@pytest.fixture(scope="module")
def small_disk(stage):
    """The first server's state on a file system of 4 MB."""
    state = stage.root / "state"
    moved = stage.root / "state-before"
    if not state.exists():
        pytest.skip("the tests of the first server have not run")
    state.rename(moved)
    state.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(state)], capture_output=True)
    shutil.copytree(moved, state, dirs_exist_ok=True)
    yield mounted.returncode == 0
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.fixture(scope="module")
def second(stage, small_disk):
    server = faults.start(stage, "--adapters-poll", "1")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def test_a_restart_serves_what_was_served(second, stage, expected):
    """What was uploaded is in the adapters directory, as everything else."""
    listing = second.adapters()
    assert listing["upload"]["state"] == "served"
    assert ask(second, "upload") == expected["n3", "A", PROMPTS[0]]
    assert set(NAMES) <= set(listing)


def test_a_full_disk_refuses_what_is_new_and_goes_on_with_the_rest(second, stage, small_disk, expected):
    if not small_disk:
        pytest.skip("a small file system can be mounted by root only")
    filler = stage.root / "state" / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    place = stage.version("n4", "B")
    files = {"config": (place / CONFIG).read_bytes(), "weights": (place / WEIGHTS).read_bytes()}
    answer = second.admin().put("/v1/adapters/n4", files=files)
    assert answer.status_code == 503
    answer = second.admin().put("/v1/adapters/n4", json={"path": ".versions/n4-B"})
    assert answer.status_code == 503
    assert "Free some space" in answer.json()["error"]["message"]
    assert ask(second, "n4") == expected["n4", "A", PROMPTS[0]]
    filler.unlink()
    answer = second.admin().put("/v1/adapters/n4", json={"path": ".versions/n4-B"})
    assert answer.status_code == 200
    assert ask(second, "n4") == expected["n4", "B", PROMPTS[0]]


def test_a_lost_store_and_a_lost_directory_stop_nobody(second, stage, expected):
    for name in ("n1", "n2", "n6"):  # what is in the engine goes on
        assert ask(second, name) == expected[name, "A", PROMPTS[0]]
    shutil.rmtree(stage.root / "state" / "objects")
    away = stage.root / "away"
    stage.adapters.rename(away)
    wait_until(lambda: f"{stage.adapters} cannot be read" in second.text())
    time.sleep(1.5)  # longer than the quiet period
    for name in ("n1", "n2", "n6"):
        assert ask(second, name) == expected[name, "A", PROMPTS[0]]
    away.rename(stage.adapters)
    answer = second.admin().put("/v1/adapters/n5", json={"path": ".versions/n5-B"})
    assert answer.status_code == 200, answer.text
    assert ask(second, "n5") == expected["n5", "B", PROMPTS[0]]
    rename_into_place(stage.version("n6", "B"), stage.adapters / "n6")
    wait_until(lambda: ask(second, "n6") == expected["n6", "B", PROMPTS[0]])


def test_a_dead_engine_ends_the_server_with_an_error(second):
    """The last test of this server. Health fails at once, running requests end with an error, nothing is left."""
    family = second.family()
    engines = [process for process in family if "EngineCore" in " ".join(process.cmdline())]
    assert engines, [process.cmdline() for process in family]
    ended = []

    def stream():
        try:
            for _ in second.client().completions.create(
                model="base", prompt="t5", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
            ):
                ended.append("token")
        except openai.APIError as error:
            ended.append(repr(error))

    running = threading.Thread(target=stream)
    running.start()
    wait_until(lambda: ended)
    engines[0].kill()

    def unhealthy():
        try:
            return httpx.get(f"{second.url}/health", timeout=2).status_code == 503
        except httpx.TransportError:
            return True

    wait_until(unhealthy)
    assert second.wait_exit() == 1
    running.join(30)
    assert not running.is_alive()
    assert gone(family) == []
    assert "The engine died" in second.text()


def test_strict_adapters_makes_an_invalid_one_fatal(stage, tmp_path):
    adapters = tmp_path / "adapters"
    shutil.copytree(stage.version("n0", "A"), adapters / "good")
    shutil.copytree(stage.version("n0", "A"), adapters / "bad")
    (adapters / "bad" / WEIGHTS).write_bytes(b"")
    server = ServerProcess(
        ["qaa-serve", "--adapters", str(adapters), "--strict-adapters", "--state-dir", str(tmp_path / "state")],
        tmp_path / "log",
        forked=True,
    )
    try:
        assert server.wait_exit(START_LIMIT_S) == 2
        assert "bad" in server.text()
        assert "damaged" in server.text()
    finally:
        server.stop()
