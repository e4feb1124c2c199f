"""The store: one database for records, scores, commands, routes, leases and the event log.

Ingress, auditor and controller write to it at the same time. SQLite is the default; Postgres comes by
URL and runs the same statements.
"""

from __future__ import annotations

from sentei.monitors.control import ControlPlane
from sentei.monitors.measurements import Measurements


class Store(Measurements, ControlPlane):
    """Everything that survives a restart; open it with `Store.open(url)`, once per process."""
