"""What the README shows works: its policies load, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sentei.pipeline.cli.app import app
from sentei.policies.schema.load import load_policy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICIES = re.findall(r"```yaml\n(apiVersion: sentei/v1\n.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^sentei ((?:policy |rollout )?[a-z]+)", README, flags=re.MULTILINE)))
TARGETS = sorted(set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)))


@pytest.mark.parametrize("text", POLICIES, ids=range(len(POLICIES)))
def test_policy_in_the_readme_loads(text: str) -> None:
    """Each policy that the README shows is valid."""
    assert load_policy(text, "README.md").spec.stages


@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_the_readme_exists(command: str) -> None:
    """Each command that the README names answers `--help`."""
    done = CliRunner().invoke(app, [*command.split(), "--help"])

    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_in_the_readme_exists(target: str) -> None:
    """Each make target that the README names is in the Makefile."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_readme_shows_something() -> None:
    """The patterns above find policies, commands and targets, so that the tests are not empty."""
    assert POLICIES
    assert len(COMMANDS) >= 6
    assert TARGETS == ["demo", "test"]
