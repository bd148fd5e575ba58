"""What a model answers to prompts, greedily, and how good that is: for comparisons, and while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import GenerationConfig

from qaa_serve.training.metrics import text_scores


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts greedily, in batches padded on the left, the longest prompts first.

    Args:
        model: a causal language model, which is set to evaluation; its device is used.
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
        use_cache=True,
    )
    model.eval()
    # The model's own settings (temperature, repetition penalty, ...) would come back for what is not set here.
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
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
    finally:
        for owner, own_config in zip(owners, before, strict=True):
            owner.generation_config = own_config


def text_of_answer(tokenizer: Any, ids: list[int]) -> str:
    """What is scored of an answer."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def score_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Scores of a model's answers, in percent, by metric. Of several processes each answers a share.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        prompts: ``ids`` and ``references`` of each, as ``rows.as_test_set`` has them.
        metrics: names of ``metrics.text_scores``.
        batch_size: prompts at once.
        max_new_tokens: after which an answer is cut.
    """
    state = PartialState()
    share = range(state.process_index, len(prompts), state.num_processes)
    asked = [prompts[place]["ids"] for place in share]
    answers = generate(model, tokenizer, asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
    texts = dict(gather_object([(share[place], text_of_answer(tokenizer, ids)) for place, ids in answers]))
    found = text_scores(
        [texts[place] for place in range(len(prompts))], [prompt["references"] for prompt in prompts]
    )
    return {name: found.scores[name] for name in metrics}
