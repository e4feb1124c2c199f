"""Prices: a readable list in, dollars per million tokens and a payback out."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sentei.pipeline.evaluation.costs import Machine, Measured, reckon_costs
from sentei.pipeline.evaluation.prices import Assumptions, Price, PriceError, PriceList, load_prices

MEASURED = Measured({"dense": 36.0, "bold": 18.0}, tokens=10_000, setup_s=3600.0, machine=Machine("cpu", 2))
BOX = Price("cloud", "box", 1.0, cpus=2)


def listed(*prices: Price, **assumptions: float) -> PriceList:
    """A list with these machines, and no audits unless asked for."""
    return PriceList(prices, Assumptions(**{"audited_share": 0.0} | assumptions), ("mine.yaml",))


def write(folder: Path, text: str) -> Path:
    """A list of the user's."""
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_shipped_list_has_several_providers_and_kinds() -> None:
    """Every entry has a positive price and says when and where from; its assumptions are the defaults."""
    shipped = load_prices()

    assert len({price.provider for price in shipped.prices}) >= 3
    assert {price.device for price in shipped.prices} == {"cpu", "cuda"}
    assert all(price.usd_per_hour > 0 and price.as_of and price.source for price in shipped.prices)
    assert shipped.assumptions == Assumptions()


def test_a_list_of_ones_own_comes_on_top(tmp_path: Path) -> None:
    """New machines are added, one of the same name replaces ours, given assumptions win and others stay."""
    first = load_prices().prices[0]
    path = write(
        tmp_path,
        "assumptions: {tokens_per_day: 1_000}\n"
        "prices:\n"
        "  - {provider: us, machine: rack, usd_per_hour: 2}\n"
        f"  - {{provider: {first.provider}, machine: {first.machine}, usd_per_hour: 9}}\n",
    )

    merged = load_prices(path)

    by_label = {price.label: price.usd_per_hour for price in merged.prices}
    assert len(merged.prices) == len(load_prices().prices) + 1
    assert (by_label["us: rack"], by_label[first.label]) == (2, 9)
    assert merged.assumptions == replace(Assumptions(), tokens_per_day=1_000)
    assert merged.files[-1] == str(path)


def test_seconds_become_dollars_and_a_payback() -> None:
    """36 s for 10,000 tokens at 1 USD an hour are 1 USD a million; half of it saved pays 1 USD back in 2."""
    report = reckon_costs(listed(BOX, tokens_per_day=1e6), MEASURED)

    dense, bold = report.rows
    assert report.usd_by_machine("dense") == {"cloud: box": pytest.approx(1.0)}
    assert (dense.setup_usd, dense.payback_days) == (0.0, None)
    assert bold.saved_usd_per_million_tokens == pytest.approx(0.5)
    assert bold.setup_usd == pytest.approx(1.0)
    assert (bold.payback_million_tokens, bold.payback_days) == (pytest.approx(2.0), pytest.approx(2.0))


def test_audits_and_other_costs_count_against_the_saving() -> None:
    """An audited prompt runs twice through dense and once through the rung; one-off costs come on top."""
    report = reckon_costs(listed(BOX, audited_share=0.1, one_off_usd=9.0), MEASURED)

    bold = report.rows[1]
    assert bold.audit_usd_per_million_tokens == pytest.approx(0.25)
    assert bold.payback_million_tokens == pytest.approx(10 / 0.25)


def test_what_saves_less_than_its_audits_never_pays_back() -> None:
    """No payback is given as none, not as a large or a negative number."""
    slow = replace(MEASURED, prefill_s={"dense": 36.0, "bold": 35.0})

    bold = reckon_costs(listed(BOX, audited_share=0.05), slow).rows[1]

    assert (bold.payback_million_tokens, bold.payback_days) == (None, None)


def test_only_machines_of_the_measured_kind_are_priced() -> None:
    """A GPU has no price from a CPU's seconds, and another number of CPUs is marked as an estimate."""
    report = reckon_costs(
        listed(BOX, Price("cloud", "big", 2.0, cpus=16), Price("gpu", "h", 4.0, "cuda")), MEASURED
    )

    assert {(row.machine, row.is_same_size) for row in report.rows} == {("box", True), ("big", False)}
    assert report.not_measured == ("gpu: h",)
    assert asdict(report)["machine"] == {"device": "cpu", "cpus": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: []", r"mine\.yaml:1: needs a list under 'prices'"),
        ("other: 1", r"mine\.yaml:1: the document has 'other'; allowed: prices, assumptions"),
        ("[1]", r"mine\.yaml:1: needs a list under 'prices', or 'assumptions'"),
        ("prices:\n  - {provider: a, machine: b}", r":2: prices\[0\] lacks usd_per_hour"),
        (
            "prices:\n  - {provider: a, machine: b, usd_per_hour: -1}",
            r":2: prices\[0\]\.usd_per_hour is -1; .*positive",
        ),
        (
            "prices:\n  - {provider: a, machine: b, usd_per_hour: 1, devise: cpu}",
            r"has 'devise'; .*did you mean \"device\"",
        ),
        (
            "prices:\n  - {provider: a, machine: b, usd_per_hour: 1, device: tpu}",
            r"device is 'tpu'; .*cpu, cuda, rocm",
        ),
        ("prices:\n  - {provider: a, provider: a, machine: b, usd_per_hour: 1}", r"has 'provider' twice"),
        ("prices:\n  - 3", r":2: prices\[0\] must be a mapping with provider"),
        ("assumptions: {audited_share: 2}", r":1: assumptions\.audited_share is 2; .*from 0 to 1"),
        ("prices: [", r"mine\.yaml:1: not YAML: "),
        *(
            (f"prices:\n  - provider: a\n    machine: b\n{entry}\n", message)
            for entry, message in (
                ("    usd_per_hour: 1\n    cpus: 064", r":5: prices\[0\]\.cpus is 064, .*another number"),
                ("    usd_per_hour: 1:30", r":4: prices\[0\]\.usd_per_hour is 1:30, .*another number"),
                ("    usd_per_hour: 0x10", r":4: .*0x10, .*another number"),
                (
                    "    usd_per_hour: !!python/object:os.system ls",
                    r":4: .*could not determine a constructor",
                ),
                ("    usd_per_hour: !mine 1", r":4: .*could not determine a constructor"),
                ("    usd_per_hour: " + "9" * 5000, r":4: .{80,300}$"),
                ("    usd_per_hour: [1, 2]", r":4: prices\[0\]\.usd_per_hour is a sequence"),
                ("    usd_per_hour: 1\n    as_of: 2026-02-30", r":5: .*2026-02-30, which cannot be read"),
                ("    ? [x, y]\n    : 1", r":4: .*a key that is no plain text"),
            )
        ),
        ("prices:\n  - " + "[" * 5000, r":2: not YAML: nested too deeply"),
        ('prices:\n  - {provider: "a\x07"}', "not YAML"),
        ("a: &a [" + "1, " * 20_000 + "]", r":1: not YAML: more than 10,000"),
    ],
)
def test_a_bad_list_names_file_line_entry_and_value(tmp_path: Path, text: str, message: str) -> None:
    """The message says which file, line and entry, and what is allowed."""
    with pytest.raises(PriceError, match=message):
        load_prices(write(tmp_path, text))


def test_all_faults_of_a_list_come_in_one_run(tmp_path: Path) -> None:
    """Two wrong prices and a wrong assumption are three lines."""
    entry = "  - {provider: a, machine: %s, usd_per_hour: 0}\n"
    path = write(tmp_path, "prices:\n" + entry % "x" + entry % "y" + "assumptions: {one_off_usd: -1}\n")

    with pytest.raises(PriceError) as caught:
        load_prices(path)

    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3", "4"]


def test_a_machine_listed_twice_is_refused(tmp_path: Path) -> None:
    """Within one file a machine has one price."""
    entry = "  - {provider: a, machine: b, usd_per_hour: 1}\n"

    with pytest.raises(PriceError, match=r":3: prices\[1\]: 'a: b' is listed twice"):
        load_prices(write(tmp_path, "prices:\n" + entry * 2))


def test_a_date_is_kept_as_it_is_written(tmp_path: Path) -> None:
    """YAML reads 2026-06-01 as a date; in a list of prices it is when the price was read, as text."""
    path = write(tmp_path, "prices:\n  - {provider: a, machine: b, usd_per_hour: 1, as_of: 2026-06-01}\n")

    assert load_prices(path).prices[-1].as_of == "2026-06-01"
