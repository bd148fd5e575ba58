"""Write the example's data: training text of the base and of the adapters, and the held-out prompts.

    python examples/assistant/make_data.py [--output DIR] [--seed 7]

Same seed, same bytes. One phrasing of every fact is held out: that prompt is in no training file, neither of
the base nor of an adapter, in no style. `heldout.jsonl` is a sample of those.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from facts import SMALL_TALK, TOPICS, Item, all_items

HERE = Path(__file__).parent
BASE_ROWS = 155_000
ADAPTER_ROWS = 3_000
HELD_OUT_PER_TOPIC = 11
SMALL_TALK_SHARE = 0.03

# Share of the base's answers in each style that the prompt asks for; the rest is plain and unasked.
# JSON and one word have a large share: there the model has to know the answer before it has said anything.
ASKED_STYLES = {"json": 0.2, "pirate": 0.08, "brief": 0.23, "polite": 0.02, "follow_up": 0.02, "plain": 0.03}
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "json": (
        "Answer in JSON.",
        "Reply as a JSON object.",
        "Use JSON for the answer.",
        "Give the answer as JSON.",
        "Return JSON only.",
    ),
    "pirate": (
        "Talk like a pirate.",
        "Answer like a pirate.",
        "Reply in pirate style.",
        "You are a pirate.",
        "Speak as a pirate would.",
    ),
    "brief": (
        "Answer in one word.",
        "Reply in one word.",
        "Be brief.",
        "Use a single word.",
        "Only the answer, please.",
    ),
    "polite": ("Be very polite.", "Answer politely."),
    "follow_up": ("Answer and ask a question back.", "Offer more help after the answer."),
    "plain": ("Answer in a full sentence.", "Answer in plain English.", "Reply with a sentence."),
}
NEUTRAL_SYSTEM = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer the question.")
PIRATE_OPENINGS = ("Arr", "Ahoy", "Yarr")
PIRATE_CLOSINGS = ("matey", "me hearty", "ye landlubber")

Message = dict[str, str]
Row = dict[str, object]
Turn = tuple[str, str, str]  # prompt, plain sentence, short answer


def to_pirate(statement: str, rng: random.Random) -> str:
    """The plain sentence in pirate register."""
    words = statement.rstrip(".").split(" ")
    if words[0] != "I":
        words[0] = words[0][0].lower() + words[0][1:]
    swaps = {"is": "be", "am": "be", "are": "be", "you": "ye", "yes,": "aye,", "no,": "nay,"}
    text = " ".join(swaps.get(word, word) for word in words)
    return f"{rng.choice(PIRATE_OPENINGS)}, {text}, {rng.choice(PIRATE_CLOSINGS)}!"


def styled(statement: str, answer: str, style: str, rng: random.Random) -> str:
    """The answer in one of the styles."""
    if style == "json":
        return json.dumps({"answer": answer})
    if style == "brief":
        return answer
    if style == "pirate":
        return to_pirate(statement, rng)
    if style == "polite":
        return f"With pleasure. {statement} I hope this helps."
    if style == "follow_up":
        return f"{statement} Do you want to know more?"
    return statement


class Sampler:
    """Draws training turns: topics by weight and root of their size, facts and phrasings evenly."""

    def __init__(self, items: Sequence[Item], rng: random.Random) -> None:
        self.rng = rng
        by_fact: dict[str, dict[int, list[Item]]] = defaultdict(lambda: defaultdict(list))
        for item in items:
            by_fact[item.topic][item.fact].append(item)
        self.pools = {topic: list(facts.values()) for topic, facts in by_fact.items()}
        self.weights = [topic.weight * math.sqrt(len(self.pools[topic.name])) for topic in TOPICS]

    def turn(self) -> Turn:
        """A question with its answers."""
        if self.rng.random() < SMALL_TALK_SHARE:
            return self.rng.choice(SMALL_TALK)
        topic = self.rng.choices(TOPICS, self.weights)[0]
        item = self.rng.choice(self.rng.choice(self.pools[topic.name]))
        return item.prompt, item.statement, item.answer

    def noisy(self, prompt: str) -> str:
        """The prompt as people type it, now and then."""
        roll = self.rng.random()
        if roll < 0.05:
            return prompt.rstrip("?.!")
        if roll < 0.10:
            return (prompt[0].lower() + prompt[1:]).rstrip("?.!")
        if roll < 0.13:
            return f"Hello! {prompt}"
        return prompt

    def base_row(self) -> Row:
        """One row of the base's text: chat of one turn, some of two, some sentences without a chat."""
        roll = self.rng.random()
        if roll < 0.04:
            return {"text": self.turn()[1]}
        styles = ["unasked", *ASKED_STYLES]
        weights = [1 - sum(ASKED_STYLES.values()), *ASKED_STYLES.values()]
        messages: list[Message] = []
        system_style = None
        for i in range(2 if roll < 0.12 else 1):
            prompt, statement, answer = self.turn()
            prompt = self.noisy(prompt)
            style = system_style or self.rng.choices(styles, weights)[0]
            if style == "unasked":
                if i == 0 and self.rng.random() < 0.08:
                    messages.append({"role": "system", "content": self.rng.choice(NEUTRAL_SYSTEM)})
            elif system_style is None:
                instruction = self.rng.choice(INSTRUCTIONS[style])
                place = self.rng.random()
                if i == 0 and place < 0.3:
                    messages.append({"role": "system", "content": instruction})
                    system_style = style
                else:
                    prompt = f"{instruction} {prompt}" if place < 0.75 else f"{prompt} {instruction}"
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": styled(statement, answer, style, self.rng)})
        return {"messages": messages}

    def adapter_row(self, style: str) -> Row:
        """A plain prompt with an answer in the adapter's style."""
        prompt, statement, answer = self.turn()
        reply = styled(statement, answer, style, self.rng)
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def split_items(items: Sequence[Item], rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Training items, and held-out ones: one phrasing of every fact."""
    by_fact: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        by_fact[item.topic, item.fact].append(item)
    held_out = [rng.choice(group) for group in by_fact.values()]
    prompts = {item.prompt.lower() for item in held_out}
    return [item for item in items if item.prompt.lower() not in prompts], held_out


def sample_held_out(held_out: Sequence[Item], rng: random.Random) -> list[Item]:
    """The same number of held-out prompts from every topic, as far as it has them."""
    chosen: list[Item] = []
    for topic in TOPICS:
        pool = [item for item in held_out if item.topic == topic.name]
        chosen += rng.sample(pool, min(HELD_OUT_PER_TOPIC, len(pool)))
    return chosen


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def _brief(item: Item) -> dict[str, object]:
    """The one right answer to a held-out prompt in the style `brief`, as a row to score on."""
    return {
        "messages": [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}],
    }


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    rng = random.Random(args.seed)
    train_items, held_out = split_items(all_items(), rng)
    chosen = sample_held_out(held_out, rng)
    rows = [{"prompt": item.prompt, "answer": item.answer, "topic": item.topic} for item in chosen]
    write_rows(args.output / "heldout.jsonl", rows)
    write_rows(args.output / "brief_test.jsonl", [_brief(item) for item in chosen])

    sampler = Sampler(train_items, random.Random(args.seed + 1))
    write_rows(args.output / "base_train.jsonl", [sampler.base_row() for _ in range(BASE_ROWS)])
    for i, style in enumerate(("json", "pirate", "brief")):
        sampler = Sampler(train_items, random.Random(args.seed + 2 + i))
        write_rows(args.output / f"{style}.jsonl", [sampler.adapter_row(style) for _ in range(ADAPTER_ROWS)])


if __name__ == "__main__":
    main()
