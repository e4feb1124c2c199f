"""Where a policy lets the controller call, and where the secrets for it lie: never in the policy itself."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import Field

from sentei.policies.schema.faults import Fault, Path
from sentei.policies.schema.operations import Section
from sentei.policies.schema.units import format_duration

MAX_URL_CHARS = 2048
SHORTEST_CALL_S, LONGEST_CALL_S = 0.1, 30.0
SECRET_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")  # whose URLs are their secrets

SecretFile = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
# A prefix, so that a policy cannot name what the controller's environment holds for others.
SecretVariable = Annotated[str, Field(pattern=r"^SENTEI_[A-Z0-9_]{1,100}$")]
# What opens the app itself: a policy that named one could have it sent, as a bearer token, to whom it likes.
THE_APPS_OWN = frozenset(("SENTEI_ADMIN_TOKEN", "SENTEI_LOOK_TOKEN", "SENTEI_API_KEYS", "SENTEI_USER_KEY"))


class SecretSource(Section):
    """What is read when it is needed; exactly one of file and env."""

    file: SecretFile | None = Field(default=None, description="name of a file in the app's secrets folder")
    env: SecretVariable | None = Field(
        default=None, description="variable of the controller's environment, such as SENTEI_WEBHOOK_SECRET"
    )

    def __str__(self) -> str:
        return f"file {self.file}" if self.file is not None else f"variable {self.env}"


class Endpoint(Section):
    """An HTTP address; exactly one of url and url_from."""

    url: str | None = Field(default=None, description="https, or http to loopback")
    url_from: SecretSource | None = Field(default=None, description="where a URL that is a secret lies")

    @property
    def place(self) -> str:
        """Where it is, for people: no more of a URL than its host."""
        if self.url is not None:
            return urlsplit(self.url).netloc
        return f"the URL of {self.url_from}"


def why_no_url(text: str) -> str | None:
    """Why this URL is never called, or None: https everywhere, plain http only to this machine."""
    if not 0 < len(text) <= MAX_URL_CHARS or not text.isascii() or not text.isprintable() or " " in text:
        return f"a URL has 1 to {MAX_URL_CHARS} plain characters"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return "this is no URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return 'a URL looks like "https://host/path"'
    if parts.username is not None or parts.password is not None:
        return "a URL holds no user and no password; name the secret's file or variable"
    if parts.fragment:
        return "a fragment (#) is never sent; leave it out"
    if parts.scheme == "http" and not _is_loopback(parts):
        return "plain http is for loopback only; use https"
    return None


def _is_loopback(parts: SplitResult) -> bool:
    if parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def endpoint_faults(path: Path, item: Endpoint) -> Iterator[Fault]:
    """What is wrong with an address in a policy."""
    if (item.url is None) == (item.url_from is None):
        yield Fault((*path, "url"), item.url, "give exactly one of url and url_from")
    if item.url is not None:
        if reason := why_no_url(item.url):
            yield Fault((*path, "url"), item.url, reason)
        elif urlsplit(item.url).hostname in SECRET_HOSTS:
            message = (
                "who has this URL may write there, so it is a secret: put it into a file, name it in url_from"
            )
            yield Fault((*path, "url"), urlsplit(item.url).hostname, message)
    if item.url_from is not None:
        yield from source_faults((*path, "url_from"), item.url_from)


def source_faults(path: Path, item: SecretSource) -> Iterator[Fault]:
    """A secret lies in one place."""
    if (item.file is None) == (item.env is None):
        yield Fault(path, None, "give exactly one of file and env")
    if item.env in THE_APPS_OWN:
        text = "is a secret of the app's own, which no policy may send anywhere; name another one"
        yield Fault((*path, "env"), item.env, text)


def call_time_faults(path: Path, value: float) -> Iterator[Fault]:
    """A call ends soon enough to be made again."""
    if not SHORTEST_CALL_S <= value <= LONGEST_CALL_S:
        limits = f"{format_duration(SHORTEST_CALL_S)} to {format_duration(LONGEST_CALL_S)}"
        yield Fault(path, format_duration(value), f"must lie in {limits}")
