"""What our metrics cost: processor time in the server's event loop for a token and for a request.

    python benchmarks/metrics_cost.py --tokens-per-second 200

Calls what the engine's wrapper calls for each output, with outputs as vLLM makes them, and says which share of a
second that is at a given rate. It is a bound for the loss of throughput: the work is done in the server's process,
beside the worker's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from vllm.v1.metrics import buckets

from qaa_serve.server.metrics import ServerMetrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-second", type=float, default=200, help="rate that the share is told for")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of one request")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    metrics = ServerMetrics(
        CollectorRegistry(),
        latency_buckets=buckets.REQUEST_LATENCY_BUCKETS,
        first_token_buckets=buckets.TIME_TO_FIRST_TOKEN_BUCKETS,
        inter_token_buckets=buckets.INTER_TOKEN_LATENCY_BUCKETS,
    )
    outputs = [
        SimpleNamespace(
            outputs=[SimpleNamespace(index=0, token_ids=[7])], finished=i == args.tokens - 1,
            prompt_token_ids=[0] * 32, num_cached_tokens=0, metrics=None,
        )
        for i in range(args.tokens)
    ]  # fmt: skip
    per_request, per_token = [], []
    for i in range(args.rounds):
        begun = time.perf_counter()
        observation = metrics.begin(f"adapter-{i % 300}", "/v1/chat/completions")
        observation.has_turn()
        sequence = observation.sequence()
        between = time.perf_counter()
        for output in outputs:
            sequence.saw(output)
        after = time.perf_counter()
        observation.end("success")
        per_token.append((after - between) / args.tokens)
        per_request.append(time.perf_counter() - begun - (after - between))
    token, request = statistics.median(per_token), statistics.median(per_request)
    share = args.tokens_per_second * (token + request / args.tokens)
    print(f"{1e6 * token:.1f} us a token, {1e6 * request:.0f} us a request (median of {args.rounds})")
    print(f"{100 * share:.2f} % of a second at {args.tokens_per_second:g} tokens/s in requests of {args.tokens}")


if __name__ == "__main__":
    main()
