"""Whose piece is next: bounds that hold whoever comes, and however wrong the estimates are."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatterbox_server.order import DUE, FORGET_S, PAUSE_S, Claim, Order, order

MAX_WAIT_S = 60.0
PIECE_S = 10.0
PLACES = 9

both = pytest.mark.parametrize("name", ["size", "fifo"])


def a_claim(
    *,
    client: str = "anna",
    at_s: float = 0.0,
    since_s: float | None = None,
    remaining_s: float = 1.0,
    begun: bool = False,
) -> Claim:
    return Claim(client, at_s, at_s if since_s is None else since_s, remaining_s, begun)


claims = st.builds(
    a_claim,
    client=st.sampled_from("abc"),
    at_s=st.floats(0, 100),
    remaining_s=st.floats(0, 1000),
    begun=st.booleans(),
)


@dataclass(frozen=True)
class Turn:
    claim: Claim
    began_s: float
    ended_s: float


def turns(
    chosen_by: Order,
    comes: Callable[[float], Sequence[tuple[Claim, float]]],
    *,
    until_s: float,
    piece_s: float = PIECE_S,
    max_wait_s: float = MAX_WAIT_S,
    places: int | None = None,
) -> list[Turn]:
    """Pieces as one engine speaks them; ``comes`` gives the new claims at each boundary, with the true seconds."""
    waiting: list[tuple[Claim, float]] = []
    spoken: list[Turn] = []
    now_s = 0.0
    while now_s < until_s:
        waiting = [one for one in waiting if one[0].begun or now_s - one[0].admitted_s < max_wait_s]
        waiting.extend(list(comes(now_s))[: None if places is None else max(0, places - len(waiting))])
        if not waiting:
            break
        claim, left_s = waiting.pop(chosen_by.choose([claim for claim, _ in waiting], now_s))
        took_s = min(piece_s, left_s)
        spoken.append(Turn(claim, now_s, now_s + took_s))
        now_s += took_s
        chosen_by.served(claim, took_s, now_s)
        if left_s > took_s:
            share = (left_s - took_s) / left_s
            claim = replace(claim, begun=True, waiting_since_s=now_s, remaining_s=claim.remaining_s * share)
            waiting.append((claim, left_s - took_s))
    return spoken


def pauses_s(spoken: Sequence[Turn]) -> list[float]:
    return [turn.began_s - turn.claim.waiting_since_s for turn in spoken if turn.claim.begun]


@both
@given(at_once=st.lists(st.lists(claims, min_size=1, max_size=8), min_size=1, max_size=8))
def test_one_of_those_who_wait_is_chosen_the_same_each_time(
    name: Literal["size", "fifo"], at_once: list[list[Claim]]
) -> None:
    one, other = order(name, max_wait_s=MAX_WAIT_S), order(name, max_wait_s=MAX_WAIT_S)
    for turn, waiting in enumerate(at_once):
        now_s = 100.0 + turn
        chosen = one.choose(waiting, now_s)
        assert 0 <= chosen < len(waiting)
        assert chosen == other.choose(waiting, now_s)
        for each in (one, other):
            each.served(waiting[chosen], 1.0, now_s)


@given(sizes_s=st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_first_come_first_served_to_its_end(sizes_s: list[float]) -> None:
    coming = [(a_claim(at_s=-1 + place / 100, remaining_s=size_s), size_s) for place, size_s in enumerate(sizes_s)]
    spoken = turns(
        order("fifo", max_wait_s=MAX_WAIT_S),
        lambda now_s: coming if now_s == 0 else [],
        until_s=math.inf,
        max_wait_s=math.inf,
    )
    assert [turn.claim.admitted_s for turn in spoken] == sorted(turn.claim.admitted_s for turn in spoken)
    assert sum(turn.ended_s - turn.began_s for turn in spoken) == pytest.approx(sum(sizes_s))


def test_first_come_first_served_lets_nobody_between_two_pieces() -> None:
    chosen_by = order("fifo", max_wait_s=MAX_WAIT_S)
    # Later than the other, yet its client's turn came before.
    book, other = a_claim(client="reader", at_s=1.0, remaining_s=100), a_claim(client="other", at_s=0.5)
    chosen_by.choose([book], 1.0)
    chosen_by.served(book, 10.0, 11.0)
    assert chosen_by.choose([replace(book, begun=True, waiting_since_s=11.0), other], 11.0) == 0


@given(sizes_s=st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_shortest_first_ties_by_admission(sizes_s: list[int]) -> None:
    waiting = [a_claim(at_s=place / 100, remaining_s=size_s) for place, size_s in enumerate(sizes_s)]
    chosen = order("size", max_wait_s=MAX_WAIT_S).choose(waiting, 1.0)
    assert chosen == sizes_s.index(min(sizes_s))


def test_a_shorter_request_goes_between_the_pieces_of_a_longer_one() -> None:
    book = a_claim(since_s=9.0, remaining_s=100, begun=True)
    short = a_claim(at_s=9.5, remaining_s=1)
    assert order("size", max_wait_s=MAX_WAIT_S).choose([book, short], 10.0) == 1
    assert order("fifo", max_wait_s=MAX_WAIT_S).choose([book, short], 10.0) == 0


@settings(deadline=None)
@given(
    shorts_s=st.lists(st.floats(0.1, PIECE_S), min_size=1, max_size=20),
    clients=st.sampled_from(["one", "two", "each its own"]),
    off=st.floats(0.5, 2.0),
)
def test_a_begun_book_never_pauses_long_however_many_shorts_come(
    shorts_s: list[float], clients: str, off: float
) -> None:
    came = 0

    def comes(now_s: float) -> list[tuple[Claim, float]]:
        nonlocal came
        if now_s == 0:
            return [(a_claim(client="reader", remaining_s=600 * off), 600.0)]
        came += 2
        names = {"one": "reader", "two": "other", "each its own": f"{came}"}
        sizes_s = (shorts_s[came % len(shorts_s)], shorts_s[(came + 1) % len(shorts_s)])
        return [(a_claim(client=names[clients], at_s=now_s, remaining_s=size_s / off), size_s) for size_s in sizes_s]

    spoken = turns(order("size", max_wait_s=MAX_WAIT_S), comes, until_s=600)
    assert len(pauses_s(spoken)) > 10
    # Due after PAUSE_S; then the piece that is being spoken ends.
    assert max(pauses_s(spoken)) <= PAUSE_S + PIECE_S


@settings(deadline=None)
@given(
    sizes_s=st.lists(st.floats(0.1, 300), min_size=1, max_size=20),
    clients=st.integers(1, 4),
    off=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=7),
)
def test_a_pause_has_a_bound_whoever_comes(sizes_s: list[float], clients: int, off: list[float]) -> None:
    came = 0

    def comes(now_s: float) -> list[tuple[Claim, float]]:
        nonlocal came
        came += 1
        size_s = sizes_s[came % len(sizes_s)]
        return [(a_claim(client=str(came % clients), at_s=now_s, remaining_s=size_s * off[came % len(off)]), size_s)]

    spoken = turns(order("size", max_wait_s=MAX_WAIT_S), comes, until_s=900, places=PLACES)
    # A round of all clients for each request that the client may have begun.
    rounds = PLACES - clients + 1
    assert max(pauses_s(spoken), default=0.0) <= rounds * clients * (PAUSE_S + PIECE_S)


@settings(deadline=None)
@given(short_s=st.floats(0.2, PIECE_S), clients=st.sampled_from(["same", "other", "each its own"]))
def test_a_book_is_begun_before_the_queue_refuses_it(short_s: float, clients: str) -> None:
    came = 0

    def comes(now_s: float) -> list[tuple[Claim, float]]:
        nonlocal came
        came += 1
        names = {"same": "reader", "other": "other", "each its own": f"{came}"}
        short = (a_claim(client=names[clients], at_s=now_s, remaining_s=short_s), short_s)
        return [*([(a_claim(client="reader", remaining_s=600), 600.0)] if now_s == 0 else []), short, short]

    spoken = turns(order("size", max_wait_s=MAX_WAIT_S), comes, until_s=2 * MAX_WAIT_S)
    begun_s = next(turn.began_s for turn in spoken if turn.claim.remaining_s == 600)
    # Due, and then the piece that is being spoken ends.
    assert begun_s <= DUE * MAX_WAIT_S + PIECE_S < MAX_WAIT_S


@both
@settings(deadline=None)
@given(times=st.integers(2, 8), flood_s=st.floats(0.5, 9.0), modest_s=st.floats(0.5, 9.0))
def test_a_client_that_floods_gets_no_more_than_one_that_does_not(
    name: Literal["size", "fifo"], times: int, flood_s: float, modest_s: float
) -> None:
    modest: set[float] = set()

    def comes(now_s: float) -> list[tuple[Claim, float]]:
        flood = [(a_claim(client="flood", at_s=now_s, remaining_s=flood_s), flood_s)] * times
        modest.add(now_s)
        return [*flood, (a_claim(client="modest", at_s=now_s, remaining_s=modest_s), modest_s)]

    spoken = turns(order(name, max_wait_s=MAX_WAIT_S), comes, until_s=400)
    had_s: Counter[str] = Counter()
    for turn in spoken:
        had_s[turn.claim.client] += turn.ended_s - turn.began_s  # type: ignore[assignment]
    assert abs(had_s["flood"] - had_s["modest"]) <= 2 * max(flood_s, modest_s) + 1e-6


@settings(deadline=None)
@given(reads=st.integers(1, 6), short_s=st.floats(0.5, 9.0))
def test_books_begun_earlier_leave_half_of_the_engine_to_who_comes(reads: int, short_s: float) -> None:
    def comes(now_s: float) -> list[tuple[Claim, float]]:
        if now_s == 0:
            return [(a_claim(client="reader", since_s=-1, remaining_s=1e4, begun=True), 1e4)] * reads
        return [(a_claim(client="modest", at_s=now_s, remaining_s=short_s), short_s)] if now_s > 60 else []

    spoken = turns(order("size", max_wait_s=MAX_WAIT_S), comes, until_s=1060)
    modest_s = sum(turn.ended_s - turn.began_s for turn in spoken if turn.claim.client == "modest")
    assert modest_s >= 500 - 2 * PIECE_S


@both
def test_who_comes_late_has_saved_nothing(name: Literal["size", "fifo"]) -> None:
    chosen_by = order(name, max_wait_s=math.inf)

    def comes(now_s: float) -> list[tuple[Claim, float]]:
        early = (a_claim(client="early", at_s=now_s, remaining_s=1), 1.0)
        late = (a_claim(client="late", at_s=now_s, remaining_s=1), 1.0)
        return [early, late] if now_s == 0 or now_s >= 500 else [early]

    spoken = turns(chosen_by, comes, until_s=600, max_wait_s=math.inf)
    last = Counter(turn.claim.client for turn in spoken if turn.began_s >= 500)
    assert abs(last["early"] - last["late"]) <= 1


def test_what_a_client_had_long_ago_is_not_held_against_it() -> None:
    heavy, light = a_claim(client="heavy", remaining_s=1), a_claim(client="light", remaining_s=2)
    for idle_s, first in ((1.0, light), (FORGET_S, heavy)):
        now_s = 100.0 + idle_s
        chosen_by = order("size", max_wait_s=math.inf)
        chosen_by.choose([heavy, light], 0.0)
        chosen_by.served(heavy, 100.0, 100.0)
        chosen_by.choose([light], now_s)
        waiting = [heavy, light]
        assert waiting[chosen_by.choose(waiting, now_s)] == first


@both
def test_no_more_clients_are_remembered_than_were_served_in_a_minute(name: Literal["size", "fifo"]) -> None:
    chosen_by = order(name, max_wait_s=MAX_WAIT_S)
    waits = a_claim(client="waits", remaining_s=1e6)
    for second in range(1000):
        comes = a_claim(client=f"client {second}", at_s=float(second), remaining_s=1)
        waiting = [waits, comes]
        chosen_by.served(waiting[chosen_by.choose(waiting, float(second))], 1.0, second + 1.0)
    assert len(chosen_by._accounts) <= FORGET_S + 2  # type: ignore[attr-defined]
