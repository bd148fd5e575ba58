"""What `qaa-serve train` leaves is served as is, and the server says what the trained model says."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from peft import PeftModel
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm_qaa import register

from qaa_serve.cli import main
from qaa_serve.registry import read_revision

SHARED = Path(__file__).parents[2] / "shared" / "models" / "tinystories-656k-hd64"
PROMPTS = ("Once upon a time ", "The dog ", "t7 t8 t9", "Lily went to the park and ")


METHODS = {
    "qaa": ["--method", "qaa"],
    "qaa-options": ["--method", "qaa", "--readouts", "9", "--constant", "--length", "--heads", "2", "--lr", "0.1"],
    "lora": ["--method", "lora"],
    "sora": ["--method", "sora"],
}


@pytest.mark.parametrize(
    ("model", "method"),
    [*(("random", method) for method in METHODS), ("tinystories", "qaa"), ("tinystories", "sora")],
)
def test_served_output_is_trained_output(model, method, tmp_path):
    base = SHARED if model == "tinystories" else make_model(tmp_path / "base", "llama")
    if not base.is_dir():
        pytest.skip(f"needs the model {SHARED.name}, which is not part of the project")
    rows = [{"prompt": prompt, "completion": f"t{i} t{i + 1} the end ."} for i, prompt in enumerate(PROMPTS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    output = tmp_path / "adapters" / "mine"
    arguments = ["--model", base, "--data", data, "--output", output, "--lr", 0.03, *METHODS[method]]
    assert main(["train", *map(str, arguments), "--epochs", "6", "--batch-size", "4", "--threads", "1"]) == 0

    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = PeftModel.from_pretrained(plain, output).eval()
    register()
    revision = read_revision(output)
    llm = LLM(
        str(base), dtype="float32", enable_lora=True, max_lora_rank=32, max_model_len=128, max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20, enforce_eager=True, seed=0,
    )  # fmt: skip
    try:
        answers = llm.generate(
            list(PROMPTS),
            SamplingParams(temperature=0, max_tokens=10, logprobs=0, ignore_eos=True),
            lora_request=LoRARequest(revision.revision, revision.int_id, str(revision.path)),
            use_tqdm=False,
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            assert answer.prompt_token_ids == ids
            tokens = list(answer.outputs[0].token_ids)
            with torch.no_grad():
                logits = trained(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
                with trained.disable_adapter():
                    before = trained(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
            assert tokens == logits.argmax(-1).tolist()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            served = torch.tensor([next(iter(p.values())).logprob for p in answer.outputs[0].logprobs])
            assert (served - expected).abs().max() <= 1e-4
            assert (before - logits).abs().max() > 0.1, "training changed nothing"
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
