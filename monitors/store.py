"""The store: one database for records, scores, commands, routes, leases and the event log.

Ingress, auditor and controller write to it at the same time. SQLite is the default; Postgres comes by
URL and runs the same statements.
"""

from __future__ import annotations

from sentei.monitors.measurements import Measurements
from sentei.monitors.steering import Steering


class Store(Measurements, Steering):
    """Everything that survives a restart; open it with `Store.open(url)`, once per process."""
