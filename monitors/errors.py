"""The exceptions of the monitors.

MonitorError
├── StoreError           the database is away, locked, full or of another version
│   └── StaleLeaseError  another controller has taken over: this one must not write any more
└── AuditError           numbers that cannot be scored
"""


class MonitorError(Exception):
    """Root of everything that the monitors raise on purpose."""


class StoreError(MonitorError):
    """The store cannot do what was asked; the message names the database (no password) and the way out."""


class StaleLeaseError(StoreError):
    """A writer whose fencing token is no longer the newest; nothing was written."""


class AuditError(MonitorError, ValueError):
    """Inputs of an audit that do not fit together."""
