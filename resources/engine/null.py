"""The null engine: answers at once and deterministically, in process. For dry runs, tests and overhead benchmarks.

It is an engine like the others and says in every answer that it is not a model: the model is called `null`, the text
starts with `null answer`, and no tokens are counted, since none were made.
"""

from zlib import crc32

from resources.engine.protocol import EngineRequest, EngineResponse

_USAGE = '"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
_HEAD = '{"id":"null-%08x","object":"%s","created":0,"model":"null",'
_TEMPLATES = {
    "/v1/chat/completions": _HEAD + '"choices":[{"index":0,"message":{"role":"assistant","content":"null answer %08x"},'
    '"logprobs":null,"finish_reason":"stop"}],' + _USAGE + "}",
    "/v1/completions": _HEAD
    + '"choices":[{"index":0,"text":"null answer %08x","logprobs":null,"finish_reason":"stop"}],'
    + _USAGE
    + "}",
}
_OBJECTS = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}
_OTHERS = {
    "/v1/responses": '{"id":"null-%08x","object":"response","created_at":0,"model":"null","status":"completed",'
    '"error":null,'
    '"incomplete_details":null,"instructions":null,"metadata":null,"parallel_tool_calls":false,"temperature":null,'
    '"tool_choice":"auto","tools":[],"top_p":null,"output":[{"id":"null","type":"message","role":"assistant",'
    '"status":"completed","content":[{"type":"output_text","text":"null answer","annotations":[]}]}],"usage":null}',
    "/v1/embeddings": '{"id":"null-%08x","object":"list","created":0,"model":"null",'
    '"data":[{"index":0,"object":"embedding",'
    '"embedding":[0.0]}],"usage":{"prompt_tokens":0,"total_tokens":0}}',
}
_SCORES = (
    '{"id":"null-%08x","object":"list","created":0,"model":"null","data":[],"results":[],"usage":{"total_tokens":0}}'
)


class NullEngine:
    """Any request gets status 200 and a body of the right shape that depends on nothing but the request's body."""

    async def ask(self, request: EngineRequest) -> EngineResponse:
        digest = crc32(request.body)
        template = _TEMPLATES.get(request.url)
        if template is not None:
            text = template % (digest, _OBJECTS[request.url], digest)
        else:
            text = _OTHERS.get(request.url, _SCORES) % digest
        return EngineResponse(200, text.encode(), request.request_id)
