"""vLLM's `LLM` on the requests of a batch file, in a process of its own: the model is loaded once.

    python -m benchmarks.offline_llm '{"file": ..., "engine": {...}}'

Each line on standard input is a pass: all requests in calls of that many, one after the other (0: one call over all).
The answer is a line `RESULT {"seconds": ..., "tokens": ...}`; vLLM's own words may come between.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(file: str, engine: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    bodies = [json.loads(line)["body"] for line in Path(file).read_text().splitlines()]
    messages = [body["messages"] for body in bodies]
    params = [SamplingParams(temperature=0, max_tokens=body["max_tokens"], ignore_eos=True) for body in bodies]
    llm = LLM(**engine)
    llm.chat(messages[:8], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        size = int(line) or len(bodies)
        began, tokens = time.monotonic(), 0
        for start in range(0, len(bodies), size):
            part = slice(start, start + size)
            outputs = llm.chat(messages[part], params[part], use_tqdm=False)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        print("RESULT " + json.dumps({"seconds": time.monotonic() - began, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
