"""Log-probabilities of a mixed bf16 batch: vLLM with its graphs, vLLM without them, and transformers.

    python benchmarks/mixed_logprobs.py [--json FILE]

Five requests in one batch, so that rows of a graph for eight are padding: the base, two QAA adapters of one form,
the first of them again, and a LoRA. vLLM with graphs generates greedily and gives each token's log-probability.
They are then judged by vLLM without graphs, as a prompt, and by transformers with PEFT's adapters, in float32 and
in bfloat16. vLLM must not be further from float32 than twice what transformers in bfloat16 is; and what an
adapter changes must be more than that, so that an update that is left out is seen. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from serving import attention, make_adapters, make_base

NAMES: tuple[str | None, ...] = (None, "qaa0", "qaa1", "qaa0", "lora0")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden", type=int, default=768)
    add("--layers", type=int, default=4)
    add("--prompt", type=int, default=24)
    add("--tokens", type=int, default=16, help="that are generated")
    add("--backend", default="auto", help="of the circuits, as --qaa-backend")
    add("--json", type=Path)
    parser.set_defaults(dtype="bfloat16")
    return parser.parse_args()


def run_engine(directory: Path, mode: str, args: argparse.Namespace) -> None:
    """Generate (graphs) or judge (eager), in a process of its own; from and to sequences.json."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(directory / "base"), dtype="bfloat16", enable_lora=True, max_loras=4, max_lora_rank=16, max_num_seqs=8,
        max_model_len=512, enable_prefix_caching=False, skip_tokenizer_init=True, kv_cache_memory_bytes=256 << 20,
        enforce_eager=mode == "eager", seed=0, additional_config={"qaa_backend": args.backend}, **attention(),
    )  # fmt: skip
    file = directory / "sequences.json"
    told = json.loads(file.read_text())
    prompts = [{"prompt_token_ids": sequence} for sequence in told["sequences"]]
    ids = {name: number for number, name in enumerate(dict.fromkeys(filter(None, NAMES)), start=1)}
    loras = [
        None if name is None else LoRARequest(name, ids[name], str(directory / "adapters" / name))
        for name in NAMES
    ]
    if mode == "graphs":
        wanted = SamplingParams(
            temperature=0, max_tokens=args.tokens, logprobs=0, ignore_eos=True, detokenize=False
        )
    else:
        wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = []
    for number, output in enumerate(llm.generate(prompts, wanted, lora_request=loras)):
        if mode == "graphs":
            (made,) = output.outputs
            told["sequences"][number] += list(made.token_ids)
            tokens, logprobs = made.token_ids, made.logprobs
        else:
            tokens = told["sequences"][number][-args.tokens :]
            logprobs = output.prompt_logprobs[-args.tokens :]
        found.append([position[token].logprob for token, position in zip(tokens, logprobs, strict=True)])
    told[mode] = found
    file.write_text(json.dumps(told))


def judge(directory: Path, sequences: list[list[int]], args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """(requests, tokens) log-probabilities by transformers, in one precision, and those without the adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qaa_serve.training import register

    register()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, plain = [], []
    for name, sequence in zip(NAMES, sequences, strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16).to(dtype)
        adapted = model if name is None else PeftModel.from_pretrained(model, str(directory / "adapters" / name))
        adapted = adapted.to(device).eval()
        ids = torch.tensor([sequence], device=device)

        def logprobs(run: Any, ids: torch.Tensor = ids) -> list[float]:
            with torch.no_grad(), torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                logits = run(input_ids=ids).logits[0, :-1].float()
            found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-args.tokens :, 0]
            return found.tolist()

        rows.append(logprobs(adapted))
        if name is None:
            plain.append(rows[-1])
        else:
            with adapted.disable_adapter():
                plain.append(logprobs(adapted))
    return torch.tensor(rows), torch.tensor(plain)


def compare(found: dict[str, torch.Tensor], exact: torch.Tensor, plain: torch.Tensor, naive: float) -> list[str]:
    """Lines of what was found; those that begin with FAILED are."""
    lines = []
    for mode, values in found.items():
        error = (values - exact).abs().max().item()
        verdict = "" if error <= 2 * naive else "FAILED: "
        lines.append(
            f"{verdict}logprobs, {mode}: off by {error:.4f} at most; transformers in bfloat16 by {naive:.4f}"
        )
    for row, name in enumerate(NAMES):
        if name is not None:
            effect = (exact[row] - plain[row]).abs().max().item()
            verdict = "" if effect > 2 * naive else "FAILED: "
            lines.append(f"{verdict}logprobs, {name}: the adapter changes {effect:.4f} at most")
    return lines


def main() -> int:
    args = arguments()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory(prefix="logprobs-") as temporary:
        directory = Path(temporary)
        base = make_base(directory / "base", args)
        make_adapters(directory / "adapters", base)
        generator = torch.Generator().manual_seed(2)
        prompts = torch.randint(3, 1024, (len(NAMES), args.prompt), generator=generator).tolist()
        file = directory / "sequences.json"
        file.write_text(json.dumps({"sequences": prompts}))
        for mode in ("graphs", "eager"):
            engine = multiprocessing.get_context("spawn").Process(target=run_engine, args=(directory, mode, args))
            engine.start()
            engine.join()
            if engine.exitcode:
                raise SystemExit(f"the engine for {mode} ended with {engine.exitcode}")
        told = json.loads(file.read_text())
        exact, plain = judge(directory, told["sequences"], args, torch.float32)
        rounded, _ = judge(directory, told["sequences"], args, torch.bfloat16)
    found = {mode: torch.tensor(told[mode]) for mode in ("graphs", "eager")}
    lines = compare(found, exact, plain, (rounded - exact).abs().max().item())
    print("\n".join(lines))
    if args.json:
        values = {**{mode: told[mode] for mode in found}, "float32": exact.tolist(), "bfloat16": rounded.tolist()}
        command = shlex.join(["python", "benchmarks/mixed_logprobs.py", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, "lines": lines, "logprobs": values}, indent=2) + "\n")
    return int(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
