"""YAML text to a policy, or every error at once; each error text has its test here."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from sentei.policies.schema.load import MAX_FAULTS, PolicyError, load_policy, policy_json_schema
from tests.strategies_policy import TEXTS, TWO_SLICES, make_policy, to_text


def errors_of(text: str) -> list[str]:
    """The errors of a text, as lines."""
    with pytest.raises(PolicyError) as caught:
        load_policy(text, "p.yaml")
    return [str(item) for item in caught.value.errors]


def edited(*path: str | int, value: Any = None, drop: bool = False) -> str:
    """TWO_SLICES with the value at the path replaced or dropped."""
    document = yaml.safe_load(TWO_SLICES)
    place = document["spec"]
    for part in path[:-1]:
        place = place[part]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return yaml.safe_dump(document, sort_keys=False)


def with_guardrail(**fields: Any) -> str:
    """TWO_SLICES with one more guardrail; None drops a field."""
    item = {
        "id": "more",
        "value": "audit.token_disagreement",
        "bound": {"excess_over_floor": 0.1},
        "test": "betting_paired",
        "action": "rollback_slice",
    } | fields
    document = yaml.safe_load(TWO_SLICES)
    document["spec"]["guardrails"]["items"].append({k: v for k, v in item.items() if v is not None})
    return yaml.safe_dump(document, sort_keys=False)


def test_a_good_text_loads() -> None:
    """The policy of the tests is itself without fault, and durations are seconds."""
    policy = load_policy(TWO_SLICES)

    assert policy.metadata.name == "two-slices"
    assert policy.spec.data.monitor_lease == 10.0
    assert policy.spec.data.no_data.last == "rollback"


def test_an_error_names_file_line_path_value_and_the_nearest_key() -> None:
    """An unknown key is told with its line and the known key that was probably meant."""
    text = TWO_SLICES.replace("min_units: 10", "min_unit: 10")
    with pytest.raises(PolicyError) as caught:
        load_policy(text, "p.yaml")

    line = text.splitlines().index("  advance: {need: all_safe, min_unit: 10}") + 1
    unknown, missing = caught.value.errors
    assert (unknown.file, unknown.line, unknown.path) == ("p.yaml", line, "spec.advance.min_unit")
    assert 'unknown key "min_unit"; allowed: need, min_units' in unknown.message
    assert unknown.message.endswith('did you mean "min_units"?')
    assert '"min_units" is required' in missing.message


def test_all_errors_come_in_one_run_and_in_the_order_of_lines() -> None:
    """Structure and cross-field rules of different sections are reported together."""
    text = (
        TWO_SLICES.replace("range: [200, 400]", "range: [210, 400]")
        .replace("share: 90%", "share: 40%")
        .replace("hold_min: 10s, max: 1h", "hold_mn: 10s, max: 1")
        .replace("value: serve.failed", "value: serve.fail")
        .replace("max_age: 60s", "max_age: 60")
        .replace("test: betting_paired, action: previous_rung", "test: betting_pair, action: previous_rung")
    )

    errors = errors_of(text)

    assert len(errors) >= 5
    assert [int(e.split(":")[1]) for e in errors] == sorted(int(e.split(":")[1]) for e in errors)
    for part in (
        "gap: this bucket",
        'did you mean "hold_min"',
        "must be 'betting'",
        "a duration is a number",
    ):
        assert any(part in error for error in errors), part


def test_an_unknown_key_hides_no_rule() -> None:
    """A typo is reported beside the broken rules of its own section."""
    errors = errors_of(
        TWO_SLICES.replace("range: [200, 400]", "range: [150, 400]").replace("pin: control", "pinn: control")
    )

    assert any('did you mean "pin"' in error for error in errors)
    assert any("overlap: this bucket must start at 200" in error for error in errors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a policy is a mapping that starts with apiVersion"),
        ("- 1", "a policy is a mapping that starts with apiVersion"),
        ("a: [", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: b: c", "not YAML: mapping values are not allowed here"),
        ("a: 1\na: 2", 'key "a" is given twice; first in line 1'),
        ("? [1]\n: 2", "a key must be plain text; merge keys (<<) are not supported"),
        ("x: &x {a: 1}\ny: {<<: *x}", "a key must be plain text; merge keys (<<) are not supported"),
        ("a: &a [*a]", "an alias that contains itself, or more than 5000 values"),
        ("a: 2026-11-24", "dates, binary and tagged values are not allowed"),
        ("a: !!python/none x", "cannot be read: could not determine a constructor"),
        ("a: !!int x", "cannot be read"),
        ("x" * 50_001, "a policy has at most 50000 characters"),
        ("a: [" + "1," * 20_000 + "]", "a policy has at most 5000 values"),
        ("apiVersion: sentei/v2", "must be 'sentei/v1' (found 'sentei/v2')"),
        ("kind: RolloutPolicy", '"apiVersion" is required'),
        ("spec: 3", "is required: a mapping of sections (found 3)"),
        ("spec: {}", '"breaker" is required'),
        ("specc: {}", 'unknown key "specc"; allowed: apiVersion, kind, metadata, spec; did you mean "spec"?'),
    ],
)
def test_what_is_no_policy_at_all_is_told_so(text: str, message: str) -> None:
    """Broken YAML, doubled keys, odd values, missing sections: errors with a text, no other exception."""
    assert any(message in error for error in errors_of(text)), errors_of(text)


def test_a_tower_of_lists_is_refused_before_python_gives_up() -> None:
    """Depth is limited, so no text can exhaust the stack."""
    errors = errors_of("a: " + "[" * 5000 + "]" * 5000)

    assert any("not YAML: nested too deeply" in error for error in errors)


def test_a_bomb_of_aliases_is_one_error() -> None:
    """Nine aliases of nine aliases nine times over end at a limit, not in memory."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]

    errors = errors_of("\n".join(lines))

    assert len(errors) == 1
    assert "more than 5000 values" in errors[0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "max_age"), 60, "a duration is a number with a unit"),
        (("data", "max_age"), "5 minutes", "a duration is a number with a unit"),
        (("stages", 1, "share"), "150%", "a share is a number from 0 to 1"),
        (("stages", 1, "share"), True, "a share is a number from 0 to 1"),
        (("guardrails", "items", 2, "bound"), {"max": 0}, "a number above 0 is wanted"),
        (("guardrails", "items", 2, "bound"), {"max": "x"}, "a number above 0 is wanted"),
        (("advance", "need"), "promote", "must be 'all_safe' or 'no_harm'"),
        (("advance", "on_max"), "promote", "must be 'hold' or 'rollback'"),
        (("schedule", "freeze"), ["weekend"], "a freeze window looks like"),
        (("schedule", "freeze"), ["Fri 25:00-Mon 08:00 UTC"], "is no day and time of a week"),
        (("schedule", "freeze"), ["Fri 16:00-Fri 16:00 UTC"], "a freeze window must not be empty"),
        (
            ("schedule", "freeze"),
            ["Fri 16:00-Mon 08:00 Mars/Olympus"],
            "is no time zone that this machine knows",
        ),
        (("mode",), "replay", "must be 'enforce' or 'advise' (found 'replay')"),
        (("mode",), {}, "must be 'enforce' or 'advise' (found {})"),
        (("mode",), ["replay"], "must be 'enforce' or 'advise' (found ['replay'])"),
        (("assignment",), {"salt": "s", "unit": {"a": 1}}, "must be 'session_id' (found {'a': 1})"),
        (("assignment",), {"salt": "s", "unit": "api_key"}, "must be 'session_id' (found 'api_key')"),
        (("assignment",), {"salt": "s", "units": "x"}, 'allowed: unit, salt; did you mean "unit"?'),
        (("assignment",), {"salt": "a\nb"}, "must be printable text"),
        (("ladder", 0), {"id": "mild", "attention": {}}, 'unknown key "attention"; allowed: id'),
        (("rollback",), {"keep_warm": "30m"}, 'unknown key "keep_warm"; allowed: retry'),
        (("ladder",), [{"id": "mild"}, {"id": "mild"}], 'rung id "mild" is used 2 times'),
        (("ladder",), [{"id": "dense"}, {"id": "mild"}, {"id": "medium"}], "dense is rung 0 of every ladder"),
        (("slices", "buckets", 1, "range"), [100, 100], "with to above from"),
        (("slices", "buckets", 0, "range"), [5, 100], "gap: this bucket must start at 0"),
        (("slices", "buckets", 0, "max_rung"), "mild", "a pinned slice is always dense"),
        (
            ("slices", "buckets", 1, "max_rung"),
            "mils",
            'no rung of this name; allowed: medium, mild; did you mean "mild"?',
        ),
        (("slices", "buckets"), [{"id": "a", "range": [0, 9], "pin": "control"}], "all slices are pinned"),
        (("stages", 3, "share"), 1.0, "must stay below 1"),
        (("stages", 3, "share"), 0.1, "falls below the 0.5"),
        (("stages", 1, "rung"), "medium", "share and rung both change"),
        (("stages", 2, "rung"), "mild", "neither share nor rung changes"),
        (("stages", 3, "rung"), "mild", 'is milder than "medium"'),
        (("stages", 1, "rung"), "bold", "no rung of this name"),
        (("stages", 1, "bake"), "5s", "only the last stage bakes"),
        (("stages", 1, "max"), "10s", "must be longer than hold_min and bake"),
        (("stages", 0, "audit"), 0, "quality could never be proven"),
        (
            ("stages",),
            [{"id": "a", "share": 0, "rung": "mild"}, {"id": "b", "share": 0, "rung": "medium"}],
            "the last stage must route some traffic",
        ),
        (("guardrails", "alpha_total"), 0.001, "leaves nothing of alpha_total"),
        (("signals", 0, "column"), "kll", "no column of this name"),
        (("signals", 1, "action"), "rollback", "users changed, not quality; it may only hold"),
        (("signals", 0, "id"), "agree", 'id "agree" is used 2 times'),
        (("signals", 0, "id"), "breaker", '"breaker" is reserved'),
        (("benefit", 0, "want"), {"max": 2.5}, "must lie below 2"),
        (("data", "no_data"), {"grace": "60s", "after": "60s"}, "must be longer than grace"),
    ],
)
def test_every_rule_has_its_text(path: tuple[str | int, ...], value: Any, message: str) -> None:
    """Each broken rule is one readable error."""
    errors = errors_of(edited(*path, value=value))

    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": "audit.kk"}, "no metric of this name; allowed:"),
        ({"value": "audit.kll"}, 'did you mean "audit.kl"?'),
        ({"value": "audit.compute_ratio"}, "no metric of this name"),
        ({"bound": None}, "every guardrail needs a bound"),
        ({"bound": {}}, "give exactly one of max, excess_over_floor and ratio"),
        ({"bound": {"max": 0.1, "ratio": 2}}, "give exactly one of max, excess_over_floor and ratio"),
        ({"test": "betting"}, "a bound on excess_over_floor is tested by betting_paired"),
        ({"value": "audit.dropped_mass_mean"}, "has no noise floor; use max"),
        ({"bound": {"max": 0.1, "floor_cap": 0.1}, "test": "betting"}, "only goes with excess_over_floor"),
        ({"bound": {"max": 0.1, "over": "2s"}, "test": "betting"}, "is no time and takes no `over`"),
        ({"value": "serve.ttft_ms", "bound": {"max": 0.1}, "test": "beta_binomial"}, "needs `over`"),
        ({"bound": {"max": 0.1}, "test": "beta_binomial"}, "is no event; use betting"),
        ({"bound": {"max": 0.99}, "test": "betting"}, "must lie in 0.0001 to 0.5 share"),
        ({"bound": {"max": 1e-5}, "test": "betting"}, "must lie in 0.0001 to 0.5 share"),
        ({"value": "audit.kl", "bound": {"excess_over_floor": 1.5}}, "must lie in 0.0002 to 1 nats"),
        ({"bound": {"excess_over_floor": 0.1, "floor_cap": 1.0}}, "must lie below 1 share"),
        ({"action": "freeze"}, "only the sample-ratio test may freeze"),
        ({"per": "all", "action": "rollback"}, "quality belongs to a slice"),
        ({"per": "all"}, "a guardrail over all slices can only rollback"),
        ({"action": "promote"}, "must be 'previous_rung', 'rollback_slice', 'rollback' or 'freeze'"),
        ({"value": "assignment"}, "the sample-ratio test has no bound"),
        ({"value": "assignment", "bound": None}, "assignment is tested by split_ramp"),
        ({"value": "assignment", "bound": None, "test": "split_ramp"}, "needs its own alpha"),
        (
            {"value": "assignment", "bound": None, "test": "split_ramp", "alpha": 0.001},
            "can freeze or rollback",
        ),
        ({"value": "assignment", "bound": None, "advance": "no_harm"}, "leave advance out"),
    ],
)
def test_every_rule_of_guardrails_has_its_text(fields: dict[str, Any], message: str) -> None:
    """A guardrail that could not work is refused, with what is allowed."""
    errors = errors_of(with_guardrail(**fields))

    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("min_units: 0250", "YAML reads this as another number"),
        ("min_units: 4:10", "YAML reads this as another number"),
        ("min_units: 0x10", "YAML reads this as another number"),
        ("min_units: yes", "YAML reads this as true or false"),
        ("min_units: true", "must be a valid integer"),
    ],
)
def test_a_number_that_yaml_reads_as_another_is_refused(line: str, message: str) -> None:
    """Octal, hexadecimal, base 60 and yes are slips of the pen, and never another number."""
    errors = errors_of(TWO_SLICES.replace("min_units: 10", line))

    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("breaker", "variant", "failure_share"), 0, "must be above 0"),
        (("breaker", "variant", "window"), "0s", "at least 100ms"),
        (("data", "max_age"), "0s", "at least 100ms"),
        (("data", "monitor_lease"), "365d", "at most 1h"),
        (("schedule", "check_every"), "0s", "at least 100ms"),
        (("audit", "values"), {"kl": {"cap": 1e9}}, "at most 20 nats"),
        (("guardrails", "items", 0, "bound", "ratio"), True, "a number above 0 is wanted"),
        (("stages", 1, "approval"), {"by": [""]}, "a name has 1 to 128 characters"),
        (("stages", 1, "approval"), {"by": [" ann"]}, "no blanks around it"),
        (("stages", 1, "approval"), {"by": ["\u0430nn"]}, "mixes letters of CYRILLIC and LATIN"),
        (("stages", 1, "approval"), {"by": ["\uff41nn"]}, "signs that look like others"),
    ],
)
def test_a_value_that_could_not_be_meant_is_refused(
    path: tuple[str | int, ...], value: Any, message: str
) -> None:
    """Limits that protect nobody, and approvers whom nobody can tell apart, are errors with their place."""
    errors = errors_of(edited(*path, value=value))

    assert any(message in error for error in errors), errors


def test_alpha_may_be_a_percentage() -> None:
    """alpha_total: 5% is what it says."""
    policy = load_policy(edited("guardrails", "alpha_total", value="5%"))

    assert policy.spec.guardrails.alpha_total == 0.05


@pytest.mark.parametrize(
    ("version", "name"),
    [("argoproj.io/v1alpha1", "Argo Rollouts"), ("flagger.app/v1beta1", "Flagger")],
)
def test_a_policy_of_another_tool_gets_one_sentence(version: str, name: str) -> None:
    """Who brings a file of Argo Rollouts or Flagger is told where its words are explained."""
    errors = errors_of(f"apiVersion: {version}\nkind: Canary\nspec: {{a: 1}}\n")

    assert len(errors) == 1
    assert name in errors[0]
    assert "docs/guides/from-argo-and-flagger.md" in errors[0]


def test_a_stage_without_traffic_needs_a_quality_guardrail() -> None:
    """Otherwise nothing would be judged in shadow, and it would pass unseen."""
    document = yaml.safe_load(TWO_SLICES)
    items = document["spec"]["guardrails"]["items"]
    document["spec"]["guardrails"]["items"] = [
        item for item in items if not item["value"].startswith("audit")
    ]

    errors = errors_of(yaml.safe_dump(document))

    assert any("a stage without traffic needs a guardrail on an audit.* value" in error for error in errors)
    assert any("no guardrail is asked for proof of safety" in error for error in errors)


def test_a_policy_survives_its_way_through_yaml() -> None:
    """What is dumped loads to an equal policy with the same digest."""
    policy = make_policy()

    again = load_policy(to_text(policy))

    assert again == policy
    assert again.digest == policy.digest


def test_the_digest_sees_meaning_and_not_spelling() -> None:
    """Comments, key order and ways to write a unit keep the digest; any other value changes it."""
    policy = load_policy(TWO_SLICES)
    same = load_policy("# a comment\n" + TWO_SLICES.replace("max: 1h", "max: 60m").replace("50%", "0.5"))
    other = load_policy(TWO_SLICES.replace("min_units: 10", "min_units: 11"))

    assert same.digest == policy.digest
    assert other.digest != policy.digest


def test_a_policy_built_in_code_keeps_the_same_rules() -> None:
    """The rules hold for the model itself, not only for files."""
    with pytest.raises(ValueError, match=r"spec\.stages\[3\]\.share: must stay below 1"):
        type(make_policy()).model_validate(yaml.safe_load(edited("stages", 3, "share", value=1.0)))


def test_editors_get_a_json_schema() -> None:
    """The schema names the sections, forbids unknown keys and shows how a duration is written."""
    schema = policy_json_schema()

    assert set(schema["required"]) == {"apiVersion", "kind", "metadata", "spec"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Data"]["properties"]["max_age"]["type"] == "string"
    assert "finally" in schema["$defs"]["NoData"]["properties"]


def schema_errors(text: str) -> list[str]:
    """What an editor that knows the schema says of a text."""
    validator = jsonschema.Draft202012Validator(policy_json_schema())
    validator.check_schema(validator.schema)
    return [f"{item.json_path}: {item.message}" for item in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: yaml.safe_load(text)["metadata"]["name"])
def test_the_json_schema_accepts_what_loads(text: str) -> None:
    """No editor underlines a shipped policy."""
    assert schema_errors(text) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("advance", "min_unit"), 5, "'min_unit' was unexpected"),
        (("advance", "need"), "promote", "'promote' is not one of"),
        (("data", "max_age"), 60, "$.spec.data.max_age: 60 is not of type 'string'"),
        (("data", "max_age"), "5 minutes", "does not match"),
        (("stages", 1, "share"), "half", "$.spec.stages[1].share"),
        (("stages", 1, "share"), 1.5, "$.spec.stages[1].share"),
        (("ladder",), [], "$.spec.ladder"),
        (("guardrails", "items", 0, "test"), "t-test", "'t-test' is not one of"),
    ],
)
def test_the_json_schema_underlines_what_does_not_load(
    path: tuple[str | int, ...], value: Any, words: str
) -> None:
    """A wrong key, word, unit or number is wrong for the editor and for the loader."""
    text = edited(*path, value=value)

    assert any(words in error for error in schema_errors(text)), schema_errors(text)
    assert errors_of(text)


def test_a_flood_of_faults_is_counted_and_not_listed() -> None:
    """A hundred are shown in the order of their lines, then how many more there are."""
    text = TWO_SLICES + "\n".join(f"k{i}: {i}" for i in range(250))

    with pytest.raises(PolicyError) as caught:
        load_policy(text, "p.yaml")

    assert len(caught.value.errors) == MAX_FAULTS + 1
    assert str(caught.value).endswith("and 150 more faults; mend these first")


def test_a_printed_fault_is_one_short_line() -> None:
    """A key of a paragraph, or with signs that a terminal would obey, is shortened and written out."""
    with pytest.raises(PolicyError) as caught:
        load_policy(TWO_SLICES + '"\\u001b[2J": 1\n"' + "x" * 900 + '": 1\n', "p.yaml")

    lines = [str(item) for item in caught.value.errors]
    assert "\\x1b[2J" in lines[0]
    assert all(line.isprintable() and len(line) < 900 for line in lines)
