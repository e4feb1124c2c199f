"""Seconds into money, by a price list that anyone can extend."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

PRICES_FILE = Path(__file__).resolve().parent / "prices.yaml"
FIELDS = {"provider", "machine", "usd_per_hour"}


class PriceError(ValueError):
    """A price list that cannot be read; the message names file, entry and value."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one machine costs."""

    provider: str
    machine: str
    usd_per_hour: float

    def usd_per_million_tokens(self, seconds: float, tokens: int) -> float:
        """Price of a million tokens, if `tokens` of them take `seconds` and nothing else runs."""
        return self.usd_per_hour / 3600 * seconds * 1e6 / tokens


def load_prices(path: Path = PRICES_FILE) -> tuple[Price, ...]:
    """Read a price list; unknown keys and prices that are not positive are errors."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise PriceError(f"{path}: cannot be read as a price list ({error})") from error
    entries = data.get("prices") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise PriceError(f"{path}: needs a list under 'prices', each entry with {', '.join(sorted(FIELDS))}")
    return tuple(_read_entry(path, i, entry) for i, entry in enumerate(entries))


def _read_entry(path: Path, i_entry: int, entry: object) -> Price:
    if not isinstance(entry, dict) or set(entry) != FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise PriceError(f"{path}: prices[{i_entry}] has {found}, it must have {sorted(FIELDS)}")
    price = entry["usd_per_hour"]
    if isinstance(price, bool) or not isinstance(price, int | float) or price <= 0:
        raise PriceError(f"{path}: prices[{i_entry}].usd_per_hour is {price!r}; it must be a positive number")
    return Price(str(entry["provider"]), str(entry["machine"]), float(price))


def price_rows(prices: Sequence[Price], seconds: float, tokens: int) -> dict[str, float]:
    """Return US dollars per million prefill tokens for each machine on the list."""
    return {
        f"{price.provider}: {price.machine}": price.usd_per_million_tokens(seconds, tokens)
        for price in prices
    }
