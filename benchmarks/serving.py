"""What an adapter costs the base model in real vLLM: base, LoRA r = 16 and QAA in one engine, in turn.

    python benchmarks/serving.py [--runs 7] [--json FILE] [--plot FILE.png]
    python benchmarks/serving.py --backend torch           another circuit backend
    python benchmarks/serving.py --stock                   vLLM's own LoRA, without the QAA plugin

A random Llama (hidden 768, 12 layers, bf16) with adapters on q, k, v and o; QAA with 10 qubits, 2 layers, inputs
and readouts standardised as in trained ones. Times are of engine steps: the first step of a batch is its prefill,
the others decode. Each run times every kind once, in turn, so that a slow spell falls on all of them; printed are
the medians over the runs of each kind's ratio to the base in the same run. A single request has four times as many
runs: its steps are short, and the most uneven.
Before that, what every layer adds for a QAA adapter is compared with the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ADAPTERS = 16
#: Of what a layer adds, in parts of the largest number: it is rounded to 16 bits.
TOLERANCE = 0.02
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=7, help="times that every kind is timed")
    add("--steps", type=int, default=24, help="decode steps of one timing; its median counts")
    add("--backend", default="auto", help="of the circuits, as --qaa-backend")
    add("--hidden", type=int, default=768)
    add("--layers", type=int, default=12)
    add("--prompt", type=int, default=256, help="tokens of the prefill")
    add("--batches", type=int, nargs="+", default=[1, 16], help="requests of the decode steps, 64 at most")
    add("--dtype", default="bfloat16")
    add("--stock", action="store_true", help="without the plugin: vLLM's LoRA against its base")
    add("--json", type=Path)
    add("--plot", type=Path)
    return parser.parse_args()


def make_base(directory: Path, args: argparse.Namespace) -> Path:
    """Save a random Llama; its vocabulary is small, since the output head is not what is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, vocab_size=1024,
        max_position_embeddings=max(1024, args.prompt + 1),
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(directory)
    return directory


def _offset_and_scale(channels: int, generator: Any) -> Any:
    """What channels are standardised by, (2, channels)."""
    import torch

    return torch.stack(
        [0.1 * torch.randn(channels, generator=generator), 0.5 + torch.rand(channels, generator=generator)]
    )


def make_adapters(directory: Path, base: Path) -> None:
    """Save random adapters qaa0, qaa1, ... and lora0, lora1, ..."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qaa_serve.adapters import AdapterConfig, ModuleWeights, linear_widths, matches, save_adapter

    generator = torch.Generator().manual_seed(1)
    # Standardised, as `qaa-serve train` has them by default. q, k and v read the same x, and o one as wide.
    config = AdapterConfig(
        base_model_name_or_path=str(base), target_modules=TARGETS, inputs="centred-rms", whitened=True
    )
    for number in range(ADAPTERS):
        modules = {}
        inputs: Any = None
        for name, (d_in, d_out) in linear_widths(base).items():
            if matches(name, config.target_modules):
                inputs = _offset_and_scale(d_in, generator) if inputs is None else inputs
                n = config.qubits(d_in)
                theta = torch.randn(config.heads, *config.circuit(n).theta_shape, generator=generator)
                b = 0.1 * torch.randn(d_out, config.rank(n), generator=generator)
                readouts = _offset_and_scale(config.rank(n), generator)
                modules[name] = ModuleWeights(theta, b, inputs, readouts)
        save_adapter(directory / f"qaa{number}", config, modules)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    for number in range(ADAPTERS):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.02, generator=generator)
        model.save_pretrained(directory / f"lora{number}")


def attention() -> dict[str, str]:
    """vLLM's option for attention in Triton, where gpu_bundle.py has left FlashAttention's libraries out."""
    import torch
    import vllm

    there = any(Path(vllm.__file__).parent.glob("vllm_flash_attn/*.so"))
    return {"attention_backend": "TRITON_ATTN"} if torch.cuda.is_available() and not there else {}


class Engine:
    """A vLLM engine in this process, stepped by hand."""

    def __init__(self, base: Path, adapters: Path, args: argparse.Namespace):
        from vllm import LLM

        self.llm = LLM(
            str(base), dtype=args.dtype, enable_lora=True, max_loras=ADAPTERS, max_lora_rank=16, max_num_seqs=64,
            max_cpu_loras=2 * ADAPTERS, max_model_len=max(512, args.prompt + 1), enable_prefix_caching=False,
            skip_tokenizer_init=True, kv_cache_memory_bytes=512 << 20, disable_log_stats=True,
            async_scheduling=False, additional_config={"qaa_backend": args.backend}, **attention(),
        )  # fmt: skip
        self._adapters = adapters
        self._ids: dict[str, int] = {}
        self._requests = 0

    def times(self, names: list[str | None], prompt: int, steps: int) -> tuple[float, float]:
        """Seconds of the first step and the median of the others, for a batch of one request a name."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        engine = self.llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
        for name in names:
            lora = None
            if name is not None:
                number = self._ids.setdefault(name, len(self._ids) + 1)
                lora = LoRARequest(name, number, str(self._adapters / name))
            self._requests += 1
            tokens = [3 + (7 * self._requests + 13 * i) % 1000 for i in range(prompt)]
            engine.add_request(str(self._requests), {"prompt_token_ids": tokens}, parameters, lora_request=lora)
        seconds = []
        while engine.has_unfinished_requests():
            begun = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begun)
        return seconds[0], statistics.median(seconds[1:] or seconds)

    def check(self) -> None:
        """Compare what every layer adds for an adapter with the reference, and both with nothing."""
        import torch

        from qaa_serve.adapters import load_adapter
        from qaa_serve.circuits import get_backend, standardised

        self.times(["qaa0"], 8, 1)  # the last step is one row of this adapter, and what the layers know
        adapter, manager = load_adapter(self._adapters / "qaa0"), self._manager()
        expected: dict[Any, torch.Tensor] = {}
        inputs: dict[Any, torch.Tensor] = {}
        for name, weights in adapter.modules.items():
            layer, part, _ = manager.find(name)
            if layer not in expected:
                expected[layer] = torch.zeros(1, sum(layer.output_slices), dtype=torch.float64)
                inputs[layer] = torch.randn(1, layer.full_widths()[0]).to(layer.lora_b_stacked[0].dtype)
            ansatz = adapter.config.circuit(weights.qubits)
            x = standardised(inputs[layer].double(), weights.inputs)
            z = get_backend("reference")(x, weights.theta, ansatz, None).flatten(1)
            z = standardised(z, weights.readouts)
            b = weights.weight.double() * adapter.config.scale(weights.qubits)
            expected[layer][:, layer.columns()[part or 0]] = z @ b.T
        for layer, right in expected.items():
            x = inputs[layer].to(layer.device)
            found = torch.zeros_like(right, dtype=x.dtype, device=x.device)
            with torch.inference_mode():
                layer.delta.add(x, found)
            error = ((found.cpu() - right).abs().max() / right.abs().max()).item()
            if not error <= TOLERANCE:
                raise SystemExit(f"{layer.qaa_name} is off by {error:.1e} of its largest: nothing is measured")

    def _loader(self) -> Any:
        """What loads adapters in the worker, which is in this process."""
        executor: Any = self.llm.llm_engine.model_executor
        return executor.driver_worker.worker.model_runner.lora_manager

    def _manager(self) -> Any:
        """The manager of the adapters in the worker."""
        return self._loader()._adapter_manager

    def load_ms(self, runs: int) -> dict[str, dict[str, float]]:
        """Median milliseconds by kind to read an adapter, and to put one that was read into a slot."""
        import torch
        from vllm.lora.request import LoRARequest

        loader, manager = self._loader(), self._manager()
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        medians: dict[str, dict[str, float]] = {"read": {}, "slot": {}}
        for kind, name in (("LoRA", "lora0"), ("QAA", "qaa0")):
            if name not in self._ids:
                continue
            request = LoRARequest("read", ADAPTERS * 10, str(self._adapters / name))
            for step, what, call in (
                ("read", "read beside the steps", partial(loader._load_adapter, request)),
                ("slot", "into a slot", partial(manager.activate_adapter, self._ids[name])),
            ):
                seconds = []
                for _ in range(runs):
                    manager.deactivate_adapter(self._ids[name])
                    wait()
                    begun = time.perf_counter()
                    call()
                    wait()
                    seconds.append(time.perf_counter() - begun)
                medians[step][kind] = 1e3 * statistics.median(seconds)
                print(f"{what:24} {kind:5} {medians[step][kind]:8.2f} ms", flush=True)
        return medians


def batches(stock: bool, sizes: list[int]) -> dict[str, dict[str, list[str | None]]]:
    """What is timed: situation -> kind -> the adapter of each request."""
    qaa, lora = [f"qaa{i}" for i in range(ADAPTERS)], [f"lora{i}" for i in range(ADAPTERS)]
    situations: dict[str, dict[str, list[str | None]]] = {
        **{f"decode {n}": {"base": [None] * n, "LoRA": lora[:1] * n, "QAA": qaa[:1] * n} for n in sizes},
        "decode 16, 16 adapters": {"base": [None] * 16, "LoRA": [*lora], "QAA": [*qaa]},
        "decode 16, mixed": {"base": [None] * 16, "QAA": [None] * 4 + lora[:4] + qaa[:8]},
        "prefill": {"base": [None], "LoRA": lora[:1], "QAA": qaa[:1]},
    }
    if stock:
        situations.pop("decode 16, mixed")
        for kinds in situations.values():
            kinds.pop("QAA")
    return situations


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """situation -> kind -> milliseconds, ratio to the base and its spread over the runs."""
    results: dict[str, dict[str, Any]] = {}
    for situation, kinds in batches(args.stock, args.batches).items():
        prefill = situation == "prefill"

        def once(names: list[str | None], prefill: bool = prefill) -> float:
            prompt, steps = (args.prompt, 0) if prefill else (8, args.steps)
            return engine.times(names, prompt, steps)[0 if prefill else 1]

        for names in kinds.values():
            once(names)
        if not args.stock and not results:
            engine.check()
        runs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.runs * (4 if situation == "decode 1" else 1)):
            for kind, names in kinds.items():
                runs[kind].append(min(once(names) for _ in range(3)) if prefill else once(names))
        results[situation] = {}
        for kind, seconds in runs.items():
            ratios = [a / b for a, b in zip(seconds, runs["base"], strict=True)]
            results[situation][kind] = {
                "ms": 1e3 * statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
            }
            ms, ratio = (results[situation][kind][name] for name in ("ms", "ratio"))
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{situation:24} {kind:5} {ms:8.2f} ms   {ratio:5.2f} times the base   {spread}", flush=True)
    return results


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of the ratios to the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for offset, (kind, colour) in enumerate({"LoRA": "tab:gray", "QAA": "tab:blue"}.items()):
        shown = [(i, row[kind]) for i, row in enumerate(results.values()) if kind in row]
        places, values = [i + 0.36 * offset for i, _ in shown], [v["ratio"] for _, v in shown]
        spread = [
            [v["ratio"] - v["ratio_least"] for _, v in shown],
            [v["ratio_most"] - v["ratio"] for _, v in shown],
        ]
        axes.bar(places, values, 0.34, yerr=spread, label=f"{kind}", color=colour, capsize=3)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([i + 0.18 for i in range(len(results))], list(results))
    axes.set_ylabel("step time, times the base's")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    # Engine and worker in this process, stepped from here.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core is left to the server that stands before an engine
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if args.stock:
        os.environ["VLLM_PLUGINS"] = "none"
    import torch
    import vllm

    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        base = make_base(Path(temporary) / "base", args)
        make_adapters(Path(temporary) / "adapters", base)
        engine = Engine(base, Path(temporary) / "adapters", args)
        about = {
            "command": shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else hardware(),
            "threads": torch.get_num_threads(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }
        if not args.stock:
            from vllm_qaa.timing import TIMER

            about["backend"] = TIMER.backend
        print(json.dumps(about, indent=2))
        results = measure(engine, args)
        load_ms = engine.load_ms(max(args.runs, 3))
    if args.json:
        args.json.write_text(json.dumps({"about": about, "results": results, "load_ms": load_ms}, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


def hardware() -> str:
    """The processor's name and how many of them."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    main()
