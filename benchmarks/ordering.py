"""What `order: prefix` and `dedupe` save: shared prefixes that do not fit the prefix cache; identical requests."""

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Figure, Report, alternate, held, ratio, say, seconds_of
from benchmarks.engines import DemoServer, chat, demo_server

WORDS = "river stone cloud apple train music paper light green table water horse night bread glass chair"


@dataclass(frozen=True)
class Size:
    prefixes: int = 16
    prefix_words: int = 600
    requests_each: int = 6
    unshared: int = 64
    unshared_words: int = 150
    unique: int = 70
    repeated: int = 30
    rounds: int = 3
    unshared_rounds: int = 10
    blocks: int = 32


QUICK = Size(prefixes=8, requests_each=3, unshared=8, unshared_rounds=3, unique=14, repeated=6, blocks=20)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    with demo_server(
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        enable_prefix_caching=True,
        num_gpu_blocks_override=size.blocks,
    ) as server:
        report = Report(
            "ordering",
            "Order and duplicates",
            f"Shared prefixes: {size.prefixes} of about {size.prefix_words} tokens with {size.requests_each} requests "
            f"each, shuffled, 2 tokens out; the cache holds {size.blocks} blocks, less than the prefixes need. Nothing "
            f"shared: {size.unshared} requests of about {size.unshared_words} tokens. Every pass has its own texts, so "
            "that the cache is cold. Ratios are speeds: `order: prefix` above `order: input`.",
        )
        report.raw["cache"] = server.labels("cache_config_info")
        passes = Passes(server, size)
        for name, rounds, target in (("shared", size.rounds, 1.2), ("unshared", size.unshared_rounds, 0.98)):
            say(f"  {name} prefixes")
            times = alternate(passes.sides(name), rounds, budget_seconds=budget_seconds / 2)
            report.raw[name] = times
            report.figures += [seconds_of(f"{name} prefixes, {side}", seconds) for side, seconds in times.items()]
            found = ratio(times["order: input"], times["order: prefix"])
            report.figures.append(held(found, f"{name} prefixes, speed, prefix / input", at_least=target))
        report.raw["prompt_tokens_cached"] = passes.cached
        for side in ("order: input", "order: prefix"):
            hits = [share for name, where, share in passes.cached if (name, where) == ("shared", side)]
            report.figures.append(Figure(f"prompt tokens found in the cache, {side}", f"{sum(hits) / len(hits):.0%}"))
        report.figures += _dedupe(server, size, report.raw)
    return report


class Passes:
    """Passes over texts that no other pass has."""

    def __init__(self, server: DemoServer, size: Size) -> None:
        self._server, self._size = server, size
        self._number = 0
        self.cached: list[tuple[str, str, float]] = []

    def sides(self, name: str) -> Any:
        return {f"order: {order}": lambda _, order=order: self._pass(name, order) for order in ("input", "prefix")}

    def _pass(self, name: str, order: str) -> float:
        self._number += 1
        rows = _shared(self._size, self._number) if name == "shared" else _unshared(self._size, self._number)
        before = self._server.metrics()
        answered = self._server.answer(rows, order=order)
        after = self._server.metrics()
        hits, queries = (
            after[f"prefix_cache_{n}_total"] - before[f"prefix_cache_{n}_total"] for n in ("hits", "queries")
        )
        self.cached.append((name, f"order: {order}", hits / queries if queries else 0.0))
        return answered.seconds


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS.split(), k=words))


def _shared(size: Size, number: int) -> list[dict[str, Any]]:
    """The same shuffle for each pass; the first word of a prefix tells the passes apart."""
    chance = random.Random(1)
    prefixes = [f"{number}-{n} {_text(chance, size.prefix_words)}" for n in range(size.prefixes)]
    rows = [
        chat(f"p{n}-{each}", f"Question {each}: what comes first?", system=prefix, max_tokens=2)
        for n, prefix in enumerate(prefixes)
        for each in range(size.requests_each)
    ]
    chance.shuffle(rows)
    return rows


def _unshared(size: Size, number: int) -> list[dict[str, Any]]:
    chance = random.Random(2)
    texts = [f"{number}-{n} {_text(chance, size.unshared_words)}" for n in range(size.unshared)]
    rows = [chat(f"u{n}", "Go on.", system=text, max_tokens=8) for n, text in enumerate(texts)]
    chance.shuffle(rows)
    return rows


def _dedupe(server: DemoServer, size: Size, raw: dict[str, Any]) -> list[Figure]:
    """Requests at the engine, by its own counter, where some lines are identical but for their ids."""
    chance = random.Random(3)
    bodies = [f"Say something about {n}." for n in range(size.unique)]
    texts = bodies + chance.choices(bodies, k=size.repeated)
    chance.shuffle(texts)
    rows = [chat(f"d{n}", text, max_tokens=4) for n, text in enumerate(texts)]
    figures = []
    for dedupe, expected in ((True, size.unique), (False, len(rows))):
        before = server.finished_requests()
        answered = server.answer(rows, dedupe=dedupe)
        asked = server.finished_requests() - before
        raw[f"dedupe_{dedupe}".lower()] = {"asked": asked, "copied": answered.report.copied, "lines": len(rows)}
        what = f"requests at the engine of {len(rows)} lines, {size.unique} different, dedupe {str(dedupe).lower()}"
        figures.append(Figure(what, str(asked), f"= {expected}", "met" if asked == expected else "missed"))
    return figures
