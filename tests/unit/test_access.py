"""API keys with their limits, operators' tokens with their roles, and the files both come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sentei.serving.errors import ConfigError, RequestError
from sentei.serving.front.access import (
    KEYS_VARIABLE,
    LOOK_VARIABLE,
    MAX_FAILURES,
    TOKEN_VARIABLE,
    ApiKey,
    KeyBook,
    Operator,
    OperatorBook,
    Role,
)
from tests.fakes_serving import FakeClock

KEY, OTHER = "k" * 20, "o" * 20


def status_of(book: KeyBook, authorization: str) -> int:
    """How a call ends."""
    try:
        book.enter(authorization)
    except RequestError as error:
        return error.status
    return 200


def test_without_keys_everybody_may_call() -> None:
    """No file and no variable: the API is open, as before."""
    assert KeyBook().is_open
    assert KeyBook().enter("") is None


@pytest.mark.parametrize(
    "given", ["", "Bearer ", "Bearer wrong", KEY, f"Basic {KEY}", "Bearer \udcff", "Bearer " + KEY[:-1]]
)
def test_wrong_key_is_a_401(given: str) -> None:
    """Whatever is sent instead of a key, the answer is the same."""
    assert status_of(KeyBook([ApiKey(name="a", key=KEY)]), given) == 401


def test_each_key_has_its_own_limits() -> None:
    """A key beyond its requests in flight or a minute gets a 429, the others do not notice."""
    clock = FakeClock()
    keys = [
        ApiKey(name="a", key=KEY, max_concurrent=1),
        ApiKey(name="b", key_sha256=hashlib.sha256(OTHER.encode()).hexdigest(), requests_per_minute=2),
    ]
    book = KeyBook(keys, clock)
    first = book.enter(f"Bearer {KEY}")
    busy = status_of(book, f"Bearer {KEY}")
    others = [status_of(book, f"bearer {OTHER}") for _ in range(3)]
    book.leave(first)
    clock.now_s += 30

    assert busy == 429
    assert others == [200, 200, 429]
    assert [status_of(book, f"Bearer {secret}") for secret in (KEY, OTHER, OTHER)] == [200, 200, 429]


def test_keys_of_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sources add up; an entry of the environment may have a name."""
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: a, key: {KEY}}}\n", encoding="utf-8")
    monkeypatch.setenv(KEYS_VARIABLE, f"bob={OTHER}, {'z' * 16}")

    book = KeyBook.read(str(path))

    found = [book.enter(f"Bearer {secret}") for secret in (KEY, OTHER, "z" * 16)]
    assert [key.name for key in found if key is not None] == ["a", "bob", "env-1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {name: a, key: hunter2}", "at least 16"),
        ("- {name: a, key: hunter2hunter2hunter2, limit: 3}", "limit"),
        ("- {name: a}", "either key or key_sha256"),
        ("- {name: a, key: 'hunter2hunter2hunter2'}\n- {name: a, key: 'hunter2hunter2hunter3'}", "twice"),
        ("- {name: 'gate:ci', key: hunter2hunter2hunter2}", "how the log names a webhook that approves"),
        ("- {name: a, key: hunter2hunter2hunter2", "no YAML"),
    ],
)
def test_bad_file_is_named_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    """An error says which file and what is wrong, and never shows a key."""
    path = tmp_path / "keys.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=words) as caught:
        KeyBook.read(str(path))

    assert str(path) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_bad_key_of_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error counts the entries and keeps the secret."""
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY},bob=hunter2")

    with pytest.raises(ConfigError, match=r"entry 2: key: .*at least 16") as caught:
        KeyBook.read(None)

    assert "hunter2" not in str(caught.value)


def operators(clock: FakeClock) -> OperatorBook:
    """One operator of each role; the token is the role's name, repeated."""
    return OperatorBook([Operator(name=f"{r}er", token=r.value * 8, role=r) for r in Role], clock)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("needed", Role)
def test_each_role_may_do_its_own_and_less(role: Role, needed: Role) -> None:
    """Who may only look is refused with his name and role; the name comes from the token."""
    book, order = operators(FakeClock()), [Role.LOOK, Role.OPERATE, Role.APPROVE]
    given = f"Bearer {role.value * 8}"

    if order.index(role) >= order.index(needed):
        assert book.check(given, "here", needed).name == f"{role}er"
        return
    with pytest.raises(RequestError, match=f"'{role}er' has role '{role}'; this needs '{needed}'") as caught:
        book.check(given, "here", needed)
    assert caught.value.status == 403


def test_wrong_tokens_are_slowed_down_and_right_ones_let_in() -> None:
    """After ten wrong tokens in a minute an address gets a 429 for more of them; a right one is let in."""
    clock, statuses = FakeClock(), []
    book, right = operators(clock), "Bearer " + "look" * 8
    for _ in range(MAX_FAILURES + 2):
        with pytest.raises(RequestError) as caught:
            book.check("Bearer x", "proxy", Role.LOOK)
        statuses.append(caught.value.status)
    elsewhere = book.check(right, "other", Role.LOOK)
    meanwhile = book.check(right, "proxy", Role.LOOK)
    clock.now_s += 61
    with pytest.raises(RequestError) as later:
        book.check("Bearer x", "proxy", Role.LOOK)

    assert statuses == [401] * MAX_FAILURES + [429] * 2
    assert elsewhere == meanwhile
    assert later.value.status == 401


def test_token_of_the_environment_may_do_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one token of small installations is `admin`; without any the operations API is off."""
    monkeypatch.setenv(TOKEN_VARIABLE, f"{'s' * 16}\n")
    assert OperatorBook.read(None).check("Bearer " + "s" * 16, "here", Role.APPROVE).name == "admin"

    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(RequestError, match="is off"):
        OperatorBook.read(None).check("Bearer ", "here", Role.LOOK)


def test_short_token_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that can be guessed starts no app; the error names the variable and the way out alone."""
    monkeypatch.setenv(TOKEN_VARIABLE, "hunter2hunter2h")

    with pytest.raises(ConfigError, match=r"SENTEI_ADMIN_TOKEN has 15 .* 16 .*openssl rand") as caught:
        OperatorBook.read(None)

    assert "hunter2" not in str(caught.value)


def test_prometheus_gets_a_token_that_may_only_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second token of the environment reads and orders nothing; the admin's own is refused in its place."""
    monkeypatch.setenv(TOKEN_VARIABLE, "a" * 16)
    monkeypatch.setenv(LOOK_VARIABLE, "l" * 16)
    book = OperatorBook.read(None)

    assert book.check("Bearer " + "l" * 16, "here", Role.LOOK).name == "look"
    with pytest.raises(RequestError, match="'look' has role 'look'"):
        book.check("Bearer " + "l" * 16, "here", Role.OPERATE)

    monkeypatch.setenv(LOOK_VARIABLE, "a" * 16)
    with pytest.raises(ConfigError, match="are the same"):
        OperatorBook.read(None)
