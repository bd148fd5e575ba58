"""Has one model answer the test set: ``python -m qaa_serve.training.compare.evaluate JOB.json``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

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
        "texts": [
            tokenizer.decode(answers[place], skip_special_tokens=True).strip() for place in range(len(prompts))
        ],
        "generated_tokens": sum(map(len, answers.values())),
        "seconds": time.perf_counter() - started,
    }
    write_json(Path(job["output"]), result)
    return 0


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts greedily, in batches padded on the left, the longest prompts first.

    Args:
        model: a causal language model; its device is used.
        tokenizer: names the end token; the model's own end tokens end an answer too, as when it is served.
        prompts: token ids.
        batch_size: prompts at once.
        max_new_tokens: after which an answer is cut.

    Yields:
        A prompt's place in ``prompts`` and the tokens of its answer, without the end token.
    """
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,  # what is padded is masked or cut off; a tokenizer's own may have no embedding
    )
    # The model's own settings (temperature, repetition penalty, ...) would come back for what is not set here.
    for owner in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
        owner.generation_config = config
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        longest = len(prompts[places[0]])
        gaps = [longest - len(prompts[place]) for place in places]
        ids = torch.tensor([[0] * gap + prompts[place] for gap, place in zip(gaps, places, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
        for place, answer in zip(places, out[:, longest:].tolist(), strict=True):
            end = next((position for position, token in enumerate(answer) if token in ends), len(answer))
            yield place, answer[:end]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
