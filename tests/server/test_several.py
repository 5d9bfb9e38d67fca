"""An engine that has several utterances in hand: whose they are, what becomes of each, and when it is stuck."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chatterbox_server.engine import Dropped, EngineBroken, EngineError, Errand, OutOfMemory, Utterance
from chatterbox_server.order import Claim, order
from chatterbox_server.place import AHEAD, Closed, QueueFull, Spoken
from chatterbox_server.queue import EngineQueue
from server.fakes import PATIENCE_S, FakeEngine, a_queue, an_utterance, noise, run, until


class Gates(FakeEngine):
    """Each utterance waits for its own gate, and meanwhile asks whether anybody waits for it."""

    def __init__(self, *, places: int, makes_way: bool = True, frees_beside: bool = False) -> None:
        super().__init__(places=places)
        self.frees_beside = frees_beside
        self.inside = 0
        self.opened: set[str] = set()
        self._makes_way = makes_way
        self._changed = threading.Condition()

    def open(self, *texts: str) -> None:
        with self._changed:
            self.opened |= set(texts)
            self._changed.notify_all()

    def free(self) -> None:
        assert self.frees_beside or not self.inside
        super().free()

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        with self._changed:
            self.heard.append(utterance)
            self.inside += 1
        try:
            if self._makes_way:
                errand.make_way()
            with errand.at_work():
                self._wait(utterance.text, errand)
            if "memory" in utterance.text:
                raise OutOfMemory("the GPU is out of memory")
            if "fail" in utterance.text:
                raise EngineError("the fan is stuck")
            if "break" in utterance.text:
                raise EngineBroken("device-side assert")
            return noise(utterance)
        finally:
            with self._changed:
                self.inside -= 1

    def _wait(self, text: str, errand: Errand) -> None:
        until_s = time.monotonic() + PATIENCE_S
        with self._changed:
            while text not in self.opened and "all" not in self.opened:
                errand.check()
                assert time.monotonic() < until_s, "nobody opened the gate"
                self._changed.wait(0.01)


async def whole(queue: EngineQueue, *texts: str, heard: list[Spoken] | None = None, **more: Any) -> list[Spoken]:
    spoken = [] if heard is None else heard
    async with queue.admit([an_utterance(text) for text in texts], **more) as place:
        async for one in place:
            spoken.append(one)
    return spoken


def asked(queue: EngineQueue, *texts: str, **more: Any) -> asyncio.Task[list[Spoken]]:
    return asyncio.create_task(whole(queue, *texts, **more))


def begun(engine: FakeEngine) -> set[str]:
    return {utterance.text for utterance in engine.heard}


def sounds(*texts: str) -> list[bytes]:
    return [noise(an_utterance(text)).tobytes() for text in texts]


def bytes_of(spoken: list[Spoken]) -> list[bytes]:
    return [one.samples.tobytes() for one in spoken]


def test_it_has_as_many_in_hand_as_it_has_places_and_the_others_wait() -> None:
    async def scenario() -> None:
        engine = Gates(places=3)
        async with a_queue(engine, size=2) as queue:
            tasks = [asked(queue, text) for text in "abcde"]
            await until(lambda: begun(engine) == set("abc"))
            assert (queue.running, queue.waiting) == (3, 2)
            with pytest.raises(QueueFull):
                await whole(queue, "f")
            # Whoever is done first makes room, not whoever came first.
            engine.open("b")
            await until(lambda: begun(engine) == set("abcd"))
            assert (queue.running, queue.waiting) == (3, 1)
            engine.open("all")
            assert [bytes_of(answer) for answer in await asyncio.gather(*tasks)] == [sounds(text) for text in "abcde"]

    run(scenario())


def test_the_next_is_chosen_only_when_the_engine_can_begin_it() -> None:
    """Else it would wait inside, where nobody can go before it any more."""

    async def scenario() -> None:
        engine = Gates(places=3, makes_way=False)
        async with a_queue(engine, order="size") as queue:
            queue.measured(10, work_s=1.0, share_s=1.0)
            long, longer = asked(queue, "long " * 10), asked(queue, "longer " * 10)
            await until(lambda: len(engine.heard) == 1)
            short = asked(queue, "hi")
            await until(lambda: queue.waiting == 2)
            assert (queue.running, len(engine.heard)) == (1, 1)
            queue._in_hand[0].errand.make_way()
            await until(lambda: begun(engine) == {"long " * 10, "hi"})
            assert (queue.running, queue.waiting) == (2, 1)
            engine.open("all")
            await asyncio.gather(long, longer, short)

    run(scenario())


def test_a_requests_own_pieces_are_spoken_together_and_heard_in_order() -> None:
    async def scenario() -> None:
        engine = Gates(places=4)
        async with a_queue(engine) as queue:
            heard: list[Spoken] = []
            book = asked(queue, *"12345", heard=heard)
            await until(lambda: len(engine.heard) == AHEAD)
            engine.open("2")
            await until(lambda: queue.running == AHEAD - 1)
            assert heard == []
            assert begun(engine) == {"1", "2"}
            engine.open("all")
            await book
            assert bytes_of(heard) == sounds(*"12345")

    run(scenario())


def test_of_a_failure_is_told_in_its_turn_and_what_comes_behind_is_not_spoken() -> None:
    async def scenario() -> None:
        engine = Gates(places=4)
        async with a_queue(engine) as queue:
            heard: list[Spoken] = []
            book = asked(queue, "1", "fail", "3", heard=heard)
            other = asked(queue, "other")
            await until(lambda: begun(engine) == {"1", "fail", "other"})
            engine.open("fail")
            await until(lambda: queue.running == 2)
            assert not book.done()
            engine.open("1")
            with pytest.raises(EngineError, match="the fan is stuck"):
                await book
            assert bytes_of(heard) == sounds("1")
            engine.open("other")
            assert bytes_of(await other) == sounds("other")
            assert begun(engine) == {"1", "fail", "other"}

    run(scenario())


def test_what_is_in_hand_behind_a_failure_is_dropped_also_when_nobody_reads() -> None:
    async def scenario() -> None:
        engine = Gates(places=4)
        async with a_queue(engine) as queue:
            async with queue.admit([an_utterance(text) for text in ("fail", "2", "3")]) as place:
                await until(lambda: begun(engine) == {"fail", "2"})
                engine.open("fail")
                await until(lambda: not queue.running)
                with pytest.raises(EngineError, match="the fan is stuck"):
                    await anext(aiter(place))
            assert begun(engine) == {"fail", "2"}

    run(scenario())


def test_who_leaves_frees_the_places_of_all_pieces_at_once() -> None:
    async def scenario() -> None:
        engine = Gates(places=2)
        async with a_queue(engine) as queue:
            book, waits = asked(queue, "1", "2", "3"), asked(queue, "waits")
            await until(lambda: begun(engine) == {"1", "2"})
            book.cancel()
            await until(lambda: "waits" in begun(engine))
            await until(lambda: queue.running == 1)
            engine.open("waits")
            assert bytes_of(await waits) == sounds("waits")
            assert queue.spoken == 1

    run(scenario())


def test_a_broken_engine_takes_all_in_hand_with_it() -> None:
    async def scenario() -> None:
        engine = Gates(places=3)
        async with a_queue(engine) as queue:
            breaking, beside, book = asked(queue, "break"), asked(queue, "beside"), asked(queue, "1", "2")
            await until(lambda: begun(engine) == {"break", "beside", "1"})
            engine.open("break")
            with pytest.raises(EngineBroken):
                await breaking
            for lost in (beside, book, asked(queue, "comes")):
                with pytest.raises(Closed, match="the engine is broken"):
                    await lost
            assert str(queue.broken) == "device-side assert"

    run(scenario())


def test_memory_is_given_back_when_nothing_else_is_in_hand() -> None:
    async def scenario() -> None:
        engine = Gates(places=3)
        text = "This one sentence is too long for the memory, its halves are not."
        async with a_queue(engine) as queue:
            short, other = asked(queue, text), asked(queue, "other")
            await until(lambda: begun(engine) == {text, "other"})
            engine.open(text)
            await until(lambda: engine.inside == 1)
            # Whoever comes meanwhile waits for it.
            comes = asked(queue, "comes")
            await until(lambda: queue.running == 3)
            assert (engine.freed, begun(engine)) == (0, {text, "other"})
            engine.open("all")
            with pytest.raises(OutOfMemory):
                # Its first half has the word in it, too.
                await short
            assert bytes_of(await other) == sounds("other")
            assert bytes_of(await comes) == sounds("comes")
            assert engine.freed == 1

    run(scenario())


def test_where_waiting_would_free_nothing_who_runs_out_of_memory_stops_nobody_else() -> None:
    async def scenario() -> None:
        engine = Gates(places=3, frees_beside=True)
        text = "This one sentence is too long for the memory, its halves are not."
        async with a_queue(engine) as queue:
            short, other = asked(queue, text), asked(queue, "other")
            await until(lambda: begun(engine) == {text, "other"})
            engine.open(text)
            # It goes on with its halves, and whoever comes is spoken, while the other is still in hand.
            await until(lambda: engine.freed == 1 and engine.inside == 2)
            engine.open("comes")
            assert bytes_of(await asked(queue, "comes")) == sounds("comes")
            assert not other.done()
            engine.open("all")
            with pytest.raises(OutOfMemory):
                # Its first half has the word in it, too.
                await short
            assert bytes_of(await other) == sounds("other")

    run(scenario())


def test_two_that_run_out_of_memory_at_once_wait_for_each_other_and_not_for_ever() -> None:
    async def scenario() -> None:
        engine = Gates(places=2)
        async with a_queue(engine) as queue:
            tasks = [asked(queue, f"{number}: out of memory") for number in range(4)]
            await until(lambda: queue.running == 2)
            engine.open("all")
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(answer, OutOfMemory) for answer in answers)
            assert engine.freed == 4

    run(scenario())


def test_an_engine_at_rest_gives_back_what_it_caches_and_only_then() -> None:
    async def scenario() -> None:
        engine = Gates(places=2)
        async with a_queue(engine) as queue:
            one, other = asked(queue, "one"), asked(queue, "other")
            engine.open("one")
            await one
            assert queue._rest is None
            engine.open("other")
            await other
            await until(lambda: engine.freed == 1)

    run(scenario())


def test_each_has_its_share_of_the_engines_time() -> None:
    async def scenario() -> None:
        engine = Gates(places=2)
        async with a_queue(engine) as queue:
            began_s = time.monotonic()
            tasks = [asked(queue, text) for text in ("one", "other")]
            await until(lambda: queue.running == 2)
            await asyncio.sleep(0.05)
            engine.open("all")
            spoken = [one for task in tasks for one in await task]
            elapsed_s = time.monotonic() - began_s
            assert 0.05 <= sum(one.synthesis_s for one in spoken) <= elapsed_s

    run(scenario())


def test_what_waits_for_its_turn_inside_does_not_make_the_engine_seem_stuck() -> None:
    errand = Errand()
    now_s = time.monotonic()
    with errand.at_work():
        assert errand.worked_s(now_s + 1000) == pytest.approx(1000, abs=PATIENCE_S)
        assert errand.idle_s(now_s + 1000) == 0.0
    assert errand.worked_s(now_s + 1000) < PATIENCE_S
    assert errand.idle_s(now_s + 1000) == pytest.approx(1000, abs=PATIENCE_S)


def test_an_engine_in_which_nobody_works_on_anything_is_stuck() -> None:
    class Lost(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            if utterance.text == "lost":
                assert found.wait(PATIENCE_S)
            return super().synthesize(utterance, errand)

    async def scenario() -> None:
        async with a_queue(Lost(places=2), longest_utterance_s=0.05) as queue:
            lost = asked(queue, "lost")
            await until(lambda: queue.overdue)
            found.set()
            await lost
            assert queue.healthy

    found = threading.Event()
    run(scenario())


def test_a_dropped_errand_does_not_begin() -> None:
    errand = Errand()
    errand.drop()
    with pytest.raises(Dropped), errand.at_work():
        pytest.fail("nobody waits for it")


def test_way_is_made_once() -> None:
    made: list[str] = []
    errand = Errand(lambda: made.append("way"))
    errand.make_way()
    errand.make_way()
    assert made == ["way"]


def test_retry_after_counts_on_what_is_in_hand() -> None:
    async def scenario() -> None:
        engine = Gates(places=3)
        async with a_queue(engine) as queue:
            tasks = [asked(queue, "x" * 100, str(number)) for number in range(3)]
            await until(lambda: queue.running == 3)
            # Alone, 100 characters take 30 s; of the engine's time, 10.
            queue.measured(100, work_s=30.0, share_s=10.0)
            assert queue.retry_after_s() == 30
            engine.open("all")
            await asyncio.gather(*tasks)

    run(scenario())


# -- fairness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["size", "fifo"])
def test_a_client_is_charged_for_what_is_in_hand_before_it_is_done(name: Any) -> None:
    """Else whoever had least would get every place that is free."""
    chosen_by = order(name, max_wait_s=60)
    waiting = [Claim(client, 0.0, 0.0, 5.0, begun=False, piece_s=5.0) for client in ("a", "b") for _ in range(4)]
    chosen = []
    while waiting:
        chosen.append(waiting.pop(chosen_by.choose(waiting, 1.0)))
    assert [claim.client for claim in chosen] == ["a", "b"] * 4
    for claim in chosen:
        chosen_by.served(claim, 5.0, 6.0)


def test_who_has_something_in_hand_is_remembered_until_it_is_done() -> None:
    chosen_by = order("size", max_wait_s=60)
    gone = Claim("gone", 0.0, 0.0, 1.0, begun=False)
    chosen_by.choose([gone], 0.0)
    for second in range(1, 300):
        other = Claim("other", float(second), float(second), 1.0, begun=False)
        chosen_by.served([other][chosen_by.choose([other], float(second))], 1.0, second + 1.0)
    chosen_by.served(gone, 300.0, 300.0)


# -- any schedule -----------------------------------------------------------------------------------------

steps = st.one_of(
    st.just(("ask", 0)),
    st.tuples(st.sampled_from(["finish", "leave"]), st.integers(min_value=0, max_value=30)),
)


@settings(max_examples=40, deadline=None)
@given(schedule=st.lists(steps, max_size=40), places=st.integers(1, 4))
def test_any_schedule_fills_the_places_and_loses_nobody(schedule: list[tuple[str, int]], places: int) -> None:
    """Against a model of two lists: who is in hand, who waits. Whoever leaves is gone at once."""

    async def scenario() -> None:
        engine = Gates(places=places)
        tasks: list[asyncio.Task[list[Spoken]]] = []
        in_hand: list[int] = []
        waiting: list[int] = []
        gone: set[int] = set()
        ever: set[int] = set()

        def settle() -> Callable[[], bool]:
            while waiting and len(in_hand) < places:
                in_hand.append(waiting.pop(0))
            ever.update(in_hand)
            names = {str(number) for number in ever}
            return lambda: (queue.running, queue.waiting, begun(engine)) == (len(in_hand), len(waiting), names)

        async with a_queue(engine, size=100) as queue:
            for step, which in schedule:
                if step == "ask":
                    waiting.append(len(tasks))
                    tasks.append(asked(queue, str(len(tasks))))
                elif step == "leave" and which < len(tasks) and not tasks[which].done():
                    gone.add(which)
                    tasks[which].cancel()
                    for among in (in_hand, waiting):
                        if which in among:
                            among.remove(which)
                elif step == "finish" and in_hand:
                    number = in_hand.pop(which % len(in_hand))
                    engine.open(str(number))
                await until(settle())
            engine.open("all")
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            if number in gone:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert isinstance(answer, list)
                assert bytes_of(answer) == sounds(str(number))

    run(scenario())
