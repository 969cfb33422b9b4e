"""A cloud's small HTTP server, for Prometheus and for whoever starts and stops clouds.

GET /metrics         what CloudMetrics collects
GET /health/live     200: the process answers
GET /health/ready    200, or 503 and the reason why no edge should come here now
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, ClassVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from privatelora.errors import ConnectError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 64
"""Each has a thread. One more ends the one that has been there longest: who asks for something is
done in no time, and who only stays must not keep others out."""

WhyNotReady = Callable[[], str | None]
"""Gives the reason why a cloud is not ready, or None; is called from any thread."""


@contextmanager
def serving_metrics(
    registry: CollectorRegistry, why_not_ready: WhyNotReady, host: str, port: int
) -> Iterator[int]:
    """Answer HTTP GET from threads of its own while the context lasts; gives the port.

    ``port`` 0 is any free one. Raises ConnectError if the address cannot be listened on.
    """
    try:
        # Of a name with several addresses the first; the metrics of a cloud need no more.
        family, _, _, _, endpoint = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = make_server(
            str(endpoint[0]), port, _app(registry, why_not_ready), _server_class(family), _Handler
        )
    except OSError as error:
        raise ConnectError(
            f"cannot serve metrics on {host} port {port}: {error.strerror}; set another address"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _server_class(family: socket.AddressFamily) -> type[WSGIServer]:
    class Server(ThreadingMixIn, WSGIServer):
        address_family = family
        request_queue_size = MAX_CONNECTIONS
        daemon_threads = True  # who is slow to ask does not hold up the end
        connections: ClassVar[dict[socket.socket, None]] = {}
        lock: ClassVar[threading.Lock] = threading.Lock()

        def process_request(self, request: Any, client_address: Any) -> None:
            with self.lock:
                if len(self.connections) >= MAX_CONNECTIONS:
                    longest = next(iter(self.connections))
                    del self.connections[longest]
                    with contextlib.suppress(OSError):  # it has left
                        longest.shutdown(socket.SHUT_RDWR)
                self.connections[request] = None
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            with self.lock:
                self.connections.pop(request, None)
            super().shutdown_request(request)

        def handle_error(self, request: object, client_address: object) -> None:
            logger.info("%s did not ask to the end", client_address, exc_info=True)

    return Server


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: who scrapes does so all the time."""


def _app(registry: CollectorRegistry, why_not_ready: WhyNotReady) -> WSGIApplication:
    metrics = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def answer(status: str, text: str) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{text}\n".encode()]

        match environ["PATH_INFO"]:
            case "/metrics":
                body: Iterable[bytes] = metrics(environ, start_response)
                return body
            case "/health/live":
                return answer("200 OK", "live")
            case "/health/ready":
                reason = why_not_ready()
                if reason is not None:
                    return answer("503 Service Unavailable", reason)
                return answer("200 OK", "ready")
            case _:
                return answer("404 Not Found", "there are /metrics, /health/live, /health/ready")

    return app
