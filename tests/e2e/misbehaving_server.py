"""A real HTTP server that behaves like a vLLM server until a prompt tells it not to. A program: --port N or --uds PATH.

A prompt `<fault>*<times> ...` meets that fault for the first so many times that it is asked, and an answer after that.
Every prompt is appended to the file that --asked names, before anything happens to it.
"""

import argparse
import asyncio
import os
from collections import Counter
from pathlib import Path

from aiohttp import web

METRICS = """vllm:num_requests_running{{engine="0",model_name="m"}} {running}.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
vllm:prompt_tokens_total{{engine="0",model_name="m"}} {prompt}.0
vllm:generation_tokens_total{{engine="0",model_name="m"}} {completion}.0
"""


class Server:
    def __init__(self, asked: Path) -> None:
        self.asked = asked.open("a", buffering=1)
        self.times: Counter[str] = Counter()
        self.running = self.prompt = self.completion = 0

    async def ask(self, request: web.Request) -> web.StreamResponse:
        text = (await request.json())["messages"][-1]["content"]
        self.asked.write(text + "\n")
        self.times[text] += 1
        fault, _, rest = text.partition("*")
        if rest and self.times[text] <= int(rest.split()[0]):
            return await self.misbehave(request, fault)
        self.running += 1
        await asyncio.sleep(0.01)
        self.running -= 1
        self.prompt += 3
        self.completion += 2
        return web.json_response(self.answer(text))

    async def misbehave(self, request: web.Request, fault: str) -> web.StreamResponse:
        assert request.transport
        match fault:
            case "reset":
                request.transport.abort()
            case "half":
                response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
                await response.prepare(request)
                await response.write(b'{"id":"c","choices":[')
                request.transport.abort()
            case "garbage":
                return web.Response(text='{"id": NaN, broken', content_type="application/json")
            case "hang":
                await asyncio.sleep(3600)
            case "drip":
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                await response.prepare(request)
                while True:
                    await response.write(b" ")
                    await asyncio.sleep(0.05)
            case "poison":
                os._exit(139)
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.3"})
        return web.json_response({"error": {"message": "no"}}, status=int(fault) if fault.isdigit() else 500)

    def answer(self, text: str) -> dict[str, object]:
        choice = {"index": 0, "message": {"role": "assistant", "content": f"to {text}"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}

    async def metrics(self, _: web.Request) -> web.Response:
        counts = {"running": self.running, "prompt": self.prompt, "completion": self.completion}
        return web.Response(text=METRICS.format(**counts))

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--asked", type=Path, required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--uds")
    arguments, _ = parser.parse_known_args()
    server = Server(arguments.asked)
    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", server.ask), web.get("/metrics", server.metrics)])
    app.add_routes([web.get("/health", server.health)])
    web.run_app(app, host="127.0.0.1", port=arguments.port, path=arguments.uds, print=None, handle_signals=False)


if __name__ == "__main__":
    main()
