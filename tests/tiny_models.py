"""Tiny random models and adapters, and the slow, plain way to run them: transformers with reference circuits."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen2Config

from qaa_serve.adapters import (
    Adapter,
    AdapterConfig,
    ModuleWeights,
    linear_widths,
    load_adapter,
    matches,
    save_adapter,
)
from qaa_serve.circuits import get_backend

VOCAB = 160

#: Widths are not powers of two, heads are grouped, Qwen2 has biases on q, k, v, OPT on everything; OPT's
#: modules are called otherwise, and its weights are renamed on their way into vLLM.
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, vocab_size=VOCAB, max_position_embeddings=256, tie_word_embeddings=False,
    ),
    "qwen2": lambda: Qwen2Config(
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, max_position_embeddings=256, tie_word_embeddings=True,
    ),
    "opt": lambda: OPTConfig(
        hidden_size=64, ffn_dim=100, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB,
        max_position_embeddings=256, word_embed_proj_dim=64,
    ),
}  # fmt: skip

ATTENTION = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
MLP = {
    "llama": ("gate_proj", "up_proj", "down_proj"),
    "qwen2": ("gate_proj", "up_proj", "down_proj"),
    "opt": ("fc1", "fc2"),
}


def make_model(directory: Path, architecture: str, seed: int = 0, **sizes: int) -> Path:
    """Save a random float32 model with a word-level tokenizer (token "t7" has id 7), with other sizes if given."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.update(sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Large weights keep logits apart, so that rounding cannot change which is the largest.
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.35 if "embed" not in name else 0.5)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    model.save_pretrained(directory)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(models.WordLevel(special | {f"t{i}": i for i in range(3, VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} t3{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return directory


def make_qaa(
    directory: Path,
    base: Path,
    targets: tuple[str, ...],
    seed: int,
    size: float = 1.0,
    weight_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Adapter:
    """Save a random QAA adapter whose update is large enough to change most tokens."""
    generator = torch.Generator().manual_seed(seed)
    settings = AdapterConfig(base_model_name_or_path=str(base), target_modules=targets, alpha=4.0, **config)
    modules = {}
    for name, (d_in, d_out) in linear_widths(base).items():
        if matches(name, settings.target_modules):
            n = settings.qubits(d_in)
            theta = torch.randn(settings.heads, *settings.circuit(n).theta_shape, generator=generator) * 2
            b = torch.randn(d_out, settings.rank(n), generator=generator).mul(size).to(weight_dtype)
            modules[name] = ModuleWeights(
                theta,
                (b[:, 0].float(), b[0].float() / size) if settings.vectors else b,
                # Modules that read one input have one parent.
                _standard(f"{name.rpartition('.')[0]} {d_in}", d_in) if settings.inputs != "raw" else None,
                _standard(name, settings.rank(n)) if settings.whitened else None,
            )
    save_adapter(directory, settings, modules, overwrite=True)
    return load_adapter(directory, linear_widths(base))


def _standard(name: str, numbers: int) -> torch.Tensor:
    """Random offsets and scales, (2, numbers), the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.stack(
        [torch.randn(numbers, generator=generator) / 2, torch.rand(numbers, generator=generator) + 0.5]
    )


def make_lora(directory: Path, base: Path, targets: tuple[str, ...], seed: int, rank: int = 4) -> Path:
    """Save a random LoRA adapter with PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    peft_model.save_pretrained(directory)
    return directory


class ReferenceModel:
    """A transformers model on which one adapter at a time can be put."""

    def __init__(self, base: Path):
        self.base = base
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._lora: dict[Path, Any] = {}

    @contextmanager
    def wearing(self, adapter: Adapter | Path | None) -> Iterator[Any]:
        """Yield the model with a QAA adapter, a LoRA directory or nothing applied."""
        if isinstance(adapter, Path):
            if adapter not in self._lora:
                from peft import PeftModel

                plain = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
                self._lora[adapter] = PeftModel.from_pretrained(plain, adapter).eval()
            yield self._lora[adapter]
            return
        hooks = []
        if adapter is not None:
            modules = dict(self.model.named_modules())
            for name, weights in adapter.modules.items():
                hooks.append(modules[name].register_forward_hook(_qaa_hook(adapter.config, weights)))
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def logprobs(self, adapter: Adapter | Path | None, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities of the next token after every prefix: (len(tokens), vocabulary) float32."""
        with self.wearing(adapter) as model:
            logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def greedy(self, adapter: Adapter | Path | None, tokens: list[int], count: int) -> list[int]:
        """The likeliest token behind those given, and so on, with the keys and values of those before kept."""
        found: list[int] = []
        kept = None
        with self.wearing(adapter) as model:
            for _ in range(count):
                answer = model(torch.tensor([found[-1:] or tokens]), past_key_values=kept, use_cache=True)
                kept = answer.past_key_values
                found.append(int(answer.logits[0, -1].argmax()))
        return found


def _qaa_hook(config: AdapterConfig, weights: ModuleWeights) -> Any:
    circuit = config.circuit(weights.qubits)
    scale = config.scale(weights.qubits)
    expectation_values = get_backend("reference")

    def add_delta(_module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        if weights.inputs is not None:
            x = (x - weights.inputs[0]) * weights.inputs[1]
        z = expectation_values(x, weights.theta, circuit, None).flatten(1)  # (tokens, heads * n)
        if weights.readouts is not None:
            z = (z - weights.readouts[0]) * weights.readouts[1]
        return output + (scale * z @ weights.weight.double().T).reshape(output.shape).to(output.dtype)

    return add_delta
