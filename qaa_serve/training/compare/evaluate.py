"""Has one model answer the test set: ``python -m qaa_serve.training.compare.evaluate JOB.json``."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from qaa_serve.training.answers import generate, text_of_answer
from qaa_serve.training.compare.files import write_json
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.loss import row_losses
from qaa_serve.training.trained import load_trained

#: Of an evaluation's record; raised when it changes, so that an older one is made anew.
EVALUATION_FORMAT = 2


def main(job_file: Path) -> int:
    """Evaluate a model and write what came out.

    Args:
        job_file: an object with ``model`` (the base), ``directory`` (of what was trained on it; None: nothing),
            ``test`` (a file as ``rows.as_test_set`` has it), ``batch_size``, ``max_new_tokens``, ``bf16``,
            ``threads``, ``trust_remote_code``, ``output`` (the result's file) and ``digest``.

    The result has ``format``, ``digest``, ``loss`` (nats a token), ``tokens``, ``prompt_nats`` and
    ``prompt_tokens`` (sums by prompt), ``texts`` (one a prompt), ``generated_tokens`` and ``seconds``.

    Raises:
        TrainingError: if the model cannot be loaded, or its loss is no number.
    """
    job = json.loads(job_file.read_bytes())
    test = json.loads(Path(job["test"]).read_bytes())
    logging.disable_progress_bar()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    model, tokenizer = load_trained(
        Path(job["directory"] or job["model"]),
        job["model"],
        dtype=torch.bfloat16 if job["bf16"] else torch.float32,
        trust_remote_code=job["trust_remote_code"],
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts, batch = [prompt["ids"] for prompt in test["prompts"]], job["batch_size"]
    losses = torch.zeros(len(prompts), 2, dtype=torch.float64)
    losses.index_add_(
        0, torch.tensor([row["prompt"] for row in test["rows"]]), row_losses(model, test["rows"], batch)
    )
    nats, tokens = losses.sum(0).tolist()
    loss = nats / tokens
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on the test set is {loss}")
    answers: dict[int, list[int]] = {}
    for place, answer in generate(
        model, tokenizer, prompts, batch_size=batch, max_new_tokens=job["max_new_tokens"]
    ):
        answers[place] = answer
        if len(answers) % batch == 0:
            print(f"{len(answers)} of {len(prompts)} prompts", flush=True)
    result = {
        "format": EVALUATION_FORMAT,
        "digest": job["digest"],
        "loss": loss,
        "tokens": int(tokens),
        "prompt_nats": losses[:, 0].tolist(),
        "prompt_tokens": losses[:, 1].int().tolist(),
        "texts": [text_of_answer(tokenizer, answers[place]) for place in range(len(prompts))],
        "generated_tokens": sum(map(len, answers.values())),
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(job["output"]), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
