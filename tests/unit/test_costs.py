"""Prices: a readable list in, dollars per million tokens out."""

from pathlib import Path

import pytest

from sentei.pipeline.costs import Price, PriceError, load_prices, price_rows


def test_the_shipped_price_list_loads() -> None:
    """Every entry has a machine and a positive price."""
    prices = load_prices()

    assert len(prices) >= 2
    assert all(price.usd_per_hour > 0 for price in prices)


def test_an_hour_of_a_machine_becomes_a_price_per_million_tokens() -> None:
    """36 s for 10,000 tokens on a machine of 1 dollar an hour cost 1 dollar per million tokens."""
    rows = price_rows([Price("cloud", "box", 1.0)], seconds=36.0, tokens=10_000)

    assert rows == {"cloud: box": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: []", "needs a list under 'prices'"),
        ("prices:\n  - {provider: a, machine: b}", r"prices\[0\] has"),
        ("prices:\n  - {provider: a, machine: b, usd_per_hour: -1}", r"usd_per_hour is -1"),
        ("prices: [", "cannot be read"),
    ],
)
def test_a_bad_price_list_names_file_and_entry(tmp_path: Path, text: str, message: str) -> None:
    """The message says which file and entry, and what is allowed."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)

    with pytest.raises(PriceError, match=message) as error:
        load_prices(path)

    assert "mine.yaml" in str(error.value)
