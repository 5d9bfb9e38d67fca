"""Look at a host again and again: what ``survey`` asks, what each instance counts, the GPUs, the front's log.

Decides nothing. It remembers how far the log was read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import exposition, nginx
from chatterbox_deploy.change import observe
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.monitor.picture import WINDOW_S
from chatterbox_deploy.monitor.story import Look
from chatterbox_deploy.status.survey import ANSWER_TIMEOUT_S, survey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_deploy.change.facts import Wanted
    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.nginx import Request

LONGEST_LOG_BYTES = 4_000_000
"""Of the front's log at one look: some 10,000 requests."""


class Watch:
    """One fleet on one host, looked at by one caller at a time."""

    def __init__(
        self, host: Host, wanted: Wanted, *, access_log: str, read_cards: Callable[[], tuple[Card, ...] | None]
    ) -> None:
        """``access_log`` is the front's; ``read_cards`` tells of each GPU, or ``None`` where nobody does."""
        self._host = host
        self._wanted = wanted
        self._log = PurePosixPath(access_log)
        self._read_cards = read_cards
        self._ends: dict[int, int] | None = None
        """By inode of the log: how far it was read, to the end of a line."""
        self._rotated_ends: dict[int, int] = {}
        """The same of the log before it."""

    def turn_to(self, wanted: Wanted) -> None:
        """The fleet file has changed: from now on that is the fleet."""
        self._wanted = wanted

    def look(self) -> Look:
        """All that can be known now, as root or not."""
        host, fleet = self._host, self._wanted.fleet
        notes: list[str] = []
        with ThreadPoolExecutor(1) as pool:
            # Takes a moment where a GPU tells its SM activity.
            cards = pool.submit(self._read_cards)
            found = survey(host, fleet, self._wanted.files)
            counts = self._counts({name: found.places[name] for name, said in found.readiness.items() if said}, notes)
            requests = self._requests(notes)
        return Look(
            time=host.now(),
            found=found,
            counts=counts,
            cards=cards.result(),
            requests=requests,
            notes=tuple(notes),
        )

    def _counts(self, places: Mapping[str, tuple[str, int]], notes: list[str]) -> dict[str, Exposition]:
        """Of those that answered a moment ago."""
        headers: dict[str, str] = {}
        if (keys := self._wanted.fleet.service.api_keys_file) is not None:
            try:
                headers["Authorization"] = f"Bearer {observe.first_key(self._host, keys)}"
            except CommandFailed as error:
                notes.append(f"instances tell their numbers to whoever has a key: {error}")

        def ask(place: tuple[str, int]) -> Exposition | None:
            url = f"http://{place[0]}:{place[1]}/metrics"
            answer = self._host.request("GET", url, headers=headers, timeout_s=ANSWER_TIMEOUT_S)
            if answer is None or answer.status != 200:
                return None
            return exposition.parse(answer.body.decode(errors="replace"))

        with ThreadPoolExecutor(max(1, len(places))) as pool:
            told = dict(zip(places, pool.map(ask, places.values()), strict=True))
        return {name: counted for name, counted in told.items() if counted is not None}

    def _requests(self, notes: list[str]) -> tuple[Request, ...] | None:
        """What was logged since the last look; at the first, in the last minute. ``None`` if that cannot be read."""
        before = self._ends
        try:
            now = self._read_on(self._log, before or {})
        except CommandFailed as error:
            notes.append(f"nothing is known of the front's requests: {error}")
            return None
        if now is None:
            notes.append(f"nothing is known of the front's requests: there is no {self._log}")
            return None
        # logrotate renames it, and for a moment nginx still writes there. Not by inode alone: the new log may well
        # have that of the one that was removed to make room.
        rotated = self._read_rotated()
        self._ends = {now[0]: now[1]}
        self._rotated_ends = {} if rotated is None else {rotated[0]: rotated[1]}
        pieces = [piece for piece in (rotated, now) if piece is not None]
        parsed = (nginx.parse_request(line) for _, _, lines in pieces for line in lines.splitlines())
        requests = (request for request in parsed if request is not None)
        if before is not None:
            return tuple(requests)
        since = self._host.now() - timedelta(seconds=WINDOW_S)
        return tuple(request for request in requests if request.ended >= since)

    def _read_rotated(self) -> tuple[int, int, bytes] | None:
        ends = {**self._rotated_ends, **(self._ends or {})}
        try:
            found = self._read_on(self._log.with_name(f"{self._log.name}.1"), ends)
        except CommandFailed:
            return None
        # One that was never read under its first name is from long ago.
        return found if found is not None and (self._ends is None or found[0] in ends) else None

    def _read_on(self, path: PurePosixPath, ends: Mapping[int, int]) -> tuple[int, int, bytes] | None:
        """(inode, how far, whole lines)."""
        piece = self._host.read_on(path, ends, limit_bytes=LONGEST_LOG_BYTES)
        if piece is None:
            return None
        whole = piece.content.rfind(b"\n") + 1
        return piece.inode, piece.start + whole, piece.content[:whole]
