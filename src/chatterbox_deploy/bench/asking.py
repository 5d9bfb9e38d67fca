"""One request to speak, timed: sent, first sound, last byte, and how it was to listen. Decides nothing about when."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import TYPE_CHECKING

import aiohttp

from chatterbox_deploy import client
from chatterbox_deploy.bench import heard
from chatterbox_deploy.bench.loads import Sample
from chatterbox_deploy.fleet import SPEECH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_deploy.bench.aims import Door
    from chatterbox_deploy.bench.loads import Load

HEAD_BYTES = 4096
"""In which every header of a steady format ends."""


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """A connection of its own for each request, as most clients have it.

    A kept one would be closed by a server just as the next request comes, now and then: our failure, not its own.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, headers=client.authorization(api_key), auto_decompress=False)


class Asker:
    """Sends requests of one load to some doors, and knows how many are out."""

    def __init__(self, session: aiohttp.ClientSession, load: Load, doors: Sequence[Door]) -> None:
        self._session = session
        self._load = load
        self._out: Counter[Door] = Counter(dict.fromkeys(doors, 0))
        self._turn = 0

    @property
    def in_flight(self) -> int:
        return self._out.total()

    async def ask(self, text: str, *, seed: int, due: float, origin: float) -> Sample:
        """Ask whoever has the fewest of ours; ``due`` and ``origin`` are moments on ``time.perf_counter``'s clock."""
        door = self._fewest()
        self._out[door] += 1
        try:
            return await self._ask(door, text, seed=seed, due=due, origin=origin)
        finally:
            self._out[door] -= 1

    def _fewest(self) -> Door:
        # Ties in turn, or the first door would get all that come alone.
        doors = list(self._out)
        self._turn += 1
        return min(doors[self._turn % len(doors) :] + doors[: self._turn % len(doors)], key=self._out.__getitem__)

    async def _ask(self, door: Door, text: str, *, seed: int, due: float, origin: float) -> Sample:
        sent = time.perf_counter()
        answer = _Answer(self._load)
        failure: str | None = None
        try:
            async with self._session.post(
                door.url + SPEECH,
                data=self._body(text, seed),
                headers=_headers(door),
                ssl=door.verified,
                timeout=aiohttp.ClientTimeout(total=self._load.timeout_s),
            ) as response:
                answer.status, answer.headers = response.status, response.headers
                async for chunk in response.content.iter_any():
                    answer.came(chunk, time.perf_counter())
        except TimeoutError:
            failure = "timed out"
        except aiohttp.ClientConnectorError as error:
            failure = f"cannot connect: {client.why(error)}"
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
            failure = "cut short" if answer.size_bytes else "hung up on"
        except aiohttp.ClientError as error:
            failure = f"cannot ask: {type(error).__name__}"
        done = time.perf_counter()
        return answer.sample(door, len(text), due=due, sent=sent, done=done, origin=origin, failure=failure)

    def _body(self, text: str, seed: int) -> bytes:
        # OpenAI's own fields, for servers of other people; the seed is Chatterbox' and makes lengths repeatable.
        fields = {"model": "tts-1", "input": text, "response_format": self._load.audio_format, "seed": seed}
        if self._load.voice is not None:
            fields["voice"] = self._load.voice
        if self._load.stream:
            fields["stream_format"] = "audio"
        return json.dumps(fields).encode()


class _Answer:
    """What came so far."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._chunks: list[bytes] = []
        self._layout: heard.Layout | None = None
        self._arrivals: list[tuple[float, float]] = []
        self._first: float | None = None
        self.size_bytes = 0
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}

    def came(self, chunk: bytes, now: float) -> None:
        self._chunks.append(chunk)
        self.size_bytes += len(chunk)
        if (
            self._layout is None
            and self._load.audio_format in heard.STEADY
            and self.size_bytes <= HEAD_BYTES + len(chunk)
        ):
            self._layout = heard.layout(b"".join(self._chunks)[:HEAD_BYTES], self._load.audio_format)
        if self._layout is not None:
            if (beyond := self.size_bytes - self._layout.begins_at) > 0:
                self._first = self._first or now
                self._arrivals.append((now, beyond / self._layout.bytes_per_s))
        elif self._load.audio_format not in heard.STEADY:
            self._first = self._first or now

    def sample(
        self, door: Door, chars: int, *, due: float, sent: float, done: float, origin: float, failure: str | None
    ) -> Sample:
        audio_s: float | None = None
        if failure is None and self.status != 200:
            failure = str(self.status)
        if failure is None:
            audio_s = heard.audio_s(b"".join(self._chunks), self._load.audio_format)
            if self._first is None or audio_s == 0:
                failure = "no sound"
            elif audio_s is None and self._load.audio_format != "flac":
                failure = f"no {self._load.audio_format}"
        listened = heard.playback(self._arrivals) if failure is None and self._arrivals else None
        return Sample(
            due_s=due - origin,
            sent_s=sent - origin,
            first_byte_s=None if self._first is None or self.status != 200 else self._first - origin,
            done_s=done - origin,
            chars=chars,
            status=self.status,
            failure=failure,
            instance=door.name if door.by_itself else self._told() or (None if door.by_itself is False else door.name),
            size_bytes=self.size_bytes,
            audio_s=audio_s if failure is None else None,
            queue_wait_s=_number(self.headers.get("X-Queue-Wait")),
            stalls=None if listened is None else listened.stalls,
            stalled_s=None if listened is None else listened.stalled_s,
            longest_gap_s=None if listened is None else listened.longest_gap_s,
        )

    def _told(self) -> str | None:
        return self.headers.get("X-Instance") or None


def _headers(door: Door) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    return headers if door.host is None else headers | {"Host": door.host}


async def metrics(session: aiohttp.ClientSession, door: Door, *, timeout_s: float) -> str | None:
    """What the instance says at /metrics; ``None`` where there is none, or none for us."""
    try:
        async with session.get(
            f"{door.url}/metrics", ssl=door.verified, timeout=aiohttp.ClientTimeout(total=timeout_s)
        ) as response:
            return await response.text() if response.status == 200 else None
    except (TimeoutError, aiohttp.ClientError, OSError, UnicodeDecodeError):
        return None


async def pause(seconds: float, stopped: asyncio.Event) -> bool:
    """Wait, but no longer than until ``stopped``; whether it is not."""
    if seconds > 0 and not stopped.is_set():
        try:
            await asyncio.wait_for(stopped.wait(), seconds)
        except TimeoutError:
            return not stopped.is_set()
    return not stopped.is_set()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
