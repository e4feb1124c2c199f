"""One HTTP call to the outside: an end in time, an end in size, no redirect, and no secret in what it says.

A call goes straight through httpx' transport. Its client would follow the environment's proxies and .netrc,
and log each URL, and some URLs are secrets.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import httpx

from sentei.errors import SenteiError
from sentei.policies.schema.integrations.endpoint import Endpoint, SecretSource, why_no_url

MAX_SECRET_BYTES = 4096
MAX_RETRY_AFTER_S = 300.0


class CallError(SenteiError):
    """A call that got no usable answer; the message names the reason, never the URL or a secret."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, as far as it was asked for."""

    status: int
    body: bytes = b""
    retry_after_s: float | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the receiver took it."""
        return 200 <= self.status < 300


class Secrets:
    """Reads what a policy only names, at each use: a secret that was renewed counts from the next call."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._environ = environ

    def read(self, source: SecretSource) -> str:
        """Return the secret without the blanks around it; CallError if there is none, or more than a line."""
        if source.env is not None:
            text = self._environ.get(source.env, "")
        else:
            text = self._read_file(source.file or "")
        if not text.strip():
            raise CallError(f"{source} is not there, or is empty; the controller needs it")
        if not text.strip().isprintable():
            raise CallError(f"{source} holds more than one line of plain text")
        return text.strip()

    def url(self, endpoint: Endpoint) -> str:
        """Return the address to call; CallError if it may not be called."""
        url = endpoint.url if endpoint.url_from is None else self.read(endpoint.url_from)
        if reason := why_no_url(url or ""):
            raise CallError(f"{endpoint.place}: {reason}")
        return url or ""

    def _read_file(self, name: str) -> str:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SECRET_BYTES + 1)
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CallError(
                f"file {name} in {self._folder} cannot be read: {type(error).__name__}"
            ) from error
        if len(data) > MAX_SECRET_BYTES:
            raise CallError(f"file {name} in {self._folder} is larger than {MAX_SECRET_BYTES} bytes")
        return text


async def call(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    content: bytes = b"",
    timeout_s: float,
    max_bytes: int = 0,
) -> Answer:
    """Call once; CallError unless an answer of at most `max_bytes` is there within `timeout_s`.

    With `max_bytes` 0 the body is not read. Redirects are an answer like any other: nobody follows them.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _call(
                method, url, {**headers, "accept-encoding": "identity"}, content, timeout_s, max_bytes
            )
    except TimeoutError as error:
        raise CallError(f"no whole answer within {timeout_s:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        # Of others the text may hold parts of the URL, or a header with its secret.
        why = f": {error}" if isinstance(error, httpx.NetworkError) and str(error) else ""
        raise CallError(f"no answer, {type(error).__name__}{why}") from error


async def _call(
    method: str, url: str, headers: Mapping[str, str], content: bytes, timeout_s: float, max_bytes: int
) -> Answer:
    limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
    request = httpx.Request(method, url, headers=headers, content=content, extensions={"timeout": limits})
    verify = _tls() if request.url.scheme == "https" else False
    async with httpx.AsyncHTTPTransport(verify=verify, trust_env=False, retries=0) as transport:
        response = await transport.handle_async_request(request)
        try:
            body = await _read(response, max_bytes) if max_bytes else b""
        finally:
            await response.aclose()
    return Answer(response.status_code, body, _retry_after_s(response.headers.get("retry-after", "")))


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    body = bytearray()
    async for part in response.stream:
        body += part
        if len(body) > max_bytes:
            raise CallError(f"the answer is larger than {max_bytes} bytes")
    return bytes(body)


def _retry_after_s(text: str) -> float | None:
    return (
        min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() and len(text) < 10 else None
    )


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """The system's authorities (SSL_CERT_FILE and SSL_CERT_DIR, too), and those that come with httpx."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context
