"""How the processes of a run learn that one of them has failed or died, so that none waits for it.

Each process holds a connection to rank 0. A process that fails says why before it leaves, and rank 0 passes that on. A
process that dies closes its connection; for a machine that is gone, TCP's keep-alive does. Nothing has to arrive in
time, so a process may be busy for hours.
"""

from __future__ import annotations

import _thread
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import parse_json

GRACE = 20.0
"""Seconds that a process has to end by itself after another one failed; torchrun kills after 30."""
_REPLY = 5.0
"""Seconds to wait for a message of another process."""
_LONGEST = 2**16


@dataclass(frozen=True)
class Failure:
    """Why a run ends: the first process that failed, and what it said."""

    rank: int
    reason: str
    status: int = 1
    """Exit status of all processes."""


class ProcessFailure(UserError):
    """Another process of the run has failed."""

    def __init__(self, failure: Failure, text: str, told: bool):
        """`told`: the process that failed says the same, so that this one need not."""
        super().__init__(text)
        self.rank, self.told, self.exit_status = failure.rank, told, failure.status


class Link:
    """One end of a connection, over which JSON objects travel, a line each."""

    def __init__(self, connection: socket.socket):
        self.connection, self.rank, self.host, self.left, self.heard = connection, -1, "", False, False
        self._rest, self._lock = b"", threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):  # 30 seconds in all
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send a message; do nothing where the other end is gone, which reading tells."""
        with suppress(OSError), self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the connection. What has arrived is read first: else the other end might lose what it was sent."""
        with suppress(OSError):
            self.connection.setblocking(False)
            while self.connection.recv(_LONGEST):
                pass
        self.connection.close()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None at the end of the connection."""
        try:
            data = self.connection.recv(_LONGEST)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            return None
        try:
            messages = [parse_json(line, "a message") for line in lines]
        except UserError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None


class Peers:
    """This process's connections: to the first process, or in that one to all others."""

    def __init__(self, rank: int, size: int, listener: socket.socket | None, links: list[Link], token: int):
        self.rank, self.size, self.listener, self.token = rank, size, listener, token
        self.links = links
        self.failure: Failure | None = None
        self.ending_since: float | None = None
        self._known, self._heard, self._complete = threading.Event(), threading.Event(), threading.Event()
        self._lock, self._gone, self._timers = threading.Lock(), False, list[threading.Timer]()
        self._selector = selectors.DefaultSelector()
        for source in (listener, *(link.connection for link in links)):
            if source is not None:
                self._selector.register(source, selectors.EVENT_READ)
        self._wake, wake = socket.socketpair()
        self._selector.register(wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    @classmethod
    def connect(cls, rank: int, size: int, address: str, broadcast: Callable[[int], int]) -> Peers:
        """Connect this process. `address`: host of the first process. `broadcast(n)`: the first process's number, in
        all processes, which must all call it."""
        listener, links, port, token = None, list[Link](), 0, 0
        if rank == 0:
            listener = _listen_anywhere(size)
            port, token = listener.getsockname()[1], int.from_bytes(os.urandom(7))
        port, token = broadcast(port), broadcast(token)
        if rank:
            try:
                link = Link(socket.create_connection((address, port), timeout=30))
            except OSError as error:
                raise UserError(
                    f"rank {rank} of {size} cannot reach rank 0 at {address}, port {port}: {error}"
                ) from error
            link.connection.settimeout(None)
            link.rank, link.host = 0, address
            link.send(rank=rank, token=token, host=socket.gethostname())
            links.append(link)
        peers = cls(rank, size, listener, links, token)
        if rank == 0 and not peers._complete.wait(60):
            raise UserError(f"only {len(peers.links)} of {size - 1} processes have reached rank 0 at {address}:{port}")
        return peers

    # ---- what this process says

    def report(self, error: BaseException) -> ProcessFailure | None:
        """Tell the others why this process ends. What to raise in place of the error when another one failed first."""
        self.ending_since = time.monotonic()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError | KeyboardInterrupt):  # which may follow from another process's death
            self._known.wait(_REPLY if isinstance(error, RuntimeError) else 1)
        status = getattr(error, "exit_status", 130 if isinstance(error, KeyboardInterrupt) else 1)
        own = Failure(self.rank, reason[: _LONGEST // 8], status)
        if self.rank == 0:
            if self._decide(own):
                self._heard.wait(_REPLY)
        else:
            if not self._known.is_set():
                self.links[0].send(failure=asdict(own))
            self._known.wait(_REPLY)  # rank 0 says who was first
        first = self.failure or own
        return None if first.rank == self.rank else self.describe(first, told=first.reason == own.reason)

    def is_ending(self) -> bool:
        """Whether this process has failed a moment ago, and is about to end."""
        return self.ending_since is not None and time.monotonic() < self.ending_since + GRACE

    def wait_for_failure(self) -> ProcessFailure:
        """The failure of another process that is known to have failed, once it has said why."""
        if not self._known.wait(2 * _REPLY) or self.failure is None:
            raise RuntimeError("a process has failed and does not say why")
        return self.describe(self.failure)

    def describe(self, failure: Failure, told: bool = False) -> ProcessFailure:
        """The failure of another process as an error."""
        return ProcessFailure(failure, f"rank {failure.rank} of {self.size} failed: {failure.reason}", told)

    def leave(self) -> None:
        """End the connections. The others do not take it for a death."""
        with self._lock:
            self._gone = True
        for timer in self._timers:
            timer.cancel()
        for link in list(self.links):
            link.send(left=True)
        self._wake.close()
        self._thread.join(_REPLY)
        for link in self.links:
            link.close()
        if self.listener is not None:
            self.listener.close()

    # ---- what this process hears, in a thread of its own

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                source = key.fileobj
                if source is self.listener:
                    self._accept()
                    continue
                link = next((link for link in self.links if link.connection is source), None)
                if link is None:
                    return  # woken up, to end
                messages = link.receive()
                for message in messages or ():
                    self._hear(link, message)
                if messages is None:
                    self._selector.unregister(link.connection)
                    self._note_end(link)

    def _accept(self) -> None:
        assert self.listener is not None, "it is the source"
        with suppress(OSError):
            link = Link(self.listener.accept()[0])
            self.links.append(link)
            self._selector.register(link.connection, selectors.EVENT_READ)

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        if message.get("token") == self.token:
            link.rank, link.host = int(message["rank"]), str(message["host"])
        if link.rank < 0:
            return  # not a process of this run
        if sum(other.rank >= 0 for other in self.links) == self.size - 1:
            self._complete.set()
        link.left |= "left" in message
        link.heard |= "heard" in message
        if "failure" in message:
            self._decide(Failure(**message["failure"]))
            if self.rank:
                link.send(heard=True)
        if all(other.heard or other.left or other.rank < 0 for other in self.links):
            self._heard.set()

    def _note_end(self, link: Link) -> None:
        """A connection has ended, of itself or because the process died."""
        if link.rank >= 0 and not link.left:
            host = f" on {link.host}" if link.host else ""
            reason = f"the process{host} ended without a word: it was killed, ran out of memory, or crashed"
            self._decide(Failure(link.rank, reason))
        link.left = True

    def _decide(self, failure: Failure) -> bool:
        """Take this failure as the run's, unless there is one already or this process is gone. Rank 0 tells all."""
        with self._lock:
            if self._gone:
                return False
            first, self.failure = self.failure is None, self.failure or failure
            if first:
                self._end_soon(failure)
        if first:
            if self.rank == 0:
                for link in list(self.links):
                    link.send(failure=asdict(failure))
            self._known.set()
        return first

    def _end_soon(self, failure: Failure) -> None:
        """Ask the main thread to stop; if it cannot, because it waits for the process that failed, end the process."""

        def end() -> None:
            print(f"\nnextscale: error: {self.describe(failure)}", file=sys.stderr, flush=True)
            os._exit(failure.status)

        self._timers.append(threading.Timer(GRACE, end))
        if failure.rank != self.rank:
            self._timers.append(threading.Timer(1, self._interrupt))  # often this one is about to fail alike
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def _interrupt(self) -> None:
        """Run the handler of SIGTERM that `init_distributed` has set, in the main thread."""
        if not self._gone and not self.is_ending():
            _thread.interrupt_main(signal.SIGTERM)


def _listen_anywhere(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=size)
    return socket.create_server(("", 0), backlog=size)
