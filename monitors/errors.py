"""The exceptions of the monitors.

MonitorError
├── StoreError           the database is away, locked, full or of another version
│   ├── StoreUrlError    the address is none
│   ├── StoreVersionError    another version made it, or it is to be upgraded first
│   └── StaleLeaseError  another controller has taken over: this one must not write any more
└── AuditError           numbers that cannot be scored
"""

from sentei.errors import SenteiError


class MonitorError(SenteiError):
    """Root of everything that the monitors raise on purpose."""


class StoreError(MonitorError):
    """The store cannot do what was asked; the message names the database (no password) and the way out."""

    is_absent = True


class StoreUrlError(StoreError):
    """An address that no database can have."""

    is_absent = False


class StoreVersionError(StoreError):
    """The store's tables are those of another version; the message has the command to run."""


class StaleLeaseError(StoreError):
    """A writer whose fencing token is no longer the newest; nothing was written."""


class AuditError(MonitorError, ValueError):
    """Inputs of an audit that do not fit together."""
