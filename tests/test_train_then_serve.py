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
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm_qaa import register

from qaa_serve.cli import main
from qaa_serve.registry import read_revision

SHARED = Path(__file__).parents[2] / "shared" / "models" / "tinystories-656k-hd64"
PROMPTS = ("Once upon a time ", "The dog ", "t7 t8 t9", "Lily went to the park and ")


#: The arguments of `qaa-serve train` for each adapter.
METHODS = {
    "qaa": ["--method", "qaa"],
    "qaa-options": ["--method", "qaa", "--readouts", "9", "--constant", "--length", "--heads", "2", "--lr", "0.1"],
    "lora": ["--method", "lora"],
    "sora": ["--method", "sora"],
}
#: The adapters of each model.
MODELS = {"random": [*METHODS], "tinystories": ["qaa", "sora"]}


class Trained:
    """A base, adapters trained on it by the command, and one engine that serves them all."""

    def __init__(self, base: Path, root: Path, methods: list[str]):
        self.base, self.root, self.methods = base, root, methods
        rows = [{"prompt": prompt, "completion": f"t{i} t{i + 1} the end ."} for i, prompt in enumerate(PROMPTS)]
        data = root / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
        for method in methods:
            arguments = [
                "train", "--model", base, "--data", data, "--output", root / method, "--lr", "0.03",
                *METHODS[method], "--epochs", "6", "--batch-size", "4", "--threads", "1",
            ]  # fmt: skip
            assert main([*map(str, arguments)]) == 0
        register()
        self.engine = LLM(
            str(base), dtype="float32", enable_lora=True, max_lora_rank=32, max_model_len=128, max_num_seqs=8,
            kv_cache_memory_bytes=32 << 20, enforce_eager=True, seed=0,
        )  # fmt: skip

    def answers(self, method: str) -> list[RequestOutput]:
        """Greedy answers of an adapter to PROMPTS."""
        revision = read_revision(self.root / method)
        return self.engine.generate(
            list(PROMPTS),
            SamplingParams(temperature=0, max_tokens=10, logprobs=0, ignore_eos=True),
            lora_request=LoRARequest(revision.revision, revision.int_id, str(revision.path)),
            use_tqdm=False,
        )


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    base = make_model(root / "base", "llama") if request.param == "random" else SHARED
    if not base.is_dir():
        pytest.skip(f"needs the model {base.name}, which is not part of the project")
    trained = Trained(base, root, MODELS[request.param])
    yield trained
    del trained.engine
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("method", METHODS)
def test_served_output_is_trained_output(trained, method):
    if method not in trained.methods:
        pytest.skip("the random model has it")
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    plain = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, trained.root / method).eval()
    for prompt, answer in zip(PROMPTS, trained.answers(method), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert answer.prompt_token_ids == ids
        tokens = list(answer.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
            with model.disable_adapter():
                before = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        served = torch.tensor([next(iter(p.values())).logprob for p in answer.outputs[0].logprobs])
        assert (served - expected).abs().max() <= 1e-4
        assert (before - logits).abs().max() > 0.1, "training changed nothing"
