"""`sentei doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import psutil
import typer
from rich.markup import escape
from rich.table import Table

from sentei.pipeline.cli.extras import PACKAGE
from sentei.pipeline.cli.output import ExitCode, Output
from sentei.pipeline.home import sentei_home

PACKAGES = {  # and the extra that brings each
    "pydantic": "",
    "torch": "train",
    "transformers": "train",
    "mlflow": "train",
    "ray": "serve",
    "evidently": "serve",
    "pandas": "serve",
    "apscheduler": "serve",
}
MIN_MEMORY_GIB = 6.0
MIN_DISK_GIB = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_ok: bool
    found: str
    way_out: str = ""
    is_optional: bool = False  # only some commands want it: it being away is no fault of the machine


def run_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check Python, compiler, device, memory, disk, the home folder and packages."""
    output = Output(as_json=as_json)
    checks = [
        _python(),
        _compiler(),
        _device(),
        _memory(),
        _disk(),
        _home(),
        *(_package(name) for name in PACKAGES),
    ]
    table = Table("check", "", "found", "way out")
    for check in checks:
        table.add_row(check.name, _mark(check), check.found, escape(check.way_out))
    output.say(table)
    is_ok = all(check.is_ok or check.is_optional for check in checks)
    output.emit({"ok": is_ok, "checks": [asdict(check) for check in checks]})
    if not is_ok:
        raise typer.Exit(ExitCode.FAILED)


def _mark(check: Check) -> str:
    if check.is_ok:
        return "[green]ok[/]"
    return "[yellow]-[/]" if check.is_optional else "[red]no[/]"


def _python() -> Check:
    is_ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", is_ok, platform.python_version(), "" if is_ok else "use Python 3.11 to 3.13")


def _compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    way_out = "" if found else "install a C++ compiler; without one the slower gather backend runs"
    has_models = _package("torch").is_ok
    return Check("C++ compiler", found is not None, found or "none", way_out, is_optional=not has_models)


def _device() -> Check:
    """What `--device auto` takes for a model, in which precision, and why."""
    if not _package("torch").is_ok:
        return Check("device", False, "torch is not installed", f"pip install '{PACKAGE}[train]'", True)
    from sentei.kernels.placement import place, read_hardware

    chosen = place(read_hardware())
    return Check("device", True, f"{chosen.device.type} in {chosen.dtype_name}: {chosen.why}")


def _memory() -> Check:
    free = psutil.virtual_memory().available / 2**30
    is_ok = free >= MIN_MEMORY_GIB
    return Check("free memory", is_ok, f"{free:.1f} GiB", "" if is_ok else f"free {MIN_MEMORY_GIB:.0f} GiB")


def _disk() -> Check:
    place = sentei_home().root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    is_ok = free >= MIN_DISK_GIB
    return Check(
        "free disk", is_ok, f"{free:.1f} GiB at {place}", "" if is_ok else "set SENTEI_HOME elsewhere"
    )


def _home() -> Check:
    root = sentei_home().root
    parent = root if root.exists() else root.parent
    is_ok = os.access(parent, os.W_OK)
    return Check("home", is_ok, str(root), "" if is_ok else "set SENTEI_HOME to a folder you may write to")


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        extra = PACKAGES[name]
        way_out = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
        return Check(name, False, "not installed", way_out, is_optional=bool(extra))
