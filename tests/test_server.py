"""`qaa-serve` over HTTP with the real `openai` client: chat and completions, streamed and not, mixed adapters."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import openai
import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from otlp import Collector
from server_process import ServerProcess, gone
from tiny_models import ATTENTION, MLP, VOCAB, ReferenceModel, make_lora, make_model, make_qaa

from qaa_serve.server.metrics import FAMILIES

GREEDY = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
OPTIONS = ("--dtype", "float32", "--kv-cache-memory-bytes", "64M")
MODELS = ("base", "one", "two", "three", "lora")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = make_model(root / "base", "llama")
    adapters = root / "adapters"
    make_qaa(adapters / "one", base, ATTENTION["llama"], 1)
    make_qaa(adapters / "two", base, ATTENTION["llama"] + MLP["llama"], 2, ansatz="ry_ring", layers=3)
    make_qaa(adapters / "three", base, ("v_proj",), 3, ansatz="strongly_entangling", heads=2)
    make_lora(adapters / "lora", base, ATTENTION["llama"], 4)
    make_qaa(adapters / "broken", base, ("q_proj",), 5)
    (adapters / "broken" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    other = make_model(root / "other", "qwen2")
    make_qaa(adapters / "stranger", other, ("q_proj",), 6)
    # It says it was made for this base, but is of another's widths.
    config = adapters / "stranger" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(other), str(base)))
    (adapters / "no name!").mkdir()
    shutil.copytree(adapters / "one", adapters / "no name!", dirs_exist_ok=True)
    (adapters / "notes").mkdir()
    return root


@pytest.fixture(scope="module")
def collector():
    """Where the server sends its traces."""
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def server(root, collector):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms between two batches of spans
        server = ServerProcess(
            [
                "qaa-serve", "--adapters", str(root / "adapters"), "--max-loras", "3",
                "--otlp-traces-endpoint", collector.endpoint, *OPTIONS,
            ],
            root / "server.log",
            watched=True,
        )  # fmt: skip
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(root):
    """expected(model, prompt): greedy text by transformers with reference circuits."""
    from qaa_serve.adapters import load_adapter

    reference = ReferenceModel(root / "base")
    adapters = root / "adapters"
    worn = {"base": None, "lora": adapters / "lora"}
    worn |= {name: load_adapter(adapters / name) for name in ("one", "two", "three")}

    def greedy(model: str, prompt: str) -> str:
        tokens = [1 if word == "<s>" else int(word[1:]) for word in prompt.split()]
        found = reference.greedy(worn[model], tokens, GREEDY["max_tokens"])
        return " ".join(f"t{token}" for token in found if token > 2)  # special tokens are not shown

    return greedy


def words(seed: int, length: int = 6) -> str:
    ids = torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"t{i}" for i in ids.tolist())


def test_models_lists_base_and_adapters_with_their_parent(server):
    models = {model.id: model for model in server.client().models.list()}
    assert set(MODELS) <= set(models)
    assert {"broken", "stranger", "no name!", "notes"}.isdisjoint(models)
    assert models["base"].parent is None
    assert all(models[name].parent == "base" for name in MODELS[1:])


@pytest.mark.parametrize("model", MODELS)
def test_completions(server, expected, model):
    prompt = words(1)
    answer = server.client().completions.create(model=model, prompt=prompt, **GREEDY)
    assert answer.choices[0].text.split() == expected(model, prompt).split()
    assert answer.model == model
    assert answer.usage.completion_tokens == GREEDY["max_tokens"]


@pytest.mark.parametrize("model", MODELS)
def test_chat_streamed_and_not(server, expected, model):
    content = words(2)
    messages = [{"role": "user", "content": content}]
    client = server.client()
    whole = client.chat.completions.create(model=model, messages=messages, **GREEDY)
    chunks = list(client.chat.completions.create(model=model, messages=messages, stream=True, **GREEDY))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    # The tiny tokenizer's chat template: bos, the message, t3.
    assert whole.choices[0].message.content.split() == expected(model, f"<s> {content} t3").split()
    assert streamed == whole.choices[0].message.content
    assert whole.model == model
    assert {chunk.model for chunk in chunks} == {model}


def test_everyone_at_once(server, expected):
    """Base, three QAA adapters and a LoRA adapter in the same batches: more adapters than slots."""
    requests = [(MODELS[i % len(MODELS)], words(100 + i, 3 + i)) for i in range(20)]

    async def ask(client, model, prompt):
        stream = await client.completions.create(model=model, prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *request) for request in requests))

    for (model, prompt), text in zip(requests, asyncio.run(ask_all()), strict=True):
        assert text.split() == expected(model, prompt).split(), model


def test_logprobs_and_several_choices(server):
    answer = server.client().completions.create(
        model="two", prompt=words(3), n=2, logprobs=3, max_tokens=4, temperature=0.8, seed=1
    )
    assert len(answer.choices) == 2
    assert all(len(choice.logprobs.top_logprobs) == len(choice.logprobs.tokens) for choice in answer.choices)


def test_structured_outputs(server):
    answer = server.client().chat.completions.create(
        model="one",
        messages=[{"role": "user", "content": words(4)}],
        max_tokens=3,
        extra_body={"structured_outputs": {"choice": ["t11", "t12"]}},
    )
    assert answer.choices[0].message.content.strip() in {"t11", "t12"}


def test_an_unknown_model_is_a_404_that_says_where_the_known_ones_are(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().completions.create(model="nobody", prompt="t5")
    assert "`nobody` does not exist" in caught.value.body["message"]
    assert "GET /v1/models" in caught.value.body["message"]
    assert caught.value.body["param"] == "model"


def test_a_revision_is_not_a_public_name_that_answers_as_another(server):
    """A request never reaches another adapter than it names."""
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="one@", prompt="t5")


def test_adapters_route_says_what_is_served_and_what_is_not(server):
    listing = server.adapters()
    assert {name for name, item in listing.items() if item["state"] == "served"} == set(MODELS[1:])
    assert listing["one"]["kind"] == "QAA"
    assert listing["one"]["revision"].startswith("one@")
    assert len(listing["one"]["revision"]) == len("one@") + 12
    assert "damaged or no safetensors" in listing["broken"]["reason"]
    assert "made for another base" in listing["stranger"]["reason"]
    assert "cannot be an adapter's name" in listing["no name!"]["reason"]
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    assert "AdapterList" in json.dumps(schema["paths"]["/v1/adapters"])


def test_the_log_names_what_was_chosen_and_what_was_rejected(server):
    log = server.text()
    assert "--adapter-cache-bytes" in log
    assert "--max-lora-rank 32" in log
    assert "--max-loras" not in log.split("Chosen here")[1].split("INFO")[0], "the user gave it"
    assert "Not serving adapter 'broken'" in log
    assert "damaged or no safetensors" in log
    assert f"curl {server.url}/v1/chat/completions" in log


def test_health(server):
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def scraped(server, **headers: str) -> list:
    """The families of a scrape."""
    answer = httpx.get(f"{server.url}/metrics", timeout=60, headers=headers)
    assert answer.status_code == 200
    openmetrics = answer.headers["content-type"].startswith("application/openmetrics-text")
    return list((parse_openmetrics if openmetrics else parse_text)(answer.text))


def series(server, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    found = [sample for family in scraped(server) for sample in family.samples if sample.name == name]
    values = {tuple(sorted(sample.labels.items())): sample.value for sample in found}
    assert len(values) == len(found)
    return values


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text;version=1.0.0"])
def test_one_page_of_metrics_has_ours_vllm_s_and_the_process_s(server, accept):
    families = scraped(server, accept=accept)
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert {"vllm:request_success", "qaa_requests", "process_cpu_seconds", "http_requests"} <= set(names)
    ours = {family.name.removesuffix("_total") for family in FAMILIES}
    assert ours <= set(names)
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert "get" in paths["/metrics"]
    assert httpx.get(f"{server.url}/metrics/", timeout=60).status_code in (307, 404), "vLLM's own page is gone"


def test_where_adapters_are_and_how_old_that_is(server):
    server.client().completions.create(model="one", prompt=words(3), **GREEDY)
    deadline = time.monotonic() + 60
    while (("adapter", "one"), ("tier", "device")) not in (tiers := series(server, "qaa_adapter_tier")):
        assert time.monotonic() < deadline, tiers
        time.sleep(1)
    assert {dict(labels)["adapter"] for labels in tiers} == set(MODELS[1:])
    assert set(tiers.values()) == {1}
    assert 0 <= series(server, "qaa_engine_account_age_seconds")[()] < 60
    assert series(server, "qaa_key_requests_total") == {}, "there are no keys"
    ((labels, one),) = series(server, "qaa_build_info").items()
    assert (dict(labels)["circuits"], one) == ("cpu", 1)
    assert series(server, "qaa_circuit_backend_seconds") == {}, "on a CPU nothing is timed to choose"


def test_adapters_with_requests_are_one_series_whatever_ran_before(server):
    """vLLM has one for every combination that ever was, and revisions in it."""
    ask = partial(server.client().completions.create, prompt=words(3), **GREEDY)
    for batch in (MODELS[:2], MODELS[1:3], MODELS[2:], ("one", "lora"), MODELS):
        with ThreadPoolExecutor(len(batch)) as pool:
            answers = [pool.submit(ask, model=model) for model in batch]
        assert all(answer.result().choices for answer in answers)
    before = time.time()
    time.sleep(1.1)
    (((*labels,), at),) = series(server, "vllm:lora_requests_info").items()
    assert dict(labels) == {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "3"}
    assert before < at <= time.time()
    with ThreadPoolExecutor(3) as pool:
        with server.held():
            asked = [pool.submit(ask, model=model) for model in ("two", "base", "lora")]
            deadline = time.monotonic() + 30
            while dict(labels)["running_lora_adapters"] != "lora,two":
                assert time.monotonic() < deadline, labels
                time.sleep(0.2)
                (((*labels,), _),) = series(server, "vllm:lora_requests_info").items()
        assert all(answer.result().choices for answer in asked)


def revision_of(server, name: str) -> str:
    return server.adapter(name)["revision"]


def names_in_span(server, model: str) -> dict[str, str]:
    """What the span of a request for a model is to say of it."""
    if model == "base":
        return {"gen_ai.request.model": "base", "gen_ai.response.model": "base"}
    revision = revision_of(server, model)
    return {
        "gen_ai.request.model": model,
        "gen_ai.response.model": revision,
        "qaa.adapter": model,
        "qaa.revision": revision,
    }


class Traced:
    """One request in a trace of its own; `headers` put it there."""

    def __init__(self):
        self.trace_id = secrets.token_hex(16)
        self.headers = {"traceparent": f"00-{self.trace_id}-{secrets.token_hex(8)}-01"}

    def spans(self, collector: Collector, count: int = 1) -> list[dict]:
        """Its spans, with what they say of models and adapters."""
        spans = collector.of_trace(self.trace_id, count)
        return [
            {key: value for key, value in span.items() if key.startswith("qaa.") or key.endswith(".model")}
            for span in spans
        ]


@pytest.mark.parametrize("model", ["base", "one", "lora"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_names_the_adapter_and_its_revision(server, collector, model, stream):
    client = server.client()
    asked = {"model": model, "stream": stream, **GREEDY}
    chat, text = Traced(), Traced()
    messages = [{"role": "user", "content": words(6)}]
    answers = (
        client.chat.completions.create(messages=messages, extra_headers=chat.headers, **asked),
        client.completions.create(prompt=words(6), extra_headers=text.headers, **asked),
    )
    if stream:
        assert all(list(answer) for answer in answers)
    expected = [names_in_span(server, model)]
    assert (chat.spans(collector), text.spans(collector)) == (expected, expected)


def test_every_choice_has_a_span_that_names_the_adapter(server, collector):
    traced = Traced()
    server.client().completions.create(
        model="two", prompt=words(7), n=2, max_tokens=4, temperature=0.8, seed=1, extra_headers=traced.headers
    )
    assert traced.spans(collector, 2) == [names_in_span(server, "two")] * 2


def test_traces_of_one_batch_are_not_mixed_up(server, collector):
    requests = [(MODELS[i % len(MODELS)], Traced()) for i in range(10)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.completions.create(model=model, prompt=words(8), extra_headers=traced.headers, **GREEDY)
                for model, traced in requests
            ]
            await asyncio.gather(*asked)

    asyncio.run(ask_all())
    for model, traced in requests:
        assert traced.spans(collector) == [names_in_span(server, model)], model


def test_after_a_hot_swap_traces_name_the_new_revision(server, collector, root):
    """And the old one where a client still asks for that. The last use of the adapter `three`."""
    old = revision_of(server, "three")
    make_qaa(root / "adapters" / "three", root / "base", ("q_proj",), 33)
    deadline = time.monotonic() + 30
    while revision_of(server, "three") == old:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    traced, pinned = Traced(), Traced()
    for model, trace in (("three", traced), (old, pinned)):
        server.client().completions.create(model=model, prompt=words(9), extra_headers=trace.headers, **GREEDY)
    assert traced.spans(collector) == [names_in_span(server, "three")]
    (span,) = pinned.spans(collector)
    assert (span["qaa.adapter"], span["qaa.revision"]) == ("three", old)


def test_nothing_leaves_the_machine(server):
    """Start-up and every request above, watched."""
    assert server.outside == set()


def test_sigterm_ends_every_process(server):
    """The last test of this server."""
    family = server.family()
    assert len(family) >= 2
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert gone(family) == []
    assert "leaked" not in server.text()  # as Triton's bindings and Python's resource tracker call what was there
