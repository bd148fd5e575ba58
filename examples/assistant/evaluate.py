"""Ask a running server the held-out prompts, as the base and as every adapter, and score the answers.

    python examples/assistant/evaluate.py --base-url http://127.0.0.1:8000/v1 [--output scores.json]

The base is served as `assistant`, the adapters under the names of their directories.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import AsyncOpenAI
from scoring import is_correct, keeps_behaviour

HERE = Path(__file__).parent
STYLES = {"assistant": "plain", "json": "json", "pirate": "pirate", "brief": "brief", "brief-lora": "brief"}


@dataclass
class Score:
    """What one model did on the held-out prompts."""

    model: str
    style: str
    prompts: int
    behaviour: float
    correct: float
    wrong: list[dict[str, str]]


def score(model: str, style: str, rows: Sequence[dict[str, str]], answers: Sequence[str]) -> Score:
    """Score one model's answers."""
    kept = sum(keeps_behaviour(answer, style) for answer in answers)
    wrong = [
        {**row, "answered": answer}
        for row, answer in zip(rows, answers, strict=True)
        if not is_correct(answer, row["answer"], style)
    ]
    return Score(model, style, len(rows), kept / len(rows), 1 - len(wrong) / len(rows), wrong)


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown."""
    lines = ["| model | style | behaviour kept | answers right |", "|---|---|---:|---:|"]
    lines += [f"| {s.model} | {s.style} | {s.behaviour:.1%} | {s.correct:.1%} |" for s in scores]
    return "\n".join(lines)


async def ask_all(
    client: AsyncOpenAI, model: str, rows: Sequence[dict[str, str]], limit: asyncio.Semaphore
) -> list[str]:
    """The model's greedy answers to all prompts, in their order."""

    async def ask(prompt: str) -> str:
        async with limit:
            reply = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=48
            )
        return reply.choices[0].message.content or ""

    return await asyncio.gather(*(ask(row["prompt"]) for row in rows))


async def evaluate(args: argparse.Namespace) -> list[Score]:
    """Ask every model; all of them at once, so that the server mixes adapters in its batches."""
    with args.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    limit = asyncio.Semaphore(args.concurrency)
    async with AsyncOpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        answers = await asyncio.gather(*(ask_all(client, model, rows, limit) for model in args.models))
    return [score(model, STYLES[model], rows, said) for model, said in zip(args.models, answers, strict=True)]


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--models", nargs="+", choices=STYLES, default=list(STYLES), metavar="MODEL")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--output", type=Path, help="write scores and wrong answers here as JSON")
    args = parser.parse_args()
    scores = asyncio.run(evaluate(args))
    print(table(scores))
    if args.output:
        args.output.write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
