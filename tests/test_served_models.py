"""What vLLM's handlers can look up is what the gate checked and holds; and whose vLLM's routes are."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from catalogue_support import add, make_catalogue, reject, revision
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

from qaa_serve.server import settings
from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.keys import make_key
from qaa_serve.server.models import HeldAdapter, ServedModels
from qaa_serve.server.rights import Role, role_of


@pytest.fixture
def models():
    """Served models without an engine: two names of the base model, and the adapters one and two."""
    models = ServedModels.__new__(ServedModels)
    paths = [BaseModelPath(name=name, model_path="/models/base") for name in ("base", "/models/base")]
    models.base_model_paths = paths
    models.registry = OpenAIModelRegistry(SimpleNamespace(max_model_len=64), paths)
    models._catalogue = make_catalogue()
    add(models._catalogue, revision("one"), [revision("one", "b")])
    add(models._catalogue, revision("two"))
    reject(models._catalogue, "bad")
    models._cards, models._page, models._generation, models._writing = {}, None, -1, asyncio.Lock()
    models._started = 1000
    models.model_config = SimpleNamespace(max_model_len=64)
    return models


@contextmanager
def during(asked=None, allowed=None, held=None):
    """As in a request for a model, by a key for certain models, with an adapter held."""
    key = None if allowed is None else make_key("k", models=allowed)
    held = None if held is None else revision(held)
    token = current_request.set(RequestContext(key, "10.0.0.9", asked, held))
    try:
        yield
    finally:
        current_request.reset(token)


def listed(models):
    return [card["id"] for card in json.loads(asyncio.run(models.list_models()))["data"]]


@pytest.mark.parametrize("asked", ["one", "one@aaaaaaaaaaaa"])
def test_the_adapter_that_is_held_is_found_under_the_name_it_was_asked_by(models, asked):
    with during(asked, held="one"):
        assert list(models.lora_requests) == [asked]
        assert len(models.lora_requests) == 1
        request = models.lora_requests[asked]
        assert (request.lora_name, request.lora_path) == (f"one@{'a' * 64}", "/nowhere/one")
        assert models.model_name(request) == asked


@pytest.mark.parametrize("use", [None, (None, None), ("one", None), ("two", "two"), ("one@aaaaaaaaaaaa", "one")])
def test_nothing_else_is_found(use):
    with during(use[0], held=use[1]) if use else contextmanager(lambda: iter([None]))():
        adapters = HeldAdapter()
        for name in ("one", "", None, "base", "one@bbbbbbbbbbbb"):
            assert name not in adapters
            with pytest.raises(KeyError):
                adapters[name]
        if use is None or use[1] is None:
            assert not list(adapters)
            assert not len(adapters)


def test_vllm_cannot_put_an_adapter_into_the_list(models):
    models.lora_requests = {"one": "anything"}
    assert "one" not in models.lora_requests
    for method in (models.load_lora_adapter, models.unload_lora_adapter):
        with pytest.raises(NotImplementedError):
            asyncio.run(method())


@pytest.mark.parametrize(
    ("asked", "allowed", "name", "expected"),
    [
        ("base", None, "base", True),
        ("/models/base", None, "/models/base", True),
        (None, None, "base", True),
        (None, ["base"], "base", True),
        (None, ["one"], "base", False),
        ("one", None, "base", False),
        ("base", None, "/models/base", False),
        ("one", None, "one", False),
        ("base", ["one"], "base", False),
    ],
)
def test_the_base_model_is_for_requests_that_were_checked_for_it(models, asked, allowed, name, expected):
    with during(asked, allowed):
        assert models.is_base_model(name) == expected


def test_outside_of_requests_the_base_models_names_are_the_base_models(models):
    assert models.is_base_model("base")
    assert not models.is_base_model("one")


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, ["base", "/models/base", "one", "two"]),
        (["one"], ["one"]),
        (["t*", "base"], ["base", "/models/base", "two"]),
        (["bad"], []),
    ],
)
def test_a_client_sees_the_models_it_may_use(models, allowed, names):
    with during(allowed=allowed):
        assert listed(models) == names


@pytest.mark.parametrize(
    ("name", "root"),
    [("base", "base"), ("one", "one@aaaaaaaaaaaa"), ("one@bbbbbbbbbbbb", "one@bbbbbbbbbbbb"),
     ("one@aaaaaaaaaaaa", "one@aaaaaaaaaaaa")],
)  # fmt: skip
def test_one_model_is_shown_with_what_it_stands_for(models, name, root):
    card = asyncio.run(models.show_model(name))
    assert (card.id, card.root) == (name, root)
    assert card.parent == (None if name == "base" else "base")


@pytest.mark.parametrize(
    ("allowed", "name"),
    [(None, "no-such"), (None, "bad"), (None, "one@cccccccccccc"), (None, ""), (["one"], "two"),
     (["one"], "base"), (["two"], "one@bbbbbbbbbbbb")],
)  # fmt: skip
def test_a_model_that_the_client_may_not_use_is_as_one_that_is_not_there(models, allowed, name):
    with during(allowed=allowed), pytest.raises(RefusedError) as caught:
        asyncio.run(models.show_model(name))
    assert (caught.value.status, caught.value.message) == (404, f"The model `{name}` does not exist.")


#: Routes of vLLM that a client's key may call, each with all below it.
FOR_CLIENTS = {
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings",
    "/v1/score", "/v1/rerank", "/v2/rerank", "/v2/embed", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/realtime", "/v1/systemone", "/tokenize", "/detokenize", "/pooling", "/classify",
    "/score", "/rerank", "/invocations", "/generative_scoring", "/inference/v1/generate", "/cohere/v2/chat",
}  # fmt: skip

FOR_ANYONE = {
    "/health", "/load", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc",
    "/openapi.json",
}  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--enable-scale-out", "--enable-tokenizer-info-endpoint")])
def test_no_other_route_of_vllm_is_open_to_clients(monkeypatch, more):
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    args = settings.make_parser().parse_args(["base", *more])
    app = build_app(args, ("generate", "embed", "classify", "score", "transcription", "realtime", "render"))
    roles = {}
    for route in app.routes:
        for path in [getattr(route, "path", None)] if hasattr(route, "path") else paths_below(route):
            roles[path] = role_of(path)
    assert len(roles) > 40
    clients = {path for path, role in roles.items() if role is Role.CLIENT}
    below = {path for path in clients if any(path == r or path.startswith(r + "/") for r in FOR_CLIENTS)}
    assert clients - below == set()
    assert {path for path, role in roles.items() if role is Role.ANYONE} <= FOR_ANYONE
    for path in ("/pause", "/sleep", "/collective_rpc", "/update_weights", "/server_info", "/scale_elastic_ep"):
        assert roles[path] is Role.ADMIN


def paths_below(router):
    raise AssertionError(f"{router!r} has no path: see what it holds")


def test_a_name_that_is_gone_is_listed_no_more(models):
    assert "two" in listed(models)
    catalogue = models._catalogue
    asyncio.run(catalogue._forget(catalogue.entries["two"], "forget"))
    assert "two" not in listed(models)


def test_names_that_come_and_go_leave_nothing_where_nobody_lists_them(models):
    catalogue = models._catalogue
    there = {*catalogue.entries}
    for i in range(100):
        entry = add(catalogue, revision(f"name-{i}"))
        asyncio.run(catalogue._forget(entry, "forget"))
    assert {*catalogue.take_touched()} == there
