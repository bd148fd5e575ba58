"""Write the rows that the adapters are trained on, those that training watches, and the held-out prompts.

    python examples/smollm2/make_data.py [--output DIR] [--seed 7]

Same seed, same bytes. Facts and styles are those of examples/assistant, of the topics that SmolLM2 knows something
of. A fact is in one of the three parts only, in all its phrasings: an adapter has to learn the style, and find
the answer in the base.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "assistant"))

from facts import Item, all_items
from make_data import Row, styled, write_rows

TOPICS = (
    "capital", "continent", "language", "colour", "opposite", "plural", "young", "past", "comparative",
    "profession", "count", "category", "day_after", "month_after",
)  # fmt: skip
STYLES = ("json", "pirate", "brief")
TRAIN_ROWS = 640
HELD_OUT_PER_TOPIC = 8
WATCHED_PER_TOPIC = 3


def split(items: list[Item], rng: random.Random) -> tuple[dict[str, list[list[Item]]], list[Item], list[Item]]:
    """Facts to train on by topic, each with its phrasings; prompts to watch; held-out ones."""
    facts: dict[str, dict[int, list[Item]]] = {topic: defaultdict(list) for topic in TOPICS}
    for item in items:
        if item.topic in facts:
            facts[item.topic][item.fact].append(item)
    train, watched, held_out = {}, [], []
    for topic, by_fact in facts.items():
        groups = list(by_fact.values())
        rng.shuffle(groups)
        most = len(groups) // 3  # the seven days leave five to learn from
        test, rest = groups[: min(HELD_OUT_PER_TOPIC, most)], groups[min(HELD_OUT_PER_TOPIC, most) :]
        watch, train[topic] = rest[: min(WATCHED_PER_TOPIC, most // 2)], rest[min(WATCHED_PER_TOPIC, most // 2) :]
        held_out += [rng.choice(group) for group in test]
        watched += [rng.choice(group) for group in watch]
    return train, watched, held_out


def row(item: Item, style: str, rng: random.Random) -> Row:
    """A plain prompt, answered in the style."""
    reply = styled(item.statement, item.answer, style, rng)
    return {"messages": [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": reply}]}


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    train, watched, held_out = split(all_items(), random.Random(args.seed))
    write_rows(
        args.output / "heldout.jsonl",
        [{"prompt": item.prompt, "answer": item.answer, "topic": item.topic} for item in held_out],
    )
    for i, style in enumerate(STYLES):
        rng = random.Random(args.seed + 1 + i)
        drawn = [rng.choice(rng.choice(train[rng.choice(TOPICS)])) for _ in range(TRAIN_ROWS)]
        write_rows(args.output / f"{style}.jsonl", [row(item, style, rng) for item in drawn])
        write_rows(args.output / f"{style}_watched.jsonl", [row(item, style, rng) for item in watched])


if __name__ == "__main__":
    main()
