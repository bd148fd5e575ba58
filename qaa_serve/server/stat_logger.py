"""vLLM's own metrics, without the one that would grow for ever."""

from __future__ import annotations

from prometheus_client import REGISTRY, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger


class StatLogger(PrometheusStatLogger):
    """vLLM's, but for vllm:lora_requests_info.

    vLLM makes a series of each combination of adapters that ever ran together, keeps them all, and has revisions
    in them. StateCollector has the one that is so now, with the adapters' public names.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None):
        self.gauge_lora_info: Gauge | None
        super().__init__(vllm_config, engine_indexes)
        if self.gauge_lora_info is not None:
            REGISTRY.unregister(self.gauge_lora_info)
            self.gauge_lora_info = None  # what is not there is not fed
