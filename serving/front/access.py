"""Who may call: API keys for `/v1` with limits of their own, and operators' tokens with a name and a role."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sentei.policies.schema.integrations.gate import GATE_NAME
from sentei.serving.errors import ConfigError, RequestError

KEYS_VARIABLE = "SENTEI_API_KEYS"  # `name=key`, or `key` alone, separated by commas
TOKEN_VARIABLE, LOOK_VARIABLE = "SENTEI_ADMIN_TOKEN", "SENTEI_LOOK_TOKEN"
USER_KEY_VARIABLE, USER_KEY_FILE = "SENTEI_USER_KEY", "user.key"
MIN_KEY_CHARACTERS = 16
MAX_FAILURES, FAILURES_WINDOW_S = 10, 60.0
MAX_CALLERS = 10_000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Secret = Annotated[str, Field(min_length=MIN_KEY_CHARACTERS, max_length=512)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Role(StrEnum):
    """What an operator may do; each may do what stands before it, too."""

    LOOK = "look"  # read
    OPERATE = "operate"  # start, edit, pause, resume, abort, retry, faults
    APPROVE = "approve"  # let a rollout advance: promote, approve

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what needs another."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name


class ApiKey(_Entry):
    """One key; the limits hold in each ingress."""

    key: Secret | None = Field(default=None, repr=False)
    key_sha256: Digest | None = Field(default=None, repr=False)
    max_concurrent: int | None = Field(default=None, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)

    @property
    def digest(self) -> str:
        """The hash of the key."""
        return self.key_sha256 or _digest(self.key or "")


class Operator(_Entry):
    """One operator's token."""

    token: Secret | None = Field(default=None, repr=False)
    token_sha256: Digest | None = Field(default=None, repr=False)
    role: Role

    @property
    def digest(self) -> str:
        """The hash of the token."""
        return self.token_sha256 or _digest(self.token or "")


Entry = TypeVar("Entry", ApiKey, Operator)


def read_user_key(folder: Path) -> bytes:
    """Return the key that hashes `user` and signs tickets: the environment's, else a file's, made once.

    Raises ConfigError for one so short that it can be guessed.
    """
    if key := os.environ.get(USER_KEY_VARIABLE, ""):
        _check_length(USER_KEY_VARIABLE, key)
        return key.encode()
    path = folder / USER_KEY_FILE
    if not path.exists():
        scratch = folder / f".{USER_KEY_FILE}.{os.getpid()}"
        with os.fdopen(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another ingress was faster; its key is everybody's
            os.link(scratch, path)
        scratch.unlink()
    return path.read_bytes()


def operators_of_environment() -> list[Operator]:
    """Return `admin`, who may do all, and `look`, who may read, as far as the environment has their tokens.

    Raises ConfigError for a token that can be guessed, and where one opens both.
    """
    found = []
    for name, variable, role in (("admin", TOKEN_VARIABLE, Role.APPROVE), ("look", LOOK_VARIABLE, Role.LOOK)):
        if token := os.environ.get(variable, "").strip():
            _check_length(variable, token)
            found.append(Operator(name=name, token_sha256=_digest(token), role=role))
    if len({operator.digest for operator in found}) < len(found):
        raise ConfigError(f"{TOKEN_VARIABLE} and {LOOK_VARIABLE} are the same; who may look would be admin")
    return found


def _check_length(variable: str, secret: str) -> None:
    if len(secret) < MIN_KEY_CHARACTERS:
        raise ConfigError(
            f"{variable} has {len(secret)} characters, and at least {MIN_KEY_CHARACTERS} are wanted; "
            "make one by: openssl rand -hex 32"
        )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _find(entries: Sequence[Entry], authorization: str) -> Entry | None:
    """Return who sent `Bearer SECRET`; the time it takes does not depend on how much of a secret is right."""
    scheme, _, secret = authorization.partition(" ")
    given = hashlib.sha256(secret.strip().encode(errors="surrogateescape")).hexdigest()
    found = None
    for entry in entries:
        if hmac.compare_digest(entry.digest, given):
            found = entry
    return found if scheme.lower() == "bearer" else None


def _read_entries(path: str, kind: type[Entry]) -> tuple[Entry, ...]:
    place = Path(path).expanduser().absolute()
    try:
        found = yaml.safe_load(place.read_text(encoding="utf-8"))
        entries: list[Entry] = TypeAdapter(list[kind]).validate_python(found)  # type: ignore[valid-type]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{place}: {_complaints(error)}") from None
    except yaml.YAMLError as error:  # its own words quote the file, secrets included
        raise ConfigError(
            f"{place} is no YAML: see {getattr(error, 'problem_mark', 'its syntax')!s:.20}"
        ) from None
    secret = "key" if kind is ApiKey else "token"
    for entry in entries:
        if (getattr(entry, secret) is None) == (getattr(entry, f"{secret}_sha256") is None):
            raise ConfigError(f"{place}: {entry.name!r} needs either {secret} or {secret}_sha256")
        if entry.name.startswith(GATE_NAME):
            raise ConfigError(
                f"{place}: {entry.name!r}: {GATE_NAME!r} is how the log names a webhook that approves"
            )
    if len({entry.name for entry in entries}) < len(entries):
        raise ConfigError(f"{place} has a name twice; names tell people apart")
    return tuple(entries)


def _complaints(error: ValidationError) -> str:
    """Return what is wrong without what was found: neither a secret nor a digest may stand in an error."""
    found = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found)


class KeyBook:
    """All API keys, and what each has in flight; without any key everybody may call."""

    def __init__(self, keys: Sequence[ApiKey] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = tuple(keys)
        self._clock = clock
        self._in_flight = dict.fromkeys((key.name for key in keys), 0)
        self._tokens: dict[str, tuple[float, float]] = {}  # of a bucket: how full, and when that was

    @classmethod
    def read(cls, path: str | None) -> KeyBook:
        """Read the file, if one is named, and the environment; raises ConfigError."""
        keys = list(_read_entries(path, ApiKey)) if path is not None else []
        listed = [part.strip() for part in os.environ.get(KEYS_VARIABLE, "").split(",") if part.strip()]
        for i, part in enumerate(listed):
            name, is_named, key = part.partition("=")
            try:
                keys.append(ApiKey(name=name if is_named else f"env-{i}", key=key if is_named else part))
            except ValidationError as error:
                raise ConfigError(f"{KEYS_VARIABLE}, entry {i + 1}: {_complaints(error)}") from None
        return cls(keys)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    def enter(self, authorization: str) -> ApiKey | None:
        """Let a call in and count it; raises RequestError 401 or 429. `leave` must follow."""
        if self.is_open:
            return None
        key = _find(self._keys, authorization)
        if key is None:
            text = "wrong or missing API key; send `Authorization: Bearer KEY`"
            raise RequestError(text, status=401, code="invalid_api_key")
        if key.max_concurrent is not None and self._in_flight[key.name] >= key.max_concurrent:
            text = f"key {key.name!r} has {self._in_flight[key.name]} requests in flight, which is its limit"
            raise RequestError(text, status=429, code="rate_limit_exceeded", retry_after_s=1)
        self._spend(key)
        self._in_flight[key.name] += 1
        return key

    def leave(self, key: ApiKey | None) -> None:
        """Note that a call has ended."""
        if key is not None:
            self._in_flight[key.name] -= 1

    def _spend(self, key: ApiKey) -> None:
        limit = key.requests_per_minute
        if limit is None:
            return
        now_s = self._clock()
        full, at_s = self._tokens.get(key.name, (float(limit), now_s))
        full = min(float(limit), full + (now_s - at_s) * limit / 60)
        if full < 1:
            wait_s = int((1 - full) * 60 / limit) + 1
            text = f"key {key.name!r} has sent its {limit} requests a minute; retry in {wait_s} s"
            raise RequestError(text, status=429, code="rate_limit_exceeded", retry_after_s=wait_s)
        self._tokens[key.name] = (full - 1, now_s)


class OperatorBook:
    """All operators' tokens; wrong ones are counted by the caller's address."""

    def __init__(
        self, operators: Sequence[Operator] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._operators = tuple(operators)
        self._clock = clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    @classmethod
    def read(cls, path: str | None) -> OperatorBook:
        """Read the file, if one is named, and the environment; raises ConfigError."""
        operators = list(_read_entries(path, Operator)) if path is not None else []
        return cls([*operators, *operators_of_environment()])

    def check(self, authorization: str, caller: str, needed: Role) -> Operator:
        """Return who calls; raises RequestError for a wrong token, too many of them, or too small a role."""
        if not self._operators:
            text = f"the operations API is off: set {TOKEN_VARIABLE} where the app runs, and restart it"
            raise RequestError(text, status=403, code="admin_disabled")
        operator = _find(self._operators, authorization)
        if operator is None:
            self._note_failure(caller)
            text = f"wrong or missing admin token; send `Authorization: Bearer ${TOKEN_VARIABLE}`"
            raise RequestError(text, status=401, code="invalid_admin_token")
        if not operator.role.covers(needed):
            text = f"{operator.name!r} has role {operator.role.value!r}; this needs {needed.value!r}"
            raise RequestError(text, status=403, code="role_too_small")
        return operator

    def _note_failure(self, caller: str) -> None:
        """Count a wrong token; raises RequestError 429 where an address has sent too many of them.

        A right one is let in all the same: behind a proxy an address may be everybody's.
        """
        now_s = self._clock()
        recent = [at_s for at_s in self._failures.pop(caller, []) if now_s - at_s < FAILURES_WINDOW_S]
        is_too_many = len(recent) >= MAX_FAILURES
        self._failures[caller] = recent if is_too_many else [*recent, now_s]
        while len(self._failures) > MAX_CALLERS:
            self._failures.popitem(last=False)
        if is_too_many:
            wait_s = int(FAILURES_WINDOW_S - (now_s - recent[0])) + 1
            text = f"{len(recent)} wrong admin tokens from {caller}; retry in {wait_s} s"
            raise RequestError(text, status=429, code="too_many_attempts", retry_after_s=wait_s)
