"""Has models answer the test set: one process for all that are to be evaluated, one after the other.

``python -m qaa_serve.training.compare.evaluate JOB.json``. What comes out of a model lies in its own file when
the process goes on to the next one, so that a process that dies takes one model's result with it and no more.
"""

from __future__ import annotations

import gc
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
    """Evaluate the models of a job.

    Args:
        job_file: an object with ``model``, ``test`` (a file as ``rows.as_test_set`` has it), ``batch_size``,
            ``max_new_tokens``, ``bf16``, ``threads``, ``trust_remote_code``, and ``models``: a list of ``name``,
            ``directory`` (None: the base), ``output`` (the result's file), ``failure`` (the file of the reason
            if there is no result) and ``digest``.
    """
    job = json.loads(job_file.read_bytes())
    test = json.loads(Path(job["test"]).read_bytes())
    logging.disable_progress_bar()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    for number, model in enumerate(job["models"], start=1):
        title = f"evaluating {model['name']} ({number} of {len(job['models'])})"
        print(title, flush=True)
        try:
            result = _evaluate(job, model["directory"], test, title)
        except Exception as error:  # one model's trouble is not the others'
            print(f"{title}: {type(error).__name__}: {error}", flush=True)
            write_json(Path(model["failure"]), {"reason": f"{type(error).__name__}: {error}"})
        else:
            write_json(Path(model["output"]), {"format": EVALUATION_FORMAT, "digest": model["digest"], **result})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _evaluate(job: dict[str, Any], directory: str | None, test: dict[str, Any], title: str) -> dict[str, Any]:
    started = time.perf_counter()
    model, tokenizer = load_trained(
        Path(directory or job["model"]),
        job["model"],
        dtype=torch.bfloat16 if job["bf16"] else torch.float32,
        trust_remote_code=job["trust_remote_code"],
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    losses = torch.zeros(len(test["prompts"]), 2, dtype=torch.float64)
    of_rows = row_losses(model, test["rows"], job["batch_size"])
    losses.index_add_(0, torch.tensor([row["prompt"] for row in test["rows"]]), of_rows)
    nats, tokens = losses.sum(0).tolist()
    loss = nats / tokens
    if not math.isfinite(loss):
        raise TrainingError(f"the loss on the test set is {loss}")
    texts: list[str] = [""] * len(test["prompts"])
    lengths = 0
    for done, (place, answer) in enumerate(
        generate(
            model,
            tokenizer,
            [prompt["ids"] for prompt in test["prompts"]],
            batch_size=job["batch_size"],
            max_new_tokens=job["max_new_tokens"],
        ),
        start=1,
    ):
        texts[place] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        lengths += len(answer)
        if done % job["batch_size"] == 0:
            print(f"{title}: {done} of {len(texts)} prompts", flush=True)
    return {
        "loss": loss,
        "tokens": int(tokens),
        "prompt_nats": losses[:, 0].tolist(),
        "prompt_tokens": losses[:, 1].int().tolist(),
        "texts": texts,
        "generated_tokens": lengths,
        "seconds": time.perf_counter() - started,
    }


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
