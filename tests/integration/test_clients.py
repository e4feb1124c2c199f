"""The official client against the real gateway and the real engine of the pocket model, without Ray."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest

from sentei.pipeline.models import load_tokenizer
from sentei.serving.engine.request import EngineRequest, ScoreRequest, ScoreResult, TokenChunk
from sentei.serving.front.access import ApiKey, KeyBook
from sentei.serving.ingress.api import build_api
from sentei.serving.ingress.gateway import Gateway
from sentei.serving.openai.answers import ChatChunk, ChatCompletion, TextChunk, TextCompletion
from sentei.serving.openai.requests import ChatRequest, CompletionRequest
from sentei.serving.ports import ModelCard
from sentei.serving.replica.variant import ModelServer
from sentei.serving.settings import Limits, VariantOptions
from tests.fakes_serving import FakeStore, FakeVariant, crash, make_table

KEY = "a-key-of-the-tests"
PROMPT = "def main(argv):\n    import os"
HERMES = (
    "{% for t in tools or [] %}{{ t.function.name }} <tool_call></tool_call>\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
WEATHER = {
    "type": "object",
    "properties": {"day": {"enum": ["mon", "tue"]}},
    "required": ["day"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


class LocalVariant:
    """A model server in this process."""

    def __init__(self, name: Literal["dense", "sparse"], server: ModelServer) -> None:
        self.name = name
        self._server = server

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        async for chunk in self._server.generate(request):
            yield chunk

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return await self._server.score(request)

    async def describe(self) -> ModelCard:
        return await self._server.describe()

    async def plant(self, fault: dict[str, Any] | None) -> None:
        await self._server.plant(fault)


@pytest.fixture(scope="module")
def server() -> ModelServer:
    """The pocket model, loaded once."""
    return ModelServer(VariantOptions(model="pocket", variant="dense", max_context_tokens=1024))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Its tokenizer."""
    return load_tokenizer("pocket")


@asynccontextmanager
async def clients(
    server: ModelServer, tokenizer: Any, sparse: FakeVariant | None = None, **limits: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, httpx.AsyncClient]]:
    """The official client, and a plain one, of an app over the pocket model."""
    dense = LocalVariant("dense", server)
    variants: dict[str, Any] = {"dense": dense} if sparse is None else {"dense": dense, "sparse": sparse}
    store = FakeStore(routing=(make_table(), 1))
    gateway = Gateway(
        variants,
        store,
        tokenizer=tokenizer,
        model_name="pocket",
        limits=Limits(**{"poll_every_s": 60, "default_max_tokens": 12, **limits}),
    )
    api = build_api(gateway, keys=KeyBook([ApiKey(name="tests", key=KEY)]))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(api.router.lifespan_context(api))
        for name in variants:
            await gateway.introduce_once(name)
        await gateway.read_routing_once()
        store.routing = (make_table(), 2)
        await gateway.read_routing_once()
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        http = httpx.AsyncClient(
            transport=transport, base_url="http://test", headers={"authorization": f"Bearer {KEY}"}
        )
        plain = await stack.enter_async_context(http)
        client = openai.AsyncOpenAI(api_key=KEY, base_url="http://test/v1", http_client=plain, max_retries=0)
        yield client, plain


def user(text: str = PROMPT) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


async def test_models(server: ModelServer, tokenizer: Any) -> None:
    """The client lists the one model, finds it by name, and gets its own exception for another."""
    async with clients(server, tokenizer) as (client, plain):
        listed = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("pocket")
        slash, head = await plain.get("/v1/models/"), await plain.head("/v1/models")
        with pytest.raises(openai.NotFoundError, match="'other'"):
            await client.models.retrieve("other")

    assert listed == [one.id] == ["pocket"]
    assert slash.json()["data"][0]["id"] == "pocket"
    assert (head.status_code, head.content) == (200, b"")


async def test_ten_turns_by_appending_replies(server: ModelServer, tokenizer: Any) -> None:
    """A conversation is carried on by appending each reply as it came."""
    async with clients(server, tokenizer) as (client, _):
        messages: list[Any] = [{"role": "system", "content": "# python"}]
        tokens = []
        for turn in range(10):
            messages.append({"role": "user", "content": f"def f{turn}(x):"})
            reply = await client.chat.completions.create(model="pocket", messages=messages)
            messages.append(reply.choices[0].message)
            assert reply.usage is not None
            tokens.append(reply.usage.prompt_tokens)

    assert len(messages) == 21
    assert tokens == sorted(set(tokens))


async def test_stream_is_the_whole_answer_with_usage(server: ModelServer, tokenizer: Any) -> None:
    """The pieces of a stream are the answer; the last one counts its tokens."""
    async with clients(server, tokenizer) as (client, _):
        whole = await client.chat.completions.create(model="pocket", messages=user())
        options: Any = {"include_usage": True}
        stream = await client.chat.completions.create(
            model="pocket", messages=user(), stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


async def test_logprobs(server: ModelServer, tokenizer: Any) -> None:
    """Bytes join to the text, also through half characters; alternatives are as many as asked, best first."""
    async with clients(server, tokenizer) as (client, _):
        chat = await client.chat.completions.create(
            model="pocket",
            messages=user("# café 🙂 漢字 "),
            logprobs=True,
            top_logprobs=20,
            temperature=1.8,
            seed=3,
            max_tokens=40,
            logit_bias={str(i): 6 for i in range(90, 180)},  # the bytes that characters are made of
        )
        text = await client.completions.create(
            model="pocket", prompt=PROMPT, logprobs=20, max_tokens=20, temperature=1.5, seed=4
        )

    choice = chat.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert b"".join(bytes(e.bytes or ()) for e in entries).decode(errors="replace") == choice.message.content
    assert any(entry.token.startswith("bytes:") for entry in entries)
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert (len(values), values) == (20, sorted(values, reverse=True))
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs or []] == [20] * 20
    answer, offsets = text.choices[0].text, logprobs.text_offset or []
    pieces = [answer[i:j] for i, j in zip(offsets, [*offsets[1:], len(answer)], strict=True)]
    assert "".join(pieces) == answer
    assert pieces == logprobs.tokens


async def test_answers_follow_a_schema(server: ModelServer, tokenizer: Any) -> None:
    """JSON mode gives an object, a schema gives what it says, streamed or not, however hot the model is."""
    schema: Any = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "n": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["kind", "n"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    async with clients(server, tokenizer) as (client, _):
        found = [
            await client.chat.completions.create(
                model="pocket", messages=user(), response_format=wanted, temperature=t, max_tokens=400
            )
            for t in (0.0, 1.0, 2.0)
        ]
        free = await client.chat.completions.create(
            model="pocket",
            messages=user(),
            response_format={"type": "json_object"},
            logit_bias={str(tokenizer.encode("}", add_special_tokens=False)[-1]): 100},
            max_tokens=400,
        )

    for answer in found:
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "strin"),
        ({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(30)]}, "too much|takes"),
        ({"$ref": "#"}, "followed|go on"),
        ({"enum": ["x" * 40_000]}, "bytes"),
    ],
)
async def test_schema_that_cannot_be_used_is_refused(
    server: ModelServer, tokenizer: Any, schema: Any, words: str
) -> None:
    """A schema that is wrong, endless or too long is a 400 in seconds, and the next request is served."""
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with clients(server, tokenizer) as (client, _):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            await client.chat.completions.create(model="pocket", messages=user(), response_format=wanted)
        after = await client.chat.completions.create(
            model="pocket", messages=user(), response_format={"type": "json_object"}
        )

    assert caught.value.param == "response_format"
    assert (after.choices[0].message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_is_called_and_its_answer_goes_back(
    server: ModelServer, tokenizer: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A required call comes as the client's own type, by the tool's schema, and the conversation goes on."""
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)
    asked: Any = {"model": "pocket", "messages": user(), "tools": TOOLS, "max_tokens": 400}
    async with clients(server, tokenizer) as (client, _):
        if stream:
            pieces = await client.chat.completions.create(**asked, tool_choice="required", stream=True)
            deltas = [chunk.choices[0] async for chunk in pieces]
            (call,) = [call for choice in deltas for call in choice.delta.tool_calls or []]
            sent: Any = {"role": "assistant", "tool_calls": [call.model_dump()]}
            reason, name, arguments = deltas[-1].finish_reason, call.function.name, call.function.arguments
        else:
            reply = await client.chat.completions.create(**asked, tool_choice="required")
            sent, reason = reply.choices[0].message, reply.choices[0].finish_reason
            (call,) = sent.tool_calls
            name, arguments = call.function.name, call.function.arguments
        answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        after = await client.chat.completions.create(
            **{**asked, "messages": [*user(), sent, answer]}, tool_choice="none"
        )

    assert (reason, name) == ("tool_calls", "weather")
    jsonschema.validate(json.loads(arguments), WEATHER)
    assert after.choices[0].message.content


async def test_model_without_tools_in_its_template_says_so(server: ModelServer, tokenizer: Any) -> None:
    """The pocket model's template has no place for tools."""
    async with clients(server, tokenizer) as (client, _):
        with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
            await client.chat.completions.create(
                model="pocket",
                messages=user(),
                tools=TOOLS,
                tool_choice="required",  # type: ignore[arg-type]
            )

    assert caught.value.param == "tools"


async def test_every_optional_field_as_null(server: ModelServer, tokenizer: Any) -> None:
    """A body that names every option, all null, is the body that names none."""
    nulls = [
        {n: None for n, f in kind.model_fields.items() if not f.is_required()}
        for kind in (ChatRequest, CompletionRequest)
    ]
    async with clients(server, tokenizer) as (_, plain):
        body = {"model": "pocket", "messages": user()}
        chat = [await plain.post("/v1/chat/completions", json={**body, **extra}) for extra in ({}, nulls[0])]
        body = {"model": "pocket", "prompt": PROMPT}
        text = [await plain.post("/v1/completions", json={**body, **extra}) for extra in ({}, nulls[1])]

    assert [response.status_code for response in (*chat, *text)] == [200] * 4
    chats = [ChatCompletion.model_validate(response.json()).choices for response in chat]
    texts = [TextCompletion.model_validate(response.json()).choices for response in text]
    assert chats[0] == chats[1]
    assert texts[0] == texts[1]


async def test_several_answers_to_one_request(server: ModelServer, tokenizer: Any) -> None:
    """Eight answers come side by side, each with its own seed, whole or streamed, and all are counted."""
    asked: Any = {"model": "pocket", "prompt": PROMPT, "n": 8, "temperature": 1.5, "seed": 5, "max_tokens": 6}
    async with clients(server, tokenizer) as (client, _):
        whole = await client.completions.create(**asked)
        texts = [""] * 8
        async for chunk in await client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text

    assert [choice.index for choice in whole.choices] == list(range(8))
    assert [choice.text for choice in whole.choices] == texts
    assert len(set(texts)) > 1
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 48


async def test_chunks_are_as_the_document_says(server: ModelServer, tokenizer: Any) -> None:
    """Each event of a stream has the fields of the document and no others."""
    base: Any = {"model": "pocket", "stream": True, "stream_options": {"include_usage": True}}
    async with clients(server, tokenizer) as (_, plain):
        chat = await plain.post("/v1/chat/completions", json={**base, "messages": user(), "logprobs": True})
        text = await plain.post("/v1/completions", json={**base, "prompt": PROMPT, "logprobs": 2})

    for response, kind in ((chat, ChatChunk), (text, TextChunk)):
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            kind.model_validate_json(line.removeprefix("data: "))


async def test_ignored_end_gives_all_tokens(server: ModelServer, tokenizer: Any) -> None:
    """With ignore_eos the model's end is no end."""
    end = {"2": 100}
    async with clients(server, tokenizer) as (client, _):
        ended = await client.completions.create(model="pocket", prompt=PROMPT, logit_bias=end)
        ignored = await client.completions.create(
            model="pocket", prompt=PROMPT, logit_bias=end, extra_body={"ignore_eos": True}
        )

    assert (ended.choices[0].finish_reason, ignored.choices[0].finish_reason) == ("stop", "length")
    assert ignored.usage is not None
    assert ignored.usage.completion_tokens == 12


async def test_answer_goes_on_to_the_contexts_end(server: ModelServer, tokenizer: Any) -> None:
    """Without max_tokens and without a setting the context is the limit."""
    prompt = "x = 1\n" * 200
    async with clients(server, tokenizer, default_max_tokens=None) as (client, plain):
        counted = (await plain.post("/tokenize", json={"prompt": prompt})).json()
        found = await client.completions.create(
            model="pocket", prompt=prompt, extra_body={"ignore_eos": True}
        )

    assert found.usage is not None
    assert found.usage.prompt_tokens == counted["count"]
    assert found.usage.total_tokens == counted["max_model_len"] == 1024


async def test_errors_are_the_clients_own_exceptions(server: ModelServer, tokenizer: Any) -> None:
    """Each status becomes the exception that programs catch, with parameter and code."""
    async with clients(server, tokenizer, max_body_bytes=4096, max_concurrent=2) as (client, plain):
        ask = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await ask(model="pocket", messages=user(), temperature=9)
        with pytest.raises(openai.NotFoundError) as missing:
            await ask(model="gpt-9", messages=user())
        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.with_options(api_key="wrong").chat.completions.create(
                model="pocket", messages=user()
            )
        with pytest.raises(openai.RateLimitError) as busy:
            await ask(model="pocket", messages=user(), n=3)
        with pytest.raises(openai.APIStatusError) as large:
            await ask(model="pocket", messages=user("x" * 5000))
        wrong_method = await plain.get("/v1/chat/completions")

    assert (bad.value.param, missing.value.code) == ("temperature", "model_not_found")
    assert (unknown.value.code, busy.value.code) == ("invalid_api_key", "overloaded")
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")


async def test_answer_that_moved_to_dense_keeps_penalties_and_schema(
    server: ModelServer, tokenizer: Any
) -> None:
    """A stream that goes on on dense behind two tokens is the stream that dense would have given alone."""
    schema: Any = {"enum": ["red green blue " * 4, "red green red " * 4]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: Any = {
        "model": "pocket",
        "messages": user(),
        "response_format": wanted,
        "frequency_penalty": 1.5,
        "max_tokens": 200,
        "extra_body": {"repetition_penalty": 1.3},
    }
    async with clients(server, tokenizer) as (client, _):
        alone = await client.chat.completions.create(**asked)
    text = alone.choices[0].message.content or ""
    ids = tokenizer.encode(text, add_special_tokens=False)
    sparse = DyingVariant("sparse", ids[:2])

    async with clients(server, tokenizer, sparse=sparse) as (client, _):
        moved = await client.chat.completions.create(**asked)

    assert moved.system_fingerprint == "dense/dense"
    assert sparse.requests[0].sampling.json_schema == json.dumps(schema, separators=(",", ":"))
    assert json.loads(moved.choices[0].message.content or "") in schema["enum"]
    assert moved.choices[0].message.content == text


class DyingVariant(FakeVariant):
    """Sends these ids, then crashes."""

    def __init__(self, name: str, ids: list[int]) -> None:
        super().__init__(name)
        self._ids = ids

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        for token_id in self._ids:
            yield TokenChunk((token_id,))
        raise crash(self.name)


async def test_pages_of_other_origins_are_let_in_only_by_setting() -> None:
    """CORS is off unless origins are named."""
    gateway = Gateway({}, FakeStore(), tokenizer=None, model_name="m", limits=Limits())  # type: ignore[arg-type]
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    found = []
    for origins in ((), ("https://a.example",)):
        transport = httpx.ASGITransport(app=build_api(gateway, cors_origins=origins))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            found.append(await http.options("/v1/models", headers=headers))

    assert [response.headers.get("access-control-allow-origin") for response in found] == [
        None,
        "https://a.example",
    ]
