"""A connection to the API server of Kubeflow Pipelines: who asks, what is tried again, and what a
fault reads like.

It uses the generated client (`kfp_server_api`) and not `kfp.Client`, which writes the namespace
into the user's home, follows the redirect of a login page and reports that page as an empty run.

Credentials come from the environment or from files, never from the command line, where every
process of the machine could read them; they are struck out of every message.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

from tuneline.errors import ClusterError, UsageError

T = TypeVar("T")
HOST_VARIABLE: Final = "KFP_HOST"
NAMESPACE_VARIABLE: Final = "KFP_NAMESPACE"
TOKEN_VARIABLE: Final = "KFP_TOKEN"
TOKEN_FILE_VARIABLE: Final = "KFP_TOKEN_FILE"
COOKIE_VARIABLE: Final = "KFP_COOKIE"
CA_VARIABLE: Final = "KFP_CA_CERT"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
IN_CLUSTER_HOST: Final = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
"""Where the standard manifests put the API server."""
PAUSES_SECONDS: Final = (0.5, 1.0, 2.0, 4.0)
"""Before each further attempt, up to half of it more, so that clients don't come back as one."""
SETTLE_SECONDS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between looks for what a request without an answer may have made: the server makes the workflow
before the record, and both take seconds at most."""
PAGE_SIZE: Final = 100
_TIMEOUT_SECONDS: Final = (10.0, 60.0)
"""To connect, and between two bytes of an answer."""
_SHORTEST_SECRET: Final = 8
_LONGEST_MESSAGE: Final = 400
_HINT: Final = (
    f"set {TOKEN_VARIABLE}, {TOKEN_FILE_VARIABLE} or {COOKIE_VARIABLE} to a login that is valid now"
)


class Fault(ClusterError):
    """A call that failed.

    Attributes:
        status: of HTTP; 0 if there was no answer.
        passing: whether the same call may succeed later.
        sent: whether the server may have done what was asked.
    """

    def __init__(self, text: str, *, status: int, passing: bool, sent: bool) -> None:
        super().__init__(text)
        self.status = status
        self.passing = passing
        self.sent = sent


class Connection:
    """The API of one server, as one user, in one namespace.

    Args:
        host: `https://kubeflow.example.org/pipeline`; unset: KFP_HOST, or the service inside the
            cluster if this is a pod.
        namespace: of the user where KFP has several; unset: KFP_NAMESPACE, or this pod's own.
        ca_cert: file with the certificates to trust; unset: KFP_CA_CERT, or the public ones.

    Raises:
        UsageError: no host, or one that can't be used; a file is missing.
    """

    def __init__(
        self, host: str | None = None, namespace: str | None = None, ca_cert: Path | None = None
    ) -> None:
        import kfp_server_api
        import urllib3

        self.host = _host(host)
        self._given_namespace = namespace or os.environ.get(NAMESPACE_VARIABLE, "")
        self._secrets: list[str] = []
        settings: Any = kfp_server_api.Configuration(host=self.host)
        # Repeating is decided here, where it is known what may be repeated; and where a login page
        # begins, the answer ends.
        settings.retries = urllib3.Retry(0, redirect=False)
        settings.proxy = _proxy(self.host)
        if settings.proxy and (login := urlsplit(settings.proxy).netloc.rpartition("@")[0]):
            settings.proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(login))
            self._keep_secret(login)
        trusted = ca_cert or (Path(path) if (path := os.environ.get(CA_VARIABLE)) else None)
        if trusted is not None:
            if not trusted.is_file():
                raise UsageError(f"{trusted} is no file: name the certificates with --ca-cert")
            settings.ssl_ca_cert = str(trusted)
        self._identify(settings)
        cookie = _sendable(os.environ.get(COOKIE_VARIABLE, ""), COOKIE_VARIABLE, spaces=True)
        self._keep_secret(cookie)
        for pair in cookie.split(";"):
            value = pair.partition("=")[2].strip()
            if len(value) >= _SHORTEST_SECRET:  # else every `1` of a message would be struck out
                self._keep_secret(value)
        self.client = kfp_server_api.ApiClient(settings, cookie=cookie or None)
        self.pipelines = kfp_server_api.PipelineServiceApi(self.client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(self.client)
        self.runs = kfp_server_api.RunServiceApi(self.client)
        self.recurring_runs = kfp_server_api.RecurringRunServiceApi(self.client)
        self.experiments = kfp_server_api.ExperimentServiceApi(self.client)

    def _identify(self, settings: Any) -> None:
        token = _sendable(os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE)
        file = os.environ.get(TOKEN_FILE_VARIABLE, "").strip()
        if token:
            self._keep_secret(token)
            settings.api_key = {"authorization": token}
        elif file or _in_cluster_token(self.host):
            path = Path(file or _in_cluster_token(self.host))
            if not path.is_file():
                raise UsageError(f"{TOKEN_FILE_VARIABLE} names {path}, which is no file")
            settings.api_key = {"authorization": "read before each request"}
            settings.refresh_api_key_hook = self._reader(path)
        else:
            return
        settings.api_key_prefix = {"authorization": "Bearer"}

    def _reader(self, path: Path) -> Callable[[Any], None]:
        # the kubelet replaces the token long before it ends, also while a run is waited for
        from kfp.client import ServiceAccountTokenVolumeCredentials

        credentials = ServiceAccountTokenVolumeCredentials(str(path))

        def refresh(settings: Any) -> None:
            credentials.refresh_api_key_hook(settings)
            token = _sendable(settings.api_key["authorization"], str(path))
            settings.api_key["authorization"] = token
            self._keep_secret(token)

        return refresh

    def _keep_secret(self, text: str) -> None:
        if text and text not in self._secrets:
            self._secrets.append(text)

    @cached_property
    def multi_user(self) -> bool:
        """Whether this KFP keeps its users apart by namespace."""
        import kfp_server_api

        health = kfp_server_api.HealthzServiceApi(self.client)
        answer = self.call("reading the server's state", health.healthz_service_get_healthz)
        return bool(answer.multi_user)

    @cached_property
    def namespace(self) -> str:
        """As the API takes it: empty where KFP has one user only.

        Raises:
            UsageError: KFP has several users, and none is named.
        """
        if not self.multi_user:
            return ""
        own = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        if not self._given_namespace and own.is_file():
            return own.read_text(encoding="utf-8").strip()
        if not self._given_namespace:
            raise UsageError(
                f"{self.host} keeps its users apart: name the namespace with --namespace or "
                f"{NAMESPACE_VARIABLE}"
            )
        return self._given_namespace

    @property
    def pod_namespace(self) -> str:
        """Where the pods of runs are, as far as that is known here."""
        return self.namespace or self._given_namespace or "kubeflow"

    @property
    def scope(self) -> dict[str, str]:
        """The namespace as an argument of an operation."""
        return {"namespace": self.namespace} if self.namespace else {}

    def call(
        self, doing: str, function: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Call an operation that does no harm when it is done twice.

        Args:
            doing: what for, as it reads in a sentence.
            function: of the generated client.
            *arguments: of the function.
            **keywords: of the function.

        Raises:
            Fault: it failed, also when it was tried again.
        """
        for pause in (*PAUSES_SECONDS, None):
            try:
                return self.attempt(doing, function, *arguments, **keywords)
            except Fault as fault:
                if not fault.passing or pause is None:
                    raise
                _sleep(pause, fault)
        raise AssertionError("the last attempt returns or raises")

    def create(
        self,
        doing: str,
        make: Callable[..., T],
        find: Callable[[], Sequence[T]],
        drop: Callable[[T], object],
    ) -> T:
        """Make what the server has no unique name for, once.

        A request without an answer may have been carried out. So before it is sent again, the
        server is asked for what it would have made, for a while; and what came late is dropped.

        Args:
            doing: what for, as it reads in a sentence.
            make: sends the request, with the generated client's keywords.
            find: what the request has made, the oldest first.
            drop: undoes it.

        Raises:
            Fault: it failed, also when it was tried again; `sent` says whether any of the attempts
                may have been carried out.
        """
        unclear = False
        for pause in (*PAUSES_SECONDS, None):
            try:
                made = self.attempt(doing, make)
            except Fault as fault:
                unclear = unclear or fault.sent
                if fault.sent and (found := self._settle(find, fault)):
                    return found[0]
                # 500 is KFP's own word, mostly for what it refuses, and rarely for half a deed
                if pause is None or not fault.passing or fault.status == 500:
                    raise Fault(
                        str(fault), status=fault.status, passing=fault.passing, sent=unclear
                    ) from fault
                _sleep(pause, fault)
            else:
                if not unclear:
                    return made
                first, *late = find() or [made]
                for extra in late:
                    drop(extra)
                return first
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _settle(find: Callable[[], Sequence[T]], fault: Fault) -> Sequence[T]:
        print(f"{fault}; looking whether it was done", file=sys.stderr, flush=True)
        for pause in SETTLE_SECONDS:
            time.sleep(pause)
            if found := find():
                return found
        return ()

    def pages(
        self, doing: str, function: Callable[..., Any], field: str, **keywords: Any
    ) -> Iterator[Any]:
        """Everything that an operation lists, page by page.

        Args:
            doing: what for, as it reads in a sentence.
            function: of the generated client.
            field: of the answer that holds the items.
            **keywords: of the function; page_size among them if another than PAGE_SIZE fits.
        """
        keywords = {"page_size": PAGE_SIZE, **keywords}
        token = ""
        while True:
            page = self.call(doing, function, page_token=token, **keywords)
            yield from getattr(page, field) or ()
            token = page.next_page_token
            if not token:
                return

    def attempt(
        self, doing: str, function: Callable[..., Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Call an operation once; arguments as for `call`.

        Raises:
            Fault: it failed.
        """
        import urllib3
        from kfp_server_api.exceptions import ApiException

        try:
            answer = function(*arguments, _request_timeout=_TIMEOUT_SECONDS, **keywords)
        except ApiException as error:
            raise self._refused(doing, error) from None  # its text has all headers in it
        except urllib3.exceptions.HTTPError as error:
            raise self._unreached(doing, error) from None
        except OSError as error:  # the file with the token went away
            raise Fault(
                self._clean(f"{doing}: {error}"), status=0, passing=False, sent=False
            ) from error
        last = self.client.last_response
        kind = last.getheader("content-type") or "nothing"
        # a log is plain text, and is handed on as it comes
        if "html" in kind or (last is not answer and "json" not in kind):
            raise Fault(
                self._clean(
                    f"{doing}: {self.host} answered with {kind.partition(';')[0]} and not as KFP "
                    f"does, a login page for example: check --host, and {_HINT}"
                ),
                status=200,
                passing=False,
                sent=False,
            )
        return answer

    def _refused(self, doing: str, error: Any) -> Fault:
        status = int(error.status or 0)
        said = _said(error.body)
        if status == 401 or 300 <= status < 400:
            text = f"{doing}: {self.host} does not know who asks ({status}): {_HINT}"
        elif status == 403:
            text = (
                f"{doing}: this login may not ({said or 'forbidden'}): ask for access, or name "
                "another namespace with --namespace"
            )
        elif status == 404 and not said:
            text = f"{doing}: {self.host} has no KFP API at this address (404): check --host"
        else:
            text = f"{doing}: {said or error.reason} ({status})"
        passing = status == 429 or status >= 500
        return Fault(
            self._clean(text), status=status, passing=passing, sent=passing and status != 429
        )

    def _unreached(self, doing: str, error: Any) -> Fault:
        import urllib3

        reason = getattr(error, "reason", None) or error
        secure = isinstance(reason, urllib3.exceptions.SSLError)
        early = isinstance(
            reason,
            (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError),
        )
        if secure:
            what = (
                f"{self.host} can't be trusted ({_short(str(reason))}): name the certificates of "
                f"your cluster with --ca-cert or {CA_VARIABLE}"
            )
        elif isinstance(reason, urllib3.exceptions.NameResolutionError):
            what = f"{self.host} has no address: check --host"
        elif early:
            what = f"{self.host} can't be reached ({_short(_innermost(reason))})"
        else:
            what = f"the connection to {self.host} was lost ({_short(_innermost(reason))})"
        return Fault(
            self._clean(f"{doing}: {what}"),
            status=0,
            passing=not secure,
            sent=not (early or secure),
        )

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "(secret)")
        return text


@contextlib.contextmanager
def absent(*statuses: int) -> Iterator[None]:
    """Leave the block where the server answered with one of these: there is no such thing, or it is
    there already.
    """
    try:
        yield
    except Fault as fault:
        if fault.status not in statuses:
            raise


def equals(key: str, value: str) -> str:
    """A filter for the operations that list.

    The server decodes the parameter once more than HTTP does, hence the quoting.
    """
    predicate = {"operation": "EQUALS", "key": key, "stringValue": value}
    return quote(json.dumps({"predicates": [predicate]}))


def _host(given: str | None) -> str:
    host = (given or os.environ.get(HOST_VARIABLE, "")).strip().rstrip("/")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER_HOST
    if not host:
        raise UsageError(
            f"no KFP endpoint: name it with --host or {HOST_VARIABLE}, as in "
            "https://kubeflow.example.org/pipeline"
        )
    parts = urlsplit(host)
    if parts.username or parts.password:
        raise UsageError(
            f"the host has a login in it: take it out, and set {TOKEN_VARIABLE} or "
            f"{COOKIE_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"the host '{host}' must begin with http:// or https://, as in "
            "https://kubeflow.example.org/pipeline"
        )
    return host


def _sendable(text: str, source: str, *, spaces: bool = False) -> str:
    """A credential that fits into a header; the error that HTTP would raise shows it whole."""
    text = text.strip()
    if not text.isascii() or not text.isprintable() or (" " in text and not spaces):
        raise UsageError(f"{source} holds something that is no credential: one line of ASCII is")
    return text


def _in_cluster_token(host: str) -> str:
    """The token that the kubelet projects for KFP, as its manifests for notebooks ask for; only for
    hosts of the cluster, or a forwarded port, since another host must not have it.
    """
    name = urlsplit(host).hostname or ""
    if not (name.endswith((".svc", ".svc.cluster.local")) or name in _LOOPBACK):
        return ""
    path = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/secrets/kubeflow/pipelines/token")
    return path if Path(path).is_file() else ""


def _proxy(host: str) -> str | None:
    parts = urlsplit(host)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _said(body: Any) -> str:
    """What the server says is wrong, in its shortest form."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        answer = json.loads(text)
    except ValueError:
        return "" if "<html" in text.lower() else _short(text)
    if not isinstance(answer, dict):
        return _short(text)
    # the gateway wraps the sentence for users into `details`; the one around it has the whole stack
    for detail in answer.get("details") or ():
        if isinstance(detail, dict) and detail.get("message"):
            return _short(str(detail["message"]))
    return _short(str(answer.get("message") or answer.get("error_message") or ""))


def _short(text: str) -> str:
    return textwrap.shorten(" ".join(text.split()), _LONGEST_MESSAGE, placeholder=" ...")


def _innermost(error: BaseException) -> str:
    """The operating system's own words out of urllib3's."""
    if error.args and isinstance(error.args[-1], BaseException):
        return _innermost(error.args[-1])
    return str(error).rpartition("] ")[2] or str(error)


def _sleep(pause: float, fault: Fault) -> None:
    print(f"{fault}; trying again", file=sys.stderr, flush=True)
    time.sleep(pause * random.uniform(1.0, 1.5))
