"""The folders at the root do not shadow what Transformers looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_transformers_model_imports_from_the_root() -> None:
    """A Transformers model imports with the repository's root, and so our `kernels/`, first on the path."""
    code = "from transformers import LlamaForCausalLM; import sentei.kernels; print('ok')"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


def test_kernels_package_is_free_of_imports() -> None:
    """`kernels/__init__.py` has no code and no version: a second import under its bare name is harmless."""
    text = (ROOT / "kernels" / "__init__.py").read_text()

    assert "import " not in text
    assert "__version__" not in text
