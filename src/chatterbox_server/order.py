"""Whose piece the engine speaks next, and what each client has had of it. Reads no clock, holds no request.

By size: the least remaining work goes first. Two dues keep that from starving anybody. A begun request is due after a
pause of 10 s times its client's begun ones: somebody listens to it, and still others come between two rounds. A request
not begun is due after three quarters of the longest wait: the last quarter is for the piece that is being spoken and
for whoever else is due. Shrinking each claim with its waiting (``remaining × (1 − waited / patience)``) made full
queues refuse more, for long requests came forward before they had to (scripts/bench_queue_order.txt).

Fairness between clients goes before size. A client whose begun request is due has a turn all the same, once it has had
none for 10 s times the clients that have begun one: it gets no more by that than its even part, however much it began.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

PAUSE_S: Final = 10.0
"""Pause between two pieces after which a request is due, for each of its client's that has begun."""

DUE: Final = 0.75
"""Share of the longest wait after which a request that has not begun is due."""

FORGET_S: Final = 60.0
"""A client idle for as long owes nothing."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One request that wants the engine for its next piece."""

    client: str
    admitted_s: float
    waiting_since_s: float
    """Since admission, or since its last piece ended."""
    remaining_s: float
    """Estimated engine seconds still to do; only who goes first hangs on it, no bound."""
    begun: bool
    piece_s: float = 0.0
    """Estimated engine seconds of its next piece: charged when it is chosen, for others may be before it is served."""


class Order(Protocol):
    def choose(self, claims: Sequence[Claim], now_s: float) -> int:
        """Index of the claim whose piece is next; ``claims`` are all there are, at least one."""
        ...

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        """The piece of a claim that was chosen has taken ``engine_s``, whatever became of it."""
        ...


def order(name: Literal["size", "fifo"], *, max_wait_s: float) -> Order:
    """``max_wait_s`` is when the queue refuses a request that has not begun; infinite: never."""
    return _Size(max_wait_s) if name == "size" else _Fifo()


@dataclass(slots=True)
class _Account:
    had_s: float
    """Engine seconds, counted from where the client began."""
    last_s: float
    """When it came, or its last piece began or ended."""
    in_hand: int = 0
    """Pieces that the engine has."""


class _Accounts:
    """What each client has had of the engine, so that who has had least goes first (start-time fair queueing).

    A client that comes begins level with the least served of those who wait, so idleness saves nothing. It is
    remembered while it waits or is served, and for a minute after if it is ahead of them.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Account] = {}
        self._level_s = 0.0

    def __getitem__(self, client: str) -> _Account:
        return self._of[client]

    def __len__(self) -> int:
        return len(self._of)

    def level(self, clients: Iterable[str], now_s: float) -> None:
        """Open an account for each of ``clients``, who are all that wait, and forget those that no longer count."""
        waiting = set(clients)
        known = [self._of[client].had_s for client in waiting if client in self._of]
        self._level_s = max(self._level_s, min(known, default=self._level_s))
        for client in waiting:
            account = self._of.setdefault(client, _Account(self._level_s, now_s))
            account.had_s = max(account.had_s, self._level_s)
        self._of = {
            client: account
            for client, account in self._of.items()
            if client in waiting
            or account.in_hand
            or (account.had_s > self._level_s and now_s - account.last_s < FORGET_S)
        }

    def begin(self, claim: Claim, now_s: float) -> None:
        account = self._of[claim.client]
        account.had_s += claim.piece_s
        account.last_s = now_s
        account.in_hand += 1

    def end(self, claim: Claim, engine_s: float, now_s: float) -> None:
        account = self._of[claim.client]
        account.had_s += engine_s - claim.piece_s
        account.last_s = now_s
        account.in_hand -= 1


class _Fifo:
    """First admitted, first served, and a begun request goes on to its end; clients take turns to begin one."""

    def __init__(self) -> None:
        self._accounts = _Accounts()

    def choose(self, claims: Sequence[Claim], now_s: float) -> int:
        self._accounts.level((claim.client for claim in claims), now_s)

        def place(index: int) -> tuple[bool, float, float]:
            claim = claims[index]
            return not claim.begun, 0.0 if claim.begun else self._accounts[claim.client].had_s, claim.admitted_s

        chosen = min(range(len(claims)), key=place)
        self._accounts.begin(claims[chosen], now_s)
        return chosen

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        self._accounts.end(claim, engine_s, now_s)


class _Size:
    """Clients by what they have had; of one client's requests those that are due, begun ones before; then the shortest.

    A client goes before the others when it has had no turn for as long as what it has due may wait.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._begin_s = DUE * max_wait_s
        self._accounts = _Accounts()

    def choose(self, claims: Sequence[Claim], now_s: float) -> int:
        self._accounts.level((claim.client for claim in claims), now_s)
        begun = Counter(claim.client for claim in claims if claim.begun)

        def place(index: int) -> tuple[int, float, int, float, float]:
            claim = claims[index]
            account = self._accounts[claim.client]
            without_s = now_s - account.last_s
            rank = 0 if claim.begun else 1
            due_s = PAUSE_S * begun[claim.client] if claim.begun else self._begin_s
            if now_s - claim.waiting_since_s < due_s:
                return 2, account.had_s, 2, claim.remaining_s, claim.admitted_s
            if without_s >= (PAUSE_S * len(begun) if claim.begun else self._begin_s):
                return rank, 0.0, rank, claim.waiting_since_s, claim.admitted_s
            return 2, account.had_s, rank, claim.waiting_since_s, claim.admitted_s

        chosen = min(range(len(claims)), key=place)
        self._accounts.begin(claims[chosen], now_s)
        return chosen

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        self._accounts.end(claim, engine_s, now_s)
