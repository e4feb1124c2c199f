"""What the documents say is so: policies load, commands and files exist, the page of figures stays short."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sentei.pipeline.cli.app import app
from sentei.pipeline.integrations.shapes import sign
from sentei.policies.schema.load import load_policy
from sentei.serving.settings import AppArgs
from tests.strategies_policy import make_policy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guides" / "policy.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)
POLICIES = re.findall(r"```yaml\n(apiVersion: sentei/v1\n.*?)```", README, flags=re.DOTALL)
SECURITY = (ROOT / "docs" / "guides" / "security.md").read_text(encoding="utf-8")
GPU = (ROOT / "docs" / "guides" / "gpu.md").read_text(encoding="utf-8")
FOREIGN = (ROOT / "docs" / "guides" / "from-argo-and-flagger.md").read_text(encoding="utf-8")
FOREIGN_POLICIES = re.findall(r"```yaml\n(.*?)```", FOREIGN, flags=re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^sentei ((?:policy |rollout )?[a-z]+)", README, flags=re.MULTILINE)))
TARGETS = sorted(set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)))
FOLDERS = ("kernels", "policies", "monitors", "pipeline", "serving")
GROUNDS = (*FOLDERS, "docs", "tests", "infra", "changes")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in GROUNDS for page in (ROOT / folder).rglob("*.md"))])
MODULES = sorted(module for folder in FOLDERS for module in (ROOT / folder).rglob("*.py"))
MEASURED_LINES_MAX = 120  # what is read in a minute or two; older runs go to docs/measured/
PROSE_COLUMNS_MAX = 110


@pytest.mark.parametrize("text", POLICIES, ids=range(len(POLICIES)))
def test_policy_in_the_readme_loads(text: str) -> None:
    """Each policy that the README shows is valid."""
    assert load_policy(text, "README.md").spec.stages


@pytest.mark.parametrize("text", SECTIONS, ids=range(len(SECTIONS)))
def test_section_in_the_policy_guide_is_valid(text: str) -> None:
    """Each section that the guide shows is one of a policy that loads."""
    section = yaml.safe_load(text)

    policy = make_policy(lambda document: document["spec"].update(section))

    assert all(getattr(policy.spec, name) for name in section)


@pytest.mark.parametrize("text", FOREIGN_POLICIES, ids=range(len(FOREIGN_POLICIES)))
def test_policy_in_the_guide_for_users_of_other_tools_lints(text: str, tmp_path: Path) -> None:
    """Each example of Argo Rollouts and Flagger is a whole policy of ours, without a fault or a warning."""
    file = tmp_path / "policy.yaml"
    file.write_text(text, encoding="utf-8")

    done = CliRunner().invoke(app, ["policy", "lint", str(file), "--json"])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["ok"], found["errors"], found["warnings"]) == (True, [], [])


def test_the_guide_for_users_of_other_tools_shows_three_policies() -> None:
    """Each block of YAML there is a policy of ours, each under a name of its own."""
    names = {yaml.safe_load(text)["metadata"]["name"] for text in FOREIGN_POLICIES}

    assert len(FOREIGN_POLICIES) == len(names) == 3


def test_the_check_that_the_security_guide_shows_takes_what_we_sign() -> None:
    """A receiver that copies it takes our deliveries, and none with another body, key or time."""
    [code] = re.findall(r"```python\n(.*?)```", SECURITY, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    is_ours, key, body, now_s = found["is_ours"], "k" * 32, b'{"id":"msg_1"}', int(time.time())
    fresh, old = sign("msg_1", body, key, now_s), sign("msg_1", body, key, now_s - 301)

    assert is_ours(fresh, body, key.encode())
    assert not is_ours(fresh, body + b" ", key.encode())
    assert not is_ours(fresh, body, b"another key of 32 bytes or more")
    assert not is_ours(old, body, key.encode())


def test_settings_in_the_guide_for_gpus_are_the_apps() -> None:
    """What the guide shows is taken by the serving settings, and asks for a GPU for each replica."""
    [text] = re.findall(r"```yaml\n(.*?)```", GPU, flags=re.DOTALL)

    assert AppArgs.model_validate(yaml.safe_load(text)).gpus_per_replica() == 1.0


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
    assert TARGETS == ["demo", "gpu", "test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_document_names_exist(page: Path) -> None:
    """A file or folder of ours that stands in backticks or behind a link is in the repository."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(GROUNDS)})/[\w./-]*)", text)
    linked = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]

    missing = [path for path in [*(ROOT / name for name in named), *linked] if not is_there(path)]

    assert missing == []


def test_documents_that_are_cited_exist() -> None:
    """No docstring, comment or page cites a document that nobody has who reads it here."""
    cited = [
        (file, name)
        for file in [*MODULES, *PAGES]
        for name in re.findall(r"\bdocs/[\w./-]+|[\w./-]+\.md\b", file.read_text(encoding="utf-8"))
    ]

    missing = [
        pair for pair in cited if not is_there(ROOT / pair[1]) and not is_there(pair[0].parent / pair[1])
    ]

    assert missing == []
    assert len(cited) >= 20


def test_the_page_of_figures_is_short() -> None:
    """`docs/measured.md` can be read: few lines, and prose that fits a screen."""
    lines = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= MEASURED_LINES_MAX
    assert [line for line in lines if not line.startswith("|") and len(line) > PROSE_COLUMNS_MAX] == []


def is_there(path: Path) -> bool:
    """Whether the path exists, or one that begins so: "docs/adr/0012" names a page by its number."""
    return path.exists() or any(path.parent.glob(f"{path.name.rstrip('.')}*"))
