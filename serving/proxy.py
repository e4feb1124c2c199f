"""What stands in Ray's HTTP proxy before its own code (`front/`).

Serve finds `middlewares` by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=sentei.serving.proxy:middlewares`.
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware

from sentei.serving.front.bodies import BodyGate
from sentei.serving.front.headers import HeaderGuard
from sentei.serving.front.keeper import AnswerKeeper
from sentei.serving.front.turns import Turnstile

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "sentei.serving.proxy:middlewares"


def is_configured() -> bool:
    """Return whether Serve puts `middlewares` around its proxies; they and all replicas inherit it."""
    return os.environ.get(CALLBACK_VARIABLE) == CALLBACK


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy; the last one is the first to see a request."""
    return [Middleware(each) for each in (AnswerKeeper, Turnstile, BodyGate, HeaderGuard)]
