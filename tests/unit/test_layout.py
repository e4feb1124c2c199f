"""The house as `docs/architecture.md` draws it: no file without a room, no circle of imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "policies", "monitors", "pipeline", "serving")
GROUND = {"__init__.py", "home.py", "plain.py", "progress.py", "packaged.py", "models.py", "steps.py"}


def test_pipeline_itself_holds_only_its_ground() -> None:
    """A new file of `pipeline` belongs into one of its folders."""
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == GROUND


def test_no_module_imports_itself_through_others() -> None:
    """Imports form no circle, those inside functions and under TYPE_CHECKING included."""
    files = {_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}

    order = tuple(
        TopologicalSorter({name: _imports(path, files) for name, path in files.items()}).static_order()
    )

    assert set(order) == set(files)


def _name(path: Path) -> str:
    return "sentei." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path, files: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= set(files) else names | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(files)
