"""What commits cost a run with a real engine: many small chunks against one large."""

from dataclasses import dataclass

from benchmarks.common import Report, alternate, held, ratio, seconds_of
from benchmarks.engines import chat, demo_server


@dataclass(frozen=True)
class Size:
    requests: int = 384
    tokens: int = 4
    small: int = 64
    large: int = 4096
    rounds: int = 10


QUICK = Size(requests=32, small=8, rounds=3, tokens=2)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    rows = [chat(f"c{n}", f"Tell me about the number {n}.", max_tokens=size.tokens) for n in range(size.requests)]
    small, large = f"chunk_rows {size.small}", f"chunk_rows {size.large}"
    with demo_server(max_num_seqs=64, enable_prefix_caching=False) as server:

        def answer(chunk_rows: int) -> float:
            return server.answer(rows, chunk_rows=chunk_rows, flush_seconds=3600).seconds

        answer(size.large)
        sides = {large: lambda _: answer(size.large), small: lambda _: answer(size.small)}
        times = alternate(sides, size.rounds, budget_seconds=budget_seconds)
    found = ratio(times[small], times[large])
    report = Report(
        "commit_cost",
        "What commits cost",
        f"{size.requests} requests of {size.tokens} tokens out on the demo model, no commits by time: "
        f"{-(-size.requests // size.small)} commits against one.",
        raw={"seconds": times},
    )
    report.figures = [seconds_of(name, seconds) for name, seconds in times.items()]
    report.figures.append(held(found, f"time, {small} / {large}", at_most=1.02))
    return report
