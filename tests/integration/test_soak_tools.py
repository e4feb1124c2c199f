"""The soak's own tools: what they take for an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.machine import wait_for
from tests.soak.pressure import Caller


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - the name is the library's

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A server that knows no path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NotFound)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("what", "is_answer"), [("honest", False), ("healthz", False), ("abort", True)])
def test_not_found_answers_an_abort_alone(url: str, what: str, is_answer: bool) -> None:
    """An abort of no rollout is a 404 when all is well; to others a 404 is a fault, and no time counts."""
    with Caller(url, what) as caller:
        wait_for(lambda: bool(caller.took_s or caller.faults), "one answer", timeout_s=20)

    assert bool(caller.took_s) is is_answer
    assert all(fault == f"{what} 404" for fault in caller.faults)
    assert bool(caller.faults) is not is_answer
