"""A way to the S3 server on which things happen to requests and answers that no healthy server does."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Answer:
    """What goes back to the client."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Passing:
    """A request on its way."""

    method: str
    path: str
    headers: Mapping[str, str]
    forward: Callable[[], Answer]
    """Let the server carry it out."""


Meddler = Callable[[Passing], Answer | None]
"""Makes the answer of a request; None cuts the connection."""


def pass_on(request: Passing) -> Answer:
    """Do nothing to it."""
    return request.forward()


@dataclass
class Proxy:
    """An S3 address of its own before the real one.

    Attributes:
        url: the address.
        meddle: what happens to each request from now on.
        passed: method and path of all requests so far.
    """

    url: str
    meddle: Meddler = pass_on
    passed: list[tuple[str, str]] = field(default_factory=list)

    def count(self, method: str, part: str) -> int:
        """How many requests of a method had a text in their path."""
        return sum(passed == method and part in path for passed, path in self.passed)


@contextmanager
def open_proxy(target: str, *, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Serve on loopback until the block ends, over TLS where `tls` is given. Requests pass as they were signed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            proxy.passed.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            answer = proxy.meddle(
                Passing(self.command, self.path, headers, lambda: forward(self.command, self.path, headers, body))
            )
            if answer is None:
                self.close_connection = True
                return
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    def forward(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(target.removeprefix("http://"), timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hung up is what some tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        proxy = Proxy(f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
