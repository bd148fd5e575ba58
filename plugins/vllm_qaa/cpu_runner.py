"""vLLM's model runner for CPUs, in which requests with a seed may have prompts of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class SeededCPUModelRunner(CPUModelRunner):
    """As vLLM's, but a request draws no number from its seed before its prompt is through.

    vLLM samples for every request of a step. Where only a part of the prompt has run, it throws the token away and
    sets the request's generator back by what a GPU has drawn; a CPU's cannot be set back, and the engine ends.
    """

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's; tokens that are thrown away come from the generator that requests without a seed share."""
        generators = self.input_batch.generators
        unfinished = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        kept = {index: generators.pop(index) for index in unfinished.tolist() if index in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(kept)
