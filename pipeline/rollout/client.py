"""The operations API over HTTP: what the CLI and the demo use to start, watch and steer a rollout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import httpx

from sentei.errors import SenteiError

ADMIN_TOKEN_VARIABLE = "SENTEI_ADMIN_TOKEN"
URL_VARIABLE = "SENTEI_URL"
DEFAULT_URL = "http://127.0.0.1:8000"


class AdminError(SenteiError):
    """The operations API refused, or cannot be reached; the message names the address and the way out."""

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.is_absent = unreachable


class AdminClient:
    """A thin client of `/admin/v1`; every call returns the decoded JSON or raises `AdminError`."""

    def __init__(self, url: str | None = None, token: str | None = None, *, timeout_s: float = 30.0) -> None:
        self.url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        token = token or os.environ.get(ADMIN_TOKEN_VARIABLE) or ""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def start_rollout(
        self,
        policy_text: str,
        source: str = "policy.yaml",
        *,
        release_quarantine: bool = False,
        replace: bool = False,
    ) -> dict[str, Any]:
        """Start a rollout of a policy's YAML text; returns at least `rollout_id`.

        A policy that was rolled back is quarantined by digest and rung until somebody releases it by hand. A
        promoted rollout is followed only with `replace`: its share of sparse ends then.
        """
        body = {
            "policy": policy_text,
            "source": source,
            "release_quarantine": release_quarantine,
            "replace": replace,
        }
        return self._call("POST", "/admin/v1/rollouts", body)

    def rollouts(self) -> list[dict[str, Any]]:
        """Return every rollout, newest first."""
        found: list[dict[str, Any]] = self._call("GET", "/admin/v1/rollouts")["rollouts"]
        return found

    def rollout(self, rollout_id: str) -> dict[str, Any]:
        """Return one rollout's state, verdicts and reason."""
        return self._call("GET", f"/admin/v1/rollouts/{rollout_id}")

    def events(self, rollout_id: str, *, before: int | None = None, limit: int = 100) -> dict[str, Any]:
        """Return a page of decisions, oldest first; the answer's `before` asks for the page before it."""
        older = "" if before is None else f"&before={before}"
        return self._call("GET", f"/admin/v1/rollouts/{rollout_id}/events?limit={limit}{older}")

    def command(self, rollout_id: str, kind: str, *, reason: str = "") -> dict[str, Any]:
        """Send an operator's order: pause, resume, promote, approve, abort or retry; the token says whose."""
        body = {"kind": kind, "reason": reason}
        return self._call("POST", f"/admin/v1/rollouts/{rollout_id}/commands", body)

    def edit_policy(self, rollout_id: str, policy_text: str, source: str = "policy.yaml") -> dict[str, Any]:
        """Give a running rollout a safer policy; returns the changes, or raises with every unsafe field."""
        body = {"policy": policy_text, "source": source}
        return self._call("POST", f"/admin/v1/rollouts/{rollout_id}/policy", body)

    def plant_fault(self, fault: Mapping[str, Any] | None) -> None:
        """Plant a silent fault in the sparse variant, or take it out; only an app for drills allows it."""
        self._call("PUT", "/admin/v1/fault", {"fault": None if fault is None else dict(fault)})

    def are_audits_done(self) -> bool:
        """Whether the auditor says that nothing is left to replay; one that does not answer says nothing."""
        auditor: dict[str, Any] = self._call("GET", "/admin/v1/status")["workers"].get("auditor", {})
        return bool(auditor.get("waiting") == 0)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise AdminError(
                f"{self.url} does not answer ({type(error).__name__}: {error}); "
                f"is the app up? Name another address with --url or ${URL_VARIABLE}",
                unreachable=True,
            ) from error
        if response.is_success:
            decoded: dict[str, Any] = response.json()
            return decoded
        raise AdminError(f"{method} {self.url}{path}: HTTP {response.status_code}: {_message(response)}")


def _message(response: httpx.Response) -> str:
    """Return what an OpenAI-shaped error says, or the beginning of whatever came."""
    try:
        error = response.json()["error"]
        return str(error["message"]) + _allowed_token(response)
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def _allowed_token(response: httpx.Response) -> str:
    forbidden = response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
    return f" (give the token with ${ADMIN_TOKEN_VARIABLE})" if forbidden else ""
