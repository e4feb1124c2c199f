"""The price list: machines by provider, ours and the user's, and what a payback is reckoned with.

PriceError    all that is wrong with a list; each fault names file, line, entry, value and what is allowed
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from sentei.errors import SenteiError
from sentei.policies.schema.nodes import LimitedLoader, fault_line, is_misread
from sentei.policies.schema.rules import nearest

MAX_SHOWN = 80  # characters of a value in a message
PRICES_FILE = Path(__file__).resolve().parent / "prices.yaml"
Device = Literal["cpu", "cuda", "rocm"]


class PriceError(SenteiError, ValueError):
    """A price list that cannot be used, with all that is wrong."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one machine costs; `cpus` matters where the processor does the work."""

    provider: str
    machine: str
    usd_per_hour: float
    device: Device = "cpu"
    cpus: int | None = None
    as_of: str = ""
    source: str = ""

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.provider}: {self.machine}"

    def usd_per_million_tokens(self, seconds: float, tokens: int) -> float:
        """Price of a million tokens, if `tokens` of them take `seconds` and nothing else runs."""
        return self.usd_per_hour / 3600 * seconds * 1e6 / tokens


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a payback depends on besides measured seconds."""

    tokens_per_day: float = 50e6
    one_off_usd: float = 0.0
    audited_share: float = 0.05


@dataclass(frozen=True, slots=True)
class PriceList:
    """Machines and assumptions, with the files that they come from."""

    prices: tuple[Price, ...]
    assumptions: Assumptions
    files: tuple[str, ...]

    def extend(self, other: "PriceList", assumptions: Assumptions) -> "PriceList":
        """Put another list on top: its entries replace ours of the same provider and machine."""
        merged = {price.label: price for price in (*self.prices, *other.prices)}
        return PriceList(tuple(merged.values()), assumptions, (*self.files, *other.files))


def load_prices(own: Path | None = None) -> PriceList:
    """Read the shipped list, and a user's own on top of it."""
    shipped = _Reader(PRICES_FILE).read(Assumptions())
    if own is None or own == PRICES_FILE:
        return shipped
    extra = _Reader(own).read(shipped.assumptions)
    return shipped.extend(extra, extra.assumptions)


class _Reader:
    """One file on its way to a list, with the faults found so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._faults: list[tuple[int, str]] = []

    def read(self, base: Assumptions) -> PriceList:
        root = self._parse()
        sections = dict(self._items(root, "the document", ("prices", "assumptions"), required=()))
        assumptions, prices = base, []
        if "assumptions" in sections:
            assumptions = self._read_assumptions(sections["assumptions"], base)
        if "prices" in sections:
            prices = self._read_prices(sections["prices"])
        if not sections and not self._faults:
            self._add(1, "needs a list under 'prices', or 'assumptions'")
        if self._faults:
            raise PriceError("\n".join(text for _, text in sorted(self._faults)))
        return PriceList(tuple(prices), assumptions, (str(self._path),))

    def _add(self, line: int, message: str) -> None:
        self._faults.append((line, f"{self._path}:{line}: {message}"))

    def _parse(self) -> yaml.Node:
        try:
            root = yaml.compose(self._path.read_text(encoding="utf-8-sig"), Loader=LimitedLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise PriceError(f"{self._path}: cannot be read as a price list ({error})") from error
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise PriceError(f"{self._path}:{fault_line(error)}: not YAML: {reason}") from error
        if not isinstance(root, yaml.MappingNode):
            raise PriceError(f"{self._path}:1: needs a list under 'prices', or 'assumptions'")
        return root

    def _items(
        self, node: yaml.Node, where: str, allowed: tuple[str, ...], required: tuple[str, ...]
    ) -> Iterator[tuple[str, yaml.Node]]:
        """Yield the known keys of a mapping; unknown, repeated and missing ones are faults."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            self._add(line, f"{where} must be a mapping with {', '.join(allowed)}")
            return
        seen: set[str] = set()
        for key_node, value in node.value:
            key, key_line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._add(key_line, f"{where} has a key that is no plain text; allowed: {', '.join(allowed)}")
                continue
            if key in seen:
                self._add(key_line, f"{where} has {key!r} twice")
            elif key not in allowed:
                hint = nearest(key, allowed)
                self._add(key_line, f"{where} has {_clip(key)!r}; allowed: {', '.join(allowed)}{hint}")
            else:
                yield key, value
            seen.add(key)
        if missing := [key for key in required if key not in seen]:
            self._add(line, f"{where} lacks {', '.join(missing)}")

    def _values(
        self, node: yaml.Node, where: str, checks: Mapping[str, "_Check"], required: tuple[str, ...]
    ) -> dict[str, Any]:
        values = {}
        for key, value_node in self._items(node, where, tuple(checks), required):
            is_right, wanted = checks[key]
            try:
                value = _read_value(value_node)
            except ValueError as error:
                self._add(value_node.start_mark.line + 1, f"{where}.{key} {error}; it must be {wanted}")
                continue
            if not is_right(value):
                line = value_node.start_mark.line + 1
                self._add(line, f"{where}.{key} is {_clip(repr(value))}; it must be {wanted}")
            values[key] = value
        return values

    def _read_assumptions(self, node: yaml.Node, base: Assumptions) -> Assumptions:
        known = len(self._faults)
        values = self._values(node, "assumptions", _ASSUMPTION_CHECKS, ())
        return base if len(self._faults) > known else replace(base, **values)

    def _read_prices(self, node: yaml.Node) -> list[Price]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self._add(
                node.start_mark.line + 1,
                f"needs a list under 'prices', each entry with {', '.join(_REQUIRED)}",
            )
            return []
        prices: list[Price] = []
        for i, entry in enumerate(node.value):
            known = len(self._faults)
            values = self._values(entry, f"prices[{i}]", _PRICE_CHECKS, _REQUIRED)
            if len(self._faults) > known:
                continue
            price = Price(**{key: value for key, value in values.items() if value is not None})
            if any(other.label == price.label for other in prices):
                self._add(entry.start_mark.line + 1, f"prices[{i}]: {price.label!r} is listed twice")
            prices.append(price)
        return prices


def _read_value(node: yaml.Node) -> Any:
    """Return a scalar's value, a date as it is written; raises ValueError for what is no plain value."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"is a {type(node).__name__.removesuffix('Node').lower()}")
    if is_misread(node):
        raise ValueError(f"is {node.value}, which YAML reads as another number; write it plainly")
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"is {_clip(node.value)}, which cannot be read ({_clip(str(reason))})") from error
    return node.value if isinstance(value, date) else value


def _clip(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


_Check = tuple[Callable[[Any], bool], str]
_REQUIRED = ("provider", "machine", "usd_per_hour")
_PRICE_CHECKS: Mapping[str, _Check] = {
    "provider": (_is_text, "a name"),
    "machine": (_is_text, "a name"),
    "usd_per_hour": (lambda v: _is_number(v) and 0 < v < float("inf"), "a positive number"),
    "device": (lambda v: v in get_args(Device), f"one of {', '.join(get_args(Device))}"),
    "cpus": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        "a whole number of at least 1",
    ),
    "as_of": (_is_text, "a text such as 2026-06"),
    "source": (_is_text, "a text"),
}
_ASSUMPTION_CHECKS: Mapping[str, _Check] = {
    "tokens_per_day": (lambda v: _is_number(v) and 0 < v < float("inf"), "a positive number"),
    "one_off_usd": (lambda v: _is_number(v) and 0 <= v < float("inf"), "a number of at least 0"),
    "audited_share": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
}
