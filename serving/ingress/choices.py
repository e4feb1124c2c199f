"""From answers to choices: calls are read out of each, and the pieces of several come in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from sentei.serving.engine.request import FinishReason
from sentei.serving.ingress.answer import Delta
from sentei.serving.text.tools import CallReader

MAX_AHEAD = 16  # pieces that wait for a slow reader, all answers together


async def read_calls(deltas: AsyncGenerator[Delta, None], reader: CallReader) -> AsyncGenerator[Delta, None]:
    """Take the calls out of an answer; one that holds calls ends with the reason `tool_calls`."""
    has_calls = False
    async with aclosing(deltas):
        async for delta in deltas:
            text, calls = reader.add(delta.text)
            if delta.finish_reason is not None:
                rest, more = reader.flush()
                text, calls = text + rest, [*calls, *more]
            has_calls = has_calls or bool(calls)
            finish = delta.finish_reason
            finish = FinishReason.TOOL_CALLS if has_calls and finish is FinishReason.STOP else finish
            yield replace(delta, text=text, calls=tuple(calls), finish_reason=finish)


async def interleave(
    answers: Sequence[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield (index, piece) as the pieces come; when one answer fails, or the reader goes, all end."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(MAX_AHEAD)
    tasks = [asyncio.create_task(_pump(i, answer, queue)) for i, answer in enumerate(answers)]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
                continue
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    answer: AsyncGenerator[Delta, None],
    queue: asyncio.Queue[tuple[int, Delta] | Exception | None],
) -> None:
    with suppress(asyncio.CancelledError):
        async with aclosing(answer):
            try:
                async for delta in answer:
                    await queue.put((index, delta))
            except Exception as error:  # handed on whole: the reader raises it
                await queue.put(error)
            else:
                await queue.put(None)
