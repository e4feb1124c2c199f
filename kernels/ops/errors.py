"""Errors of the attention operations.

OpsError(ValueError)
├── MaskError       a block mask that breaks its contract, or does not fit the tensors
├── ShapeError      tensors or options that do not fit together
└── BackendError    a backend that is unknown, or that refuses this call
"""

from sentei.errors import SenteiError


class OpsError(SenteiError, ValueError):
    """Root of the errors raised by sentei.kernels.ops."""


class MaskError(OpsError):
    """A block mask breaks its contract, or does not fit the tensors beside it."""


class ShapeError(OpsError):
    """Tensors or options do not fit together."""


class BackendError(OpsError):
    """A backend is unknown, or refuses this call; the message says why."""
