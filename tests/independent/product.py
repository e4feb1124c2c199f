"""What is under judgement: `decide`, store, runner and the adapter's loader, as they are or as they were.

Everything else in this folder is written anew and knows nothing of ours. The same rows run on an older
checkout (`before.py`), whose modules have other names and whose records have fewer fields.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any


def _find(*names: str) -> Any:
    """The first of some modules that is there."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(names[-1])


engine: Any = import_module("sentei.policies.engine")
signals: Any = import_module("sentei.policies.signals")
load_policy: Any = _find("sentei.policies.schema.load", "sentei.policies.load").load_policy
IS_NOW = hasattr(signals, "SliceLengths")  # units and stages came with it


def tell(kind: Any, **values: Any) -> Any:
    """A value of that dataclass; what an older version does not know of the world it is not told."""
    known = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def runner() -> Any:
    """The module that runs a rollout on a store."""
    return _find("sentei.pipeline.rollout.runner", "sentei.pipeline.rollout")


def store_class() -> Any:
    """The store."""
    return import_module("sentei.monitors.store").Store


def records() -> Any:
    """What is written down."""
    return import_module("sentei.monitors.records")
