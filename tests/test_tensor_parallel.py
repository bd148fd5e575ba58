"""Two workers that share every layer give the tokens of one: `--tensor-parallel-size 2` on two CPU processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from faults import greedy, openai_client, words
from server_process import ServerProcess, gone
from tiny_models import ATTENTION, MLP, ReferenceModel, make_lora, make_model, make_qaa

from qaa_serve.adapters import load_adapter

TOLERANCE = 1e-4  # |d logprob|, float32


def make_adapters(root: Path) -> Path:
    """Row-parallel layers (o_proj, down_proj) gather x before the embedding; all options of an adapter."""
    base = make_model(root / "base", "qwen2")
    every = ATTENTION["qwen2"] + MLP["qwen2"]
    make_qaa(root / "adapters" / "all", base, every, 1)
    make_qaa(root / "adapters" / "rows", base, ("o_proj", "down_proj"), 2, heads=2, ansatz="ry_ring", layers=3)
    make_qaa(root / "adapters" / "options", base, every, 3, readouts=12, constant=True, length=True)
    make_qaa(root / "adapters" / "centred", base, every, 4, 3, inputs="centred-rms", whitened=True)
    make_lora(root / "adapters" / "lora", base, every, 4)
    return root


def start(root: Path, *options: str, forked: bool = False) -> ServerProcess:
    return ServerProcess(
        [
            "qaa-serve", "--adapters", str(root / "adapters"), "--dtype", "float32",
            "--kv-cache-memory-bytes", "64M", "--max-loras", "3", "--state-dir", str(root / "state"),
            "--max-num-batched-tokens", "64", "--max-num-seqs", "8", *options,
        ],
        root / "server.log", forked=forked,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def server(root):
    server = start(root, "--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", forked=True)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


async def complete(client, model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=10, temperature=0, logprobs=0,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    found = answer.choices[0].logprobs
    return [int(token.removeprefix("token_id:")) for token in found.tokens], found.token_logprobs


def ids(seed: int, length: int) -> list[int]:
    return [int(word[1:]) for word in words(seed, length).split()]


def check_mixed_requests(server: ServerProcess, root: Path) -> None:
    """Requests of one batch for base, QAA and LoRA are answered as transformers answers them."""
    reference = ReferenceModel(root / "base")
    adapters = root / "adapters"
    worn = {name: load_adapter(adapters / name) for name in ("all", "rows", "options")}
    worn |= {"base": None, "lora": adapters / "lora"}
    requests = [(list(worn)[i % len(worn)], ids(40 + i, 3 + 7 * i)) for i in range(10)]

    async def ask_all():
        async with openai_client(server) as client:
            return await asyncio.gather(*(complete(client, *request) for request in requests))

    for (model, prompt), (tokens, logprobs) in zip(requests, asyncio.run(ask_all()), strict=True):
        expected = reference.logprobs(worn[model], prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist(), model
        best = expected.max(-1).values.tolist()
        assert max(abs(a - b) for a, b in zip(logprobs, best, strict=True)) <= TOLERANCE, model


def replace_adapter(server: ServerProcess, root: Path) -> bool:
    """Replace an adapter by the directory; whether answers came to be the new one's."""
    prompt = ids(9, 8)
    changed = make_qaa(root / "adapters" / "all", root / "base", ("q_proj", "o_proj"), 9)
    text = greedy(ReferenceModel(root / "base"), changed, " ".join(f"t{i}" for i in prompt), 10)
    expected = [int(word[1:]) for word in text.split()]

    async def wait_for_it():
        async with openai_client(server) as client:
            for _ in range(200):
                if (await complete(client, "all", prompt))[0] == expected:
                    return True
                await asyncio.sleep(0.1)
        return False

    return asyncio.run(wait_for_it())


def test_mixed_requests_are_exact(server, root):
    check_mixed_requests(server, root)


def test_an_adapter_is_replaced_in_both_workers(server, root):
    assert replace_adapter(server, root)
    family = server.family()
    assert sum("Worker" in " ".join(process.cmdline()) for process in family) == 2
    server.process.terminate()
    assert server.wait_exit() == 0
    assert gone(family) == []
