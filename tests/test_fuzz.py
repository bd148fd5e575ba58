"""A real server under thousands of odd requests (loadtests/fuzz.py): it lives, and answers as it did before."""

from __future__ import annotations

import asyncio
import json

import fuzz
import httpx
import pytest
from fuzz_tables import KNOWN, ROUTES

pytest.importorskip("vllm", reason="vLLM is not installed")

from server_process import ServerProcess
from tiny_models import ATTENTION, MLP, make_lora, make_model, make_qaa
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SEED, REQUESTS = 20, 2000
MODELS = ["base", "one", "one@123456789abc"]


def give_letters(base):
    """Give a model a token for every character of ASCII, so that it can say whatever a structure asks for.

    Some of the model's tokens have no text then, as in models whose vocabulary is padded.
    """
    texts = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    letters = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Prompts run in parts, and there are fewer slots than adapters and less cache than requests want."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    base = make_model(tmp_path / "base", "llama")
    give_letters(base)
    adapters = tmp_path / "adapters"
    make_qaa(adapters / "one", base, ATTENTION["llama"], 1)
    make_qaa(adapters / "two", base, ATTENTION["llama"] + MLP["llama"], 2, ansatz="ry_ring", layers=3)
    make_lora(adapters / "lora", base, ATTENTION["llama"], 4)
    server = ServerProcess(
        [
            "qaa-serve", "--adapters", str(adapters), "--max-loras", "2", "--dtype", "float32",
            "--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--num-gpu-blocks-override", "9",
            "--scheduling-policy", "priority", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        ],
        tmp_path / "server.log",
        forked=True,
    )  # fmt: skip
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.mark.vllm
def test_no_request_harms_the_server(server):
    run = asyncio.run(
        fuzz.fuzz(server.url, range(REQUESTS), SEED, concurrency=12, key="", limit_s=60, check_every=25)
    )
    print(fuzz.summary(run))
    assert not run.findings, "\n".join(run.findings)
    assert sum(sum(statuses.values()) for statuses in run.statuses.values()) == REQUESTS
    answered = {path: statuses["200"] for path, statuses in run.statuses.items() if statuses["200"] >= 5}
    never = {"/v1/systemone", "/v1/responses/resp_x/cancel"}  # not with this model, and no such response
    assert set(answered) == {route.path for route in ROUTES} - never
    assert server.process.poll() is None


@pytest.mark.vllm
@pytest.mark.parametrize("field", [{"top_k": 10**30}, {"session_id": "\ud800"}])
def test_what_the_engine_cannot_be_told_is_the_clients_error(server, field):
    """vLLM answers 500, without a reason, and the server's error rate rises."""
    body = json.dumps({"model": "base", "prompt": "Hello", "max_tokens": 1, **field})
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert "more than 64 bits, or half a character" in said or "not JSON in UTF-8" in said


def test_a_request_is_a_function_of_seed_and_number():
    requests = [fuzz.draw(i, 1, MODELS) for i in range(300)]
    assert requests == [fuzz.draw(i, 1, MODELS) for i in range(300)]
    assert requests != [fuzz.draw(i, 2, MODELS) for i in range(300)]
    assert {request.leaves for request in requests} == {"", "body", "answer", "stream"}


def test_only_this_machine_is_asked(capsys):
    for url in ("http://192.0.2.1:8000", "http://example.com", "http://127.0.0.1.example.com", "http://"):
        with pytest.raises(SystemExit):
            fuzz.main(["--url", url])
        assert "this machine alone" in capsys.readouterr().err


class Judged(fuzz.Run):
    """What the rules make of an answer, without a server."""

    def __init__(self):
        super().__init__("http://127.0.0.1", None, {}, 1, served={"one"})

    def judge(self, path, asked, status, text, kind="application/json"):
        route = next(route for route in ROUTES if route.path == path)
        response = httpx.Response(status, headers={"content-type": kind})
        self._judge(fuzz.Sent(0, route, asked.encode()), response, text)
        return self.findings


STREAM = "text/event-stream; charset=utf-8"


@pytest.mark.parametrize(
    ("status", "text", "kind", "found"),
    [
        (500, '{"error": {"message": "EngineCore encountered an issue"}}', "application/json", "status 500"),
        (400, "<html>", "text/html", "no JSON"),
        (404, '{"error": {"message": "The model `one` does not exist."}}', "application/json", "does not exist"),
        (200, 'data: {"choices": []}\n\n', STREAM, "does not end"),
        (200, 'data: {"error": {"message": "", "code": 500}}\n\ndata: [DONE]\n\n', STREAM, "in a stream"),
        (200, 'data: {"error": {"message": "no", "code": 400}}\n\ndata: [DONE]\n\n', STREAM, None),
        (200, 'data: {"choices": []}\n\ndata: [DONE]\n\n', STREAM, None),
        (400, '{"error": {}}', "application/json", None),
    ],
)
def test_the_rules(status, text, kind, found):
    findings = Judged().judge("/v1/completions", '{"model": "one"}', status, text, kind)
    assert [found in finding for finding in findings] == ([] if found is None else [True])


def test_what_is_known_is_counted_and_no_finding():
    run = Judged()
    assert not run.judge("/v1/systemone", "{}", 501, '{"message": "the structured decision API"}')
    assert run.excused.total() == 1
    assert all(known.what and known.asked and known.reason for known in KNOWN)
