"""A writer of its own process: `python -m tests.busy_writer URL` writes until its stdin ends.

Each round is a request, its audit and an event, in this order. The last line is JSON: how many rounds, and
the longest one in seconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from sentei.monitors.events import EventLog
from sentei.monitors.store import Store
from sentei.policies.engine import initial_state
from sentei.policies.state import state_to_json
from tests.fakes_records import ROLLOUT, make_audit, make_request
from tests.stories_rollout import begin


def main(url: str) -> None:
    """Write as fast as it goes."""
    end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
    with Store.open(url) as store:
        policy = begin(store).policy
        token = store.acquire_lease("writer", ttl_s=60.0, now_s=0.0)
        assert token is not None
        log, rounds, longest_s = EventLog(store), 0, 0.0
        state = state_to_json(initial_state(policy, ROLLOUT, 0.0)).decode()
        while not end.is_set():
            began_s = time.perf_counter()
            store.add_request(make_request(rounds))
            store.add_audit(make_audit(rounds))
            log.append(ROLLOUT, "evidence", payload={}, state_after=state, token=token, at_s=float(rounds))
            longest_s, rounds = max(longest_s, time.perf_counter() - began_s), rounds + 1
            if rounds == 1:
                print("writing", flush=True)
    print(json.dumps({"rounds": rounds, "longest_s": longest_s}))


if __name__ == "__main__":
    main(sys.argv[1])
