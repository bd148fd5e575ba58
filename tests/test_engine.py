"""What the engine refuses before vLLM's sees it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from qaa_serve.server.engine import AdapterEngine


def test_log_probabilities_of_certain_tokens_are_refused_while_speculating():
    """In a step with another request for logprobs, vLLM 0.32's rejection sampler ends the engine."""
    engine = SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=object()))
    parameters = SamplingParams(logprobs=1, logprob_token_ids=[5])
    with pytest.raises(VLLMValidationError, match="leave out logprob_token_ids"):
        asyncio.run(anext(AdapterEngine.generate(engine, "Hello", parameters, "request")))
