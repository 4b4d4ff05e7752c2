"""Approvals from MLflow's own pages: a receiver of its webhooks.

A person sets the tag `tuneline.approve` of a version to `WHO: REASON` in MLflow's UI. MLflow sends
the event `model_version_tag.set`, signed with the webhook's secret (HMAC-SHA256 over delivery id,
time and body); the receiver checks that and does what `tuneline approve` does. An event that is
delivered twice, or recorded and sent again, approves nothing new.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from tuneline.errors import RegistryError
from tuneline.progress import report
from tuneline.register.approve import approve
from tuneline.register.tags import TAG

APPROVE: Final = f"{TAG}approve"
"""The tag that a person sets."""
SECRET_VARIABLE: Final = "TUNELINE_WEBHOOK_SECRET"
_SIGNATURE: Final = "x-mlflow-signature"
_DELIVERY: Final = "x-mlflow-delivery-id"
_TIME: Final = "x-mlflow-timestamp"
_LONGEST_BYTES: Final = 65_536
_OLDEST_SECONDS: Final = 300.0
"""Between MLflow's clock and ours, its three repetitions included."""
_SOCKET_SECONDS: Final = 10


def receive(
    headers: Mapping[str, str], body: bytes, secret: str, now_seconds: float
) -> tuple[HTTPStatus, str]:
    """Check one delivery and approve what it asks for.

    Args:
        headers: of the request, `X-MLflow-*` among them.
        body: the JSON as it was sent.
        secret: that the webhook was made with.
        now_seconds: since 1970.

    Returns:
        The answer. MLflow repeats a delivery that is answered with 5xx.
    """
    headers = {name.lower(): value for name, value in headers.items()}
    sent = headers.get(_TIME, "")
    signed = f"{headers.get(_DELIVERY, '')}.{sent}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    expected = f"v1,{base64.b64encode(digest).decode()}"
    if not hmac.compare_digest(expected.encode(), headers.get(_SIGNATURE, "").encode()):
        return HTTPStatus.UNAUTHORIZED, f"the signature does not fit {SECRET_VARIABLE}"
    if not sent.isdigit() or abs(now_seconds - int(sent)) > _OLDEST_SECONDS:
        return HTTPStatus.UNAUTHORIZED, f"the delivery is not of the last {_OLDEST_SECONDS:.0f} s"
    try:
        event = json.loads(body)
        kind = f"{event['entity']}.{event['action']}"
        data: dict[str, Any] = event["data"]
        if kind != "model_version_tag.set" or data["key"] != APPROVE:
            return HTTPStatus.OK, "nothing to do"
        name, version, value = str(data["name"]), int(data["version"]), str(data["value"])
    except (ValueError, KeyError, TypeError) as error:
        return HTTPStatus.BAD_REQUEST, f"not an event of MLflow: {error}"
    by, separator, reason = (part.strip() for part in value.partition(":"))
    if not (by and separator and reason):
        text = f"{name} version {version}: {APPROVE} is '{value[:60]}': WHO: REASON is needed"
        report(text)
        return HTTPStatus.UNPROCESSABLE_ENTITY, text
    try:
        approve(name, version, by=by, reason=reason)
    except RegistryError as error:
        report(str(error))
        return HTTPStatus.CONFLICT, str(error)
    return HTTPStatus.OK, f"{name} version {version} is approved by {by}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]  # what `serve` starts
    timeout = _SOCKET_SECONDS

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LONGEST_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_LONGEST_BYTES} bytes")
            return
        body = self.rfile.read(int(length))
        self._answer(*receive(dict(self.headers.items()), body, self.server.secret, time.time()))

    def _answer(self, status: HTTPStatus, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args  # approvals are reported; scanners are not


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, secret: str) -> None:
        super().__init__((host, port), _Handler)
        self.secret = secret


def serve(host: str, port: int, secret: str) -> None:
    """Receive deliveries until the process is stopped.

    MLflow sends webhooks to `https` only: put this behind the cluster's ingress.

    Args:
        host: to listen on.
        port: to listen on; 0 takes a free one.
        secret: that the webhook was made with.
    """
    with _Server(host, port, secret) as server:
        report(f"waiting for approvals on http://{host}:{server.server_address[1]}")
        server.serve_forever()
