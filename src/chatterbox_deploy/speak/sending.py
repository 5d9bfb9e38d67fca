"""Ask a front for many pieces at once, each again until it is there. Decides neither what is said nor where it goes."""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import aiohttp

from chatterbox_deploy import __version__, client
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.fleet import SPEECH
from chatterbox_deploy.speak import wav

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.speak.narration import Take
    from chatterbox_deploy.speak.wav import Sound

_CONNECT_S: Final = 10.0
_LONGEST_RETRY_AFTER_S: Final = 60.0
_MOST_FAILED: Final = 5
"""Pieces; when so many have failed for good, no more are begun."""
_FEW: Final = 2
"""Pieces that an instance of the stock engine has in hand at most."""


@dataclass(frozen=True, slots=True)
class Front:
    """Where requests go."""

    url: str
    """Without a slash at its end."""
    headers: Mapping[str, str] = field(default_factory=dict)
    answer_s: float = 600.0
    """Longest silence before an answer, or within it."""
    verify: bool = True
    """Whether its TLS certificate has to bear the name in ``url``."""
    here: bool = False
    """Whether it is that of a fleet file, of which ``status`` tells."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long a piece is asked for."""

    failures: int = 5
    """So many, each while the fleet answers others: then the piece is to blame, and two instances died of each."""
    whole_s: float = 600.0
    """Since it was first asked for: busy or away for longer, and the piece is given up."""
    first_wait_s: float = 0.5
    """Doubles with each try."""
    longest_wait_s: float = 30.0


class Tell(Protocol):
    """Hears how it goes."""

    def spoken(self, take: Take, sound: Sound, instance: str) -> None:
        """The take is kept; ``instance`` is "" where the front names none."""
        ...

    def again(self, take: Take, reason: str, wait_s: float) -> None:
        """It is asked for once more, after so many seconds."""
        ...


@dataclass(frozen=True, slots=True)
class _Answered:
    sound: Sound
    instance: str
    places: int
    """0: it does not say."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Worth another try."""

    reason: str
    retry_after_s: float | None
    """Said by whoever is merely busy."""


def local_front(fleet: Fleet, key: str | None) -> Front:
    """The front of a fleet on this machine."""
    named = {"Host": fleet.front.server_name} if fleet.front.server_name is not None else {}
    return Front(
        url=fleet.front.local_url,
        headers=named | client.authorization(key),
        # Two instances may die of a piece, each after it kept it for as long as it could.
        answer_s=2.0 * fleet.front.read_timeout_s + 10,
        # This machine is asked by its address; whose name the certificate bears is for clients to judge.
        verify=False,
        here=True,
    )


async def spoken_by(front: Front, voice: str | None) -> dict[str, Any]:
    """What a request does not say and yet decides its sound: the model that is loaded, the recording of the voice.

    Empty for a server that does not tell.

    Raises:
        CommandFailed: nobody is there, or we are not let in.
    """
    told: dict[str, Any] = {}
    async with _session(front) as session:
        models = await _get(session, front, "/v1/models")
        if isinstance(models, dict) and (listed := models.get("data")):
            told["model"] = listed[0].get("id")
        voices = await _get(session, front, "/v1/audio/voices")
        rows = {row.get("name"): row for row in voices.get("voices", ())} if isinstance(voices, dict) else {}
        row = rows.get(voice or "default", {})
        row = rows.get(row.get("means"), row)
        if row.get("created") is not None:
            told["recording"] = [row.get("name"), row["created"], row.get("duration_s")]
    return told


@dataclass(frozen=True, slots=True)
class InFlight:
    """How many requests there are at once."""

    begin: int = 4
    more: bool = True
    """More than that, as instances that answer say at how many they speak at once."""
    unknown: bool = True
    """More than that, as more instances are seen to answer: nobody knows how many there are."""

    def room(self, seen: Collection[int]) -> int:
        """With so many places in each instance that was seen: all that it speaks at once, and one that is next."""
        many = [places + 1 for places in seen if places > _FEW and self.more]
        # And two to see whether there is one more.
        few = 2 * (len(seen) - len(many)) + 2 if self.unknown else 0
        return max(self.begin, sum(many) + few)


async def speak(
    front: Front,
    takes: Iterable[Take],
    keep: Callable[[str, Sound], None],
    *,
    in_flight: InFlight,
    tell: Tell,
    patience: Patience = Patience(),
) -> None:
    """Ask for all ``takes``, so many ``in_flight``, and ``keep`` each as it comes.

    Raises:
        CommandFailed: the server refuses one (4xx: at once), or some failed for good (after the others were spoken).
    """
    async with _session(front) as session:
        sender = _Sender(session=session, front=front, keep=keep, tell=tell, patience=patience, in_flight=in_flight)
        await sender.run(takes)


def _session(front: Front) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"User-Agent": f"chatterbox-deploy/{__version__}", **front.headers},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=front.answer_s),
        # As many as the sender wants; each closed after its answer, as the front does.
        connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=front.verify),
    )


async def _get(session: aiohttp.ClientSession, front: Front, path: str) -> Any:
    """A JSON answer; ``None`` from a server that has no such path, or is not able to answer now."""
    try:
        async with session.get(front.url + path, timeout=aiohttp.ClientTimeout(total=30)) as response:
            if response.status in {401, 403}:
                raise CommandFailed(_refusal(front, response.status, await response.text()))
            if response.status >= 400:
                return None
            return json.loads(await response.read())
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
        hint = "; does the fleet run? `chatterbox-deploy status`" if front.here else ""
        msg = f"cannot reach {front.url}: {client.why(error)}{hint}"
        raise CommandFailed(msg) from None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def _refusal(front: Front, status: int, body: str) -> str:
    hint = "; give an API key: --api-key-file FILE, or $CHATTERBOX_API_KEY" if status in {401, 403} else ""
    return f"{front.url} refuses: {status}: {_message(body)}{hint}"


def _message(body: str) -> str:
    """What an answer in OpenAI's shape says; of another one, its beginning."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())[:200] or "no reason given"


@dataclass(slots=True, kw_only=True)
class _Sender:
    session: aiohttp.ClientSession
    front: Front
    keep: Callable[[str, Sound], None]
    tell: Tell
    patience: Patience
    in_flight: InFlight
    seen: dict[str, int] = field(default_factory=dict)
    """Instances that answered, and at how many they speak at once, as far as they say so."""
    failed: list[tuple[Take, str]] = field(default_factory=list)

    async def run(self, takes: Iterable[Take]) -> None:
        waiting = deque(takes)
        running: set[asyncio.Task[None]] = set()
        try:
            while running or (waiting and len(self.failed) < _MOST_FAILED):
                while (
                    waiting
                    and len(running) < self.in_flight.room(self.seen.values())
                    and len(self.failed) < _MOST_FAILED
                ):
                    running.add(asyncio.create_task(self._speak(waiting.popleft())))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # Of all, so that none is said to have been overlooked.
                errors = [error for task in done if (error := task.exception()) is not None]
                if errors:
                    raise errors[0]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self.failed:
            failed = [f"  {reason}:\n    {take.text}" for take, reason in self.failed]
            count = "a piece" if len(failed) == 1 else f"{len(failed)} pieces"
            raise CommandFailed("\n".join([f"cannot speak {count}:", *failed]))

    async def _speak(self, take: Take) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.patience.whole_s
        failures = tries = 0
        while True:
            outcome = await self._ask(take, tries)
            if isinstance(outcome, _Answered):
                await asyncio.to_thread(self.keep, take.name, outcome.sound)
                self.seen[outcome.instance] = outcome.places
                self.tell.spoken(take, outcome.sound, outcome.instance)
                return
            wait_s = min(self.patience.longest_wait_s, self.patience.first_wait_s * 2**tries)
            if outcome.retry_after_s is not None:
                wait_s = max(self.patience.first_wait_s, outcome.retry_after_s)
            elif await self._alive():
                failures += 1
            tries += 1
            # So that those who were sent away together do not come back together.
            wait_s *= random.uniform(1.0, 1.5)  # noqa: S311
            if failures >= self.patience.failures or loop.time() + wait_s > until:
                self.failed.append((take, outcome.reason))
                return
            self.tell.again(take, outcome.reason, wait_s)
            await asyncio.sleep(wait_s)

    async def _ask(self, take: Take, tries: int) -> _Answered | _Trouble:
        try:
            async with self.session.post(
                self.front.url + SPEECH,
                json=dict(take.request),
                # To be found in the front's log.
                headers={"X-Request-Id": f"speak-{take.name[:12]}-{tries}"},
            ) as response:
                return self._read(take, response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _Trouble(f"no answer: {client.why(error)}", None)

    def _read(self, take: Take, status: int, headers: Mapping[str, str], body: bytes) -> _Answered | _Trouble:
        instance = headers.get("X-Instance", "")
        if status == 200:
            try:
                places = headers.get("X-Places", "")
                return _Answered(wav.decode(body), instance, int(places) if places.isdecimal() else 0)
            except wav.NotWav as error:
                return _Trouble(f"{instance or self.front.url} answered {error}", None)
        said = body.decode(errors="replace")
        if status in {429, 503}:
            return _Trouble(f"{status}: {_message(said)}", _retry_after_s(headers.get("Retry-After")))
        if status >= 500 or status == 408:
            return _Trouble(f"{status}: {_message(said)}", None)
        # Before anything was spoken, what is refused is the voice, the key, the address; not this piece.
        piece = f"\n  the piece was:\n    {take.text}" if self.seen else ""
        raise CommandFailed(_refusal(self.front, status, said) + piece)

    async def _alive(self) -> bool:
        """Whether an instance answers at all: if none does, the piece is not to blame."""
        try:
            async with self.session.get(
                f"{self.front.url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)
            ) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


def _retry_after_s(value: str | None) -> float:
    """Seconds; a date, or nothing, is a second."""
    return min(_LONGEST_RETRY_AFTER_S, float(value)) if value is not None and value.isdecimal() else 1.0
