"""A laboratory for the nginx front: real nginx, instances that are real processes, and a client that counts.

Started as a script, this file is a nursery: it forks instances, since forking takes a millisecond where a fresh
interpreter takes a hundred. An instance speaks one request at a time, keeps a queue of ``queue`` more, answers
503 beyond that, and does what the query tells it to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

HOST = "127.0.0.1"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

SPEECH = "/v1/audio/speech"
BUSY_BODY = b'{"error":{"message":"the queue is full","type":"server_error","param":null,"code":"busy"}}'


# --- An instance: runs in a process of its own ----------------------------------------------------------------


@dataclass
class _Instance:
    """One fake server. Query of a request: what it should do (see ``_speak``)."""

    name: str
    port: int
    journal: Path
    queue: int = 1000
    speech_s: float = 0.0
    foreign: bool = False
    in_house: int = 0
    engine: asyncio.Lock = field(default_factory=asyncio.Lock)
    broken: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: str, headers: Mapping[str, str]) -> None:
        """One line to the journal that all instances share: an append of that size is atomic."""
        line = f"{event} {self.name} {headers.get('x-request-id', '-')}\n"
        with self.journal.open("ab", buffering=0) as journal:
            journal.write(line.encode())

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        open_requests: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGTERM, self.stopping.set)

        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.note("connected", {})
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while not self.stopping.is_set():
                    open_requests.discard(task)
                    head = await reader.readuntil(b"\r\n\r\n")
                    open_requests.add(task)
                    await self.answer(head, reader, writer, last=self.stopping.is_set)
            open_requests.discard(task)
            writer.close()

        server = await asyncio.start_server(connection, HOST, self.port, backlog=1024)
        _say("ready")
        # Graceful, as uvicorn is: refuse new connections, finish what was accepted, leave.
        await self.stopping.wait()
        server.close()
        while open_requests:
            await asyncio.sleep(0.005)

    async def answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, last: Any
    ) -> None:
        request_line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = request_line.split(" ")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        query = dict(parse_qsl(urlsplit(target).query, keep_blank_values=True))
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if self.in_house > self.queue or "busy" in query:
            self.note("busy", headers)
            await self.send(
                writer, 503, BUSY_BODY, {"Retry-After": "7", "Content-Type": "application/json"}, close=last()
            )
            return
        self.note("handed", headers)
        self.in_house += 1
        try:
            work = asyncio.ensure_future(self.speak(query, headers, writer))
            gone = asyncio.ensure_future(reader.read(1))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.note("gone", headers)
                work.cancel()
                raise ConnectionError
            if not gone.done():
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone
            if work.result():
                said = {
                    "method": method,
                    "target": target,
                    "headers": headers,
                    "instance": self.name,
                    "bytes": len(body),
                    "sha256": hashlib.sha256(body).hexdigest(),
                }
                status = int(query.get("status", "200"))
                own = {"X-Queue-Wait": "0.25", "Content-Type": "application/json"}
                if "unbuffered" in query:
                    own["X-Accel-Buffering"] = "no"
                if not self.foreign:
                    own |= {"X-Instance": self.name, "X-Request-Id": headers.get("x-request-id", "-")}
                answer = json.dumps(said).encode() + b" " * int(query.get("bytes", "0"))
                await self.send(writer, status, answer, own, close=last())
                self.note("answered", headers)
        finally:
            self.in_house -= 1

    async def speak(self, query: dict[str, str], headers: dict[str, str], writer: asyncio.StreamWriter) -> bool:
        """Take the engine's time (or, ``aside``, only a place); whether an answer is still due."""
        async with contextlib.AsyncExitStack() as stack:
            if "aside" not in query:
                await stack.enter_async_context(self.engine)
            refusal = {"Retry-After": "1", "Content-Type": "application/json"}
            if self.broken:
                await self.send(writer, 503, BUSY_BODY, refusal, close=True)
                return False
            self.note("began", headers)
            await asyncio.sleep(float(query.get("seconds", self.speech_s)))
            if "broken" in query:
                # As one whose CUDA context is gone: says so, hands back what waits, and ends.
                self.broken = True
                self.stopping.set()
                await self.send(writer, 503, BUSY_BODY, {**refusal, "X-Engine": "broken"}, close=True)
                return False
            if "poison" in query:
                os.kill(os.getpid(), signal.SIGKILL)
            if "stream" not in query:
                return True
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(int(query["stream"])):
                writer.write(b"5\r\nhello\r\n")
                await writer.drain()
                await asyncio.sleep(float(query.get("pause", "0")))
                if "die" in query:
                    os.kill(os.getpid(), signal.SIGKILL)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            self.note("answered", headers)
            return False

    async def send(
        self, writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str], *, close: bool
    ) -> None:
        lines = [f"HTTP/1.1 {status} {'OK' if status < 400 else 'Not OK'}", f"Content-Length: {len(body)}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        if close:
            lines.append("Connection: close")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _nursery() -> None:
    """Fork one instance for each line of JSON on stdin; say its pid. Instances tell on stdout when they listen."""
    # The kernel reaps the dead ones for us.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children: list[int] = []
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wanted["journal"] = Path(wanted["journal"])
            try:
                asyncio.run(_Instance(**wanted).serve())
            except OSError as error:
                _say(f"cannot listen: {error}")
            finally:
                os._exit(0)
        children.append(pid)
        _say(str(pid))
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- The fleet, seen from a test -------------------------------------------------------------------------------


class Instances:
    """Several instances, and a journal of what happened to which request where."""

    def __init__(self, directory: Path, count: int, **options: float | bool) -> None:
        # The nursery, this file as a script, has no such path.
        from support.ports import free_ports

        self.journal = directory / "journal"
        self.journal.touch()
        self.ports = {f"gpu{number}": port for number, port in enumerate(free_ports(count))}
        self.pids: dict[str, int] = {}
        self._options = options
        self._nursery = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for name in self.ports:
            self.start(name)

    def __enter__(self) -> Instances:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.pids):
            self.kill(name)
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.stdout.close()
        self._nursery.wait(timeout=10)

    def start(self, name: str) -> None:
        """Begin instance ``name``; returns when its port is bound."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        wanted = {"name": name, "port": self.ports[name], "journal": str(self.journal), **self._options}
        self._nursery.stdin.write(json.dumps(wanted) + "\n")
        said = {self._nursery.stdout.readline().strip(), self._nursery.stdout.readline().strip()}
        said.remove("ready")
        self.pids[name] = int(said.pop())

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Send ``how`` to the instance and wait until its port is free; a dead one stays dead."""
        pid = self.pids.pop(name, None)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        while is_alive(pid):
            time.sleep(0.002)

    def bury(self, names: Iterable[str]) -> None:
        """Wait for the end of instances that kill themselves: nginx may hear of it before it is through."""
        for name in names:
            while is_alive(self.pids[name]):
                time.sleep(0.002)

    def revive(self) -> None:
        """Start again whoever died."""
        for name in self.ports:
            if name not in self.pids or not is_alive(self.pids[name]):
                self.start(name)

    def events(self, event: str, request_id: str | None = None) -> list[str]:
        """Names of the instances to which ``event`` happened, in order."""
        rows = [line.split() for line in self.journal.read_text().splitlines()]
        return [name for what, name, whose in rows if what == event and request_id in (None, whose)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- nginx -----------------------------------------------------------------------------------------------------

# As Debian's nginx.conf has it, except for places and for the port 80 of its default site.
_MAIN = """
{user}
worker_processes 2;
daemon off;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log info;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {prefix}/body; proxy_temp_path {prefix}/proxy; fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi; scgi_temp_path {prefix}/scgi;
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    types {{ text/html html; audio/wav wav; }}
    default_type application/octet-stream;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    access_log {prefix}/other.log;
    gzip on;
    include {prefix}/conf.d/*.conf;
}}
"""


class Front:
    """nginx in a prefix of its own, without root, with the front's file in its conf.d."""

    def __init__(self, prefix: Path, text: str, port: int, others: Mapping[str, str] | None = None) -> None:
        self.prefix, self.port = prefix, port
        self.access_log, self.error_log = prefix / "access.log", prefix / "error.log"
        (prefix / "conf.d").mkdir(parents=True)
        (prefix / "conf.d" / "chatterbox-tts.conf").write_text(text)
        for name, other in (others or {}).items():
            (prefix / "conf.d" / name).write_text(other)
        # Workers of root's nginx would be nobody, who may not enter pytest's directories.
        user = "user root;" if os.geteuid() == 0 else ""
        (prefix / "nginx.conf").write_text(_MAIN.format(prefix=prefix, user=user))
        assert NGINX is not None
        self.argv = (NGINX, "-p", str(prefix), "-c", str(prefix / "nginx.conf"), "-e", str(prefix / "error.log"))

    def judge(self) -> subprocess.CompletedProcess[str]:
        """What ``nginx -t -q`` says."""
        return subprocess.run([*self.argv, "-t", "-q"], capture_output=True, text=True, timeout=20, check=False)

    def __enter__(self) -> Front:
        self._process = subprocess.Popen(self.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                return self
            assert self._process.poll() is None, self.error_log.read_text()
            assert time.monotonic() < deadline, "nginx does not listen"
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=10)

    def reload(self) -> None:
        """Send SIGHUP, and return once new workers serve."""
        before = self.error_log.read_text().count("start worker process ")
        self._process.send_signal(signal.SIGHUP)
        while self.error_log.read_text().count("start worker process ") < before + 2:
            time.sleep(0.01)

    def log(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` rows of the access log, once they are written: nginx logs after it answers."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            rows = self.access_log.read_text(errors="replace").splitlines() if self.access_log.exists() else []
            if len(rows) >= count:
                break
            time.sleep(0.01)
        return [json.loads(row) for row in rows]


# --- A client --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What came back. ``status`` 0: the connection broke before an answer."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    whole: bool = False
    """Whether the body ended where it should have, not where the connection did."""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name.lower()]

    def header(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def good(self) -> bool:
        return self.status == 200 and self.whole


async def ask(
    port: int,
    target: str = SPEECH,
    *,
    method: str = "POST",
    body: bytes | Iterable[bytes] = b"hello",
    headers: Mapping[str, str] | None = None,
    chunk_pause_s: float = 0.0,
) -> Reply:
    """One request on a connection of its own. A body in parts goes chunked, ``chunk_pause_s`` apart."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port, limit=2**16)
    except OSError:
        return Reply()
    try:
        return await exchange(
            reader,
            writer,
            target,
            method=method,
            body=body,
            headers={"Connection": "close", **(headers or {})},
            chunk_pause_s=chunk_pause_s,
        )
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: str = SPEECH,
    *,
    method: str = "POST",
    body: bytes | Iterable[bytes] = b"hello",
    headers: Mapping[str, str] | None = None,
    chunk_pause_s: float = 0.0,
) -> Reply:
    """One request on an open connection."""
    sent = {"Host": "fleet.example", **(headers or {})}
    sent |= {"Content-Length": str(len(body))} if isinstance(body, bytes) else {"Transfer-Encoding": "chunked"}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in sent.items())
    status, got = 0, b""
    pairs: tuple[tuple[str, str], ...] = ()
    try:
        writer.write(head.encode() + b"\r\n" + (body if isinstance(body, bytes) else b""))
        if not isinstance(body, bytes):
            for part in body:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await asyncio.sleep(chunk_pause_s)
            writer.write(b"0\r\n\r\n")
        # Not drained: the answer may come before the body is through (413, 401).
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
        status = int(first.split()[1])
        pairs = tuple((key.lower(), value.strip()) for key, _, value in (line.partition(":") for line in lines))
        if ("transfer-encoding", "chunked") in pairs:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                got += (await reader.readexactly(size + 2))[:-2]
        else:
            left = int(dict(pairs)["content-length"])
            while left and (part := await reader.read(min(left, 2**16))):
                got, left = got + part, left - len(part)
            return Reply(status, pairs, got, whole=left == 0)
    except (OSError, asyncio.IncompleteReadError):
        return Reply(status, pairs, got)
    return Reply(status, pairs, got, whole=True)


async def load(port: int, count: int, *, at_once: int = 8, target: str = SPEECH, **how: Any) -> list[Reply]:
    """``count`` requests, ``at_once`` in flight."""
    numbers: Iterator[int] = iter(range(count))
    replies: list[Reply] = []

    async def one_client() -> None:
        for _ in numbers:
            replies.append(await ask(port, target, **how))  # noqa: PERF401  clients take turns here

    await asyncio.gather(*(one_client() for _ in range(at_once)))
    return replies


def lost(replies: Sequence[Reply]) -> int:
    """Requests without a good answer."""
    return sum(not reply.good for reply in replies)


if __name__ == "__main__":
    _nursery()
