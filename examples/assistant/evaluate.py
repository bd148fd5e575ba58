"""Ask a running server the held-out prompts, as the base and as every adapter, and score the answers.

    python examples/assistant/evaluate.py --base-url http://127.0.0.1:8000/v1 [--data FILE] [--output scores.json]

A model named json, pirate or brief, or so with a dash behind it, is held to that style; any other to a plain
sentence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import AsyncOpenAI
from scoring import is_correct, is_named, keeps_behaviour

HERE = Path(__file__).parent
STYLES = ("json", "pirate", "brief")


@dataclass
class Score:
    """What one model did on the held-out prompts."""

    model: str
    style: str
    prompts: int
    behaviour: float
    correct: float
    named: float
    wrong: list[dict[str, str]]


def score(model: str, style: str, rows: Sequence[dict[str, str]], answers: Sequence[str]) -> Score:
    """Score one model's answers."""
    kept = sum(keeps_behaviour(answer, style) for answer in answers)
    wrong = [
        {**row, "answered": answer}
        for row, answer in zip(rows, answers, strict=True)
        if not is_correct(answer, row["answer"], style)
    ]
    named = sum(is_named(answer, row["answer"]) for row, answer in zip(rows, answers, strict=True))
    return Score(model, style, len(rows), kept / len(rows), 1 - len(wrong) / len(rows), named / len(rows), wrong)


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown."""
    lines = ["| model | style | behaviour kept | answers right | answer named |", "|---|---|---:|---:|---:|"]
    lines += [f"| {s.model} | {s.style} | {s.behaviour:.1%} | {s.correct:.1%} | {s.named:.1%} |" for s in scores]
    return "\n".join(lines)


async def ask_all(
    client: AsyncOpenAI, model: str, rows: Sequence[dict[str, str]], instruction: str, limit: asyncio.Semaphore
) -> list[str]:
    """The model's greedy answers to all prompts, in their order, each with the instruction behind it."""

    async def ask(prompt: str) -> str:
        async with limit:
            asked = [{"role": "user", "content": f"{prompt} {instruction}".strip()}]
            reply = await client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=48)
        return reply.choices[0].message.content or ""

    return await asyncio.gather(*(ask(row["prompt"]) for row in rows))


async def evaluate(args: argparse.Namespace) -> list[Score]:
    """Ask every model; all of them at once, so that the server mixes adapters in its batches."""
    with args.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    limit = asyncio.Semaphore(args.concurrency)
    async with AsyncOpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        models = args.models or [model.id async for model in client.models.list()]
        answers = await asyncio.gather(
            *(ask_all(client, model, rows, args.instruction, limit) for model in models)
        )
    styles = [args.style or model.partition("-")[0] for model in models]
    return [
        score(model, style if style in STYLES else "plain", rows, said)
        for model, style, said in zip(models, styles, answers, strict=True)
    ]


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: all that the server has")
    parser.add_argument("--instruction", default="", help="goes behind every prompt, such as 'Answer in JSON.'")
    parser.add_argument("--style", choices=STYLES, help="hold all models to this one")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--output", type=Path, help="write scores and wrong answers here as JSON")
    args = parser.parse_args()
    scores = asyncio.run(evaluate(args))
    print(table(scores))
    if args.output:
        args.output.write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
