"""Admission, order, deadlines, cancellation: laws of the queue before the engine."""

import asyncio
import functools
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chatterbox_server.engine import Engine, EngineBroken, EngineError, Errand, GpuMemory, Refused, Utterance
from chatterbox_server.place import AHEAD, Closed, QueueFull, Spoken, WaitedTooLong
from chatterbox_server.queue import EngineQueue
from server.fakes import FakeEngine, a_queue, an_utterance, noise, queue_of, run, until


async def whole(queue: EngineQueue, *texts: str, **more: Any) -> list[Spoken]:
    """All sounds of one request."""
    async with queue.admit([an_utterance(text) for text in texts], **more) as place:
        return [spoken async for spoken in place]


def asked(queue: EngineQueue, *texts: str, **more: Any) -> asyncio.Task[list[Spoken]]:
    return asyncio.create_task(whole(queue, *texts, **more))


def heard(engine: FakeEngine) -> list[str]:
    return [utterance.text for utterance in engine.heard]


def test_each_gets_its_own_sound_in_the_order_of_asking() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_queue(engine, size=20) as queue:
            texts = [f"text {number}" for number in range(20)]
            answers = await asyncio.gather(*(whole(queue, text) for text in texts))
            assert heard(engine) == texts
            for text, (spoken,) in zip(texts, answers, strict=True):
                np.testing.assert_array_equal(spoken.samples, noise(an_utterance(text)))
            assert (queue.waiting, queue.running, queue.spoken) == (0, 0, 20)

    run(scenario())


def test_one_more_than_may_wait_is_refused_at_once() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, size=2) as queue:
            welcome = [asked(queue, text) for text in ("runs", "waits", "waits too")]
            await until(lambda: (queue.running, queue.waiting) == (1, 2))
            with pytest.raises(QueueFull) as full:
                await whole(queue, "too much")
            assert full.value.retry_after_s >= 1
            engine.let_go(3)
            await asyncio.gather(*welcome)
            assert "too much" not in heard(engine)

    run(scenario())


def test_who_floods_the_queue_gives_places_up_to_others_but_only_so_many() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, size=4) as queue:
            flood = [asked(queue, f"flood {number}", client="loud") for number in range(5)]
            await until(lambda: queue.waiting == 4)
            quiet = [asked(queue, f"quiet {number}", client="quiet") for number in range(3)]
            # Two of four places each; a third would only be taken back.
            await until(quiet[2].done)
            engine.let_go(5)
            answers = await asyncio.gather(*flood, *quiet, return_exceptions=True)
            refused = [number for number, answer in enumerate(answers) if isinstance(answer, QueueFull)]
            assert refused == [3, 4, 7]

    run(scenario())


def test_a_queue_of_no_places_still_serves_one_at_a_time() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, size=0) as queue:
            first = asked(queue, "first")
            await until(lambda: queue.running == 1)
            with pytest.raises(QueueFull):
                await whole(queue, "second")
            engine.let_go()
            await first
            engine.let_go()
            await whole(queue, "third")

    run(scenario())


def test_waiting_has_an_end() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, max_wait_s=0.05) as queue:
            first = asked(queue, "first")
            await until(lambda: queue.running == 1)
            with pytest.raises(WaitedTooLong, match=r"not begun after 0\.05 s of waiting"):
                await whole(queue, "second")
            assert queue.waiting == 0
            engine.let_go()
            # Whoever has begun is past that deadline, however long it takes.
            await first
            assert heard(engine) == ["first"]

    run(scenario())


def test_who_leaves_the_queue_frees_the_place_and_is_never_spoken() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, size=1) as queue:
            first, second = asked(queue, "first"), asked(queue, "second")
            await until(lambda: queue.waiting == 1)
            second.cancel()
            await until(lambda: queue.waiting == 0)
            third = asked(queue, "third")
            await until(lambda: queue.waiting == 1)
            engine.let_go(2)
            await asyncio.gather(first, third)
            assert heard(engine) == ["first", "third"]

    run(scenario())


def test_who_leaves_while_being_spoken_holds_up_only_that_utterance() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            first, second = asked(queue, "first"), asked(queue, "second")
            await until(lambda: heard(engine) == ["first"])
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert (queue.running, queue.waiting) == (1, 1)
            engine.let_go(2)
            np.testing.assert_array_equal((await second)[0].samples, noise(an_utterance("second")))

    run(scenario())


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("refuse", Refused, "that recording is silent"),
        ("fail", EngineError, "the fan is stuck"),
        ("bug", EngineError, "cannot speak: ZeroDivisionError: division by zero"),
        ("stop", EngineError, "cannot speak: StopIteration: no message"),
    ],
)
def test_a_failure_reaches_its_own_caller_and_nobody_else(text: str, error: type[Exception], words: str) -> None:
    async def scenario() -> None:
        async with a_queue(FakeEngine()) as queue:
            failing, fine = asked(queue, text), asked(queue, "fine")
            with pytest.raises(error, match=words):
                await failing
            assert (await fine)[0].samples.size

    run(scenario())


def test_a_broken_engine_is_told_to_who_broke_it_and_refuses_everyone_else() -> None:
    async def scenario() -> None:
        async with a_queue(FakeEngine(held=True)) as queue:
            assert isinstance(queue.engine, FakeEngine)
            breaking, waiting = asked(queue, "break"), asked(queue, "waits")
            await until(lambda: queue.waiting == 1)
            queue.engine.let_go()
            with pytest.raises(EngineBroken):
                await breaking
            for late in (waiting, asked(queue, "comes")):
                with pytest.raises(Closed, match="the engine is broken"):
                    await late
            assert str(queue.broken) == "device-side assert"
            assert not queue.healthy

    run(scenario())


def test_an_engine_that_breaks_while_it_rests_is_known_at_once_and_nobody_waits_for_it() -> None:
    """As when a thread of its own has died: nobody was being spoken who could tell."""

    async def scenario() -> None:
        async with a_queue(FakeEngine(held=True)) as queue:
            assert isinstance(queue.engine, FakeEngine)
            async with queue.admit([an_utterance(str(number)) for number in range(9)]) as book:
                pieces = aiter(book)
                queue.engine.let_go(AHEAD)
                await until(lambda: not queue.running)
                assert queue.healthy
                queue.engine.broken = EngineBroken("a thread has ended")
                assert not queue.healthy
                with pytest.raises(Closed, match="the engine is broken"):
                    await whole(queue, "comes")
                queue.drain()
                with pytest.raises(Closed, match="the engine is broken"):
                    assert [piece async for piece in pieces] == []

    run(scenario())


def test_the_engine_is_loaded_and_called_on_one_thread_that_is_not_the_loops() -> None:
    class Threaded(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            threads.append(threading.current_thread())
            return super().synthesize(utterance, errand)

    def load() -> Engine:
        threads.append(threading.current_thread())
        return Threaded()

    async def scenario() -> None:
        queue = queue_of(load)
        await queue.start()
        await asyncio.gather(*(whole(queue, text) for text in "abc"))
        await queue.close()
        assert len(threads) == 4
        assert set(threads) != {threading.main_thread()}
        assert len(set(threads)) == 1
        assert not threads[0].is_alive()

    threads: list[threading.Thread] = []
    run(scenario())


def test_what_loading_raises_is_raised_by_start() -> None:
    def load() -> Engine:
        raise FileNotFoundError("no conds.pt")

    async def scenario() -> None:
        queue = queue_of(load)
        with pytest.raises(EngineError, match=r"cannot load: FileNotFoundError: no conds\.pt"):
            await queue.start()
        assert not queue.healthy

    run(scenario())


def test_an_utterance_that_runs_too_long_makes_the_engine_unsound_until_it_ends() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, longest_utterance_s=0.05) as queue:
            hangs, waits = asked(queue, "hangs"), asked(queue, "waits")
            await until(lambda: queue.overdue)
            assert not queue.healthy
            with pytest.raises(Closed, match="the engine is stuck"):
                await whole(queue, "comes")
            queue.hand_back("the engine is stuck")
            with pytest.raises(Closed, match="the engine is stuck"):
                await waits
            engine.let_go()
            await hangs
            assert queue.healthy

    run(scenario())


def test_a_stop_hands_back_who_waits_and_finishes_what_was_begun() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            book, waits = asked(queue, "one", "two", "three"), asked(queue, "waits")
            await until(lambda: heard(engine) == ["one"])
            queue.drain()
            with pytest.raises(Closed, match="the server is stopping"):
                await waits
            with pytest.raises(Closed, match="the server is stopping"):
                await whole(queue, "comes")
            assert queue.at_work
            engine.let_go(3)
            assert len(await book) == 3
            assert not queue.at_work

    run(scenario())


def test_a_short_request_slips_in_between_the_pieces_of_a_book() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, order="size") as queue:
            book = asked(queue, "chapter one", "chapter two", "chapter three")
            await until(lambda: heard(engine) == ["chapter one"])
            short = asked(queue, "hi")
            await until(lambda: queue.waiting == 1)
            engine.let_go(4)
            await asyncio.gather(book, short)
            assert heard(engine) == ["chapter one", "hi", "chapter two", "chapter three"]

    run(scenario())


def test_first_in_first_out_lets_a_book_go_on() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, order="fifo") as queue:
            book = asked(queue, "chapter one", "chapter two")
            await until(lambda: heard(engine) == ["chapter one"])
            short = asked(queue, "hi")
            await until(lambda: queue.waiting == 1)
            engine.let_go(3)
            await asyncio.gather(book, short)
            assert heard(engine) == ["chapter one", "chapter two", "hi"]

    run(scenario())


def test_who_leaves_a_book_stops_it_at_the_next_piece() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            book, after = asked(queue, "one", "two", "three"), asked(queue, "after")
            await until(lambda: heard(engine) == ["one"])
            book.cancel()
            engine.let_go(2)
            await after
            assert heard(engine) == ["one", "after"]

    run(scenario())


def test_a_reader_who_takes_nothing_lets_others_pass() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_queue(engine) as queue:
            pieces = [an_utterance(str(number)) for number in range(10)]
            async with queue.admit(pieces) as place:
                await until(lambda: len(engine.heard) == AHEAD)
                await whole(queue, "quick")
                assert heard(engine) == ["0", "1", "quick"]
                assert len([spoken async for spoken in place]) == 10

    run(scenario())


def test_a_wait_elsewhere_counts_towards_the_longest_one() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, max_wait_s=60) as queue:
            first = asked(queue, "first")
            await until(lambda: queue.running == 1)
            with pytest.raises(WaitedTooLong, match="not begun after 60 s"):
                await whole(queue, "second", waited_s=59.99)
            with pytest.raises(WaitedTooLong, match=r"not begun after 0\.01 s"):
                await whole(queue, "third", max_wait_s=0.01)
            engine.let_go()
            await first

    run(scenario())


def test_a_place_knows_how_many_were_before_it() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            places = [queue.admit([an_utterance(text)]) for text in "abc"]
            assert [place.position for place in places] == [0, 1, 2]
            engine.let_go(3)
            for place in places:
                async with place:
                    assert len([spoken async for spoken in place]) == 1

    run(scenario())


def test_an_engine_that_cannot_tell_its_memory_still_speaks() -> None:
    class Amnesiac(FakeEngine):
        def memory(self) -> GpuMemory | None:
            raise OSError("the driver is gone")

    async def scenario() -> None:
        async with a_queue(Amnesiac()) as queue:
            assert len(await whole(queue, "one", "two")) == 2
            assert queue.memory is None

    run(scenario())


def test_what_is_spoken_is_told_also_when_nobody_waits_for_it() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        told: list[Spoken] = []
        async with a_queue(engine, on_spoken=told.append) as queue:
            gone = asked(queue, "gone")
            await until(lambda: heard(engine) == ["gone"])
            gone.cancel()
            engine.let_go()
            await until(lambda: len(told) == 1)

    run(scenario())


def test_a_stop_waits_for_a_book_whose_listener_is_slow() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_queue(engine) as queue:
            async with queue.admit([an_utterance(str(number)) for number in range(5)]) as place:
                pieces = aiter(place)
                await anext(pieces)
                await until(lambda: len(engine.heard) == 1 + AHEAD and not queue.running)
                queue.drain()
                assert queue.at_work
                assert len([spoken async for spoken in pieces]) == 4
            assert not queue.at_work

    run(scenario())


def test_an_idle_engine_gives_back_what_it_caches() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_queue(engine) as queue:
            await whole(queue, "hi")
            await until(lambda: engine.freed == 1)
            await whole(queue, "there")

    run(scenario())


def test_closing_refuses_who_waits_and_leaves_a_stuck_engine_behind() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        queue = queue_of(lambda: engine)
        await queue.start()
        stuck, waits = asked(queue, "stuck"), asked(queue, "waits")
        await until(lambda: queue.waiting == 1)
        await queue.close(patience_s=0.01)
        for refused in (waits, stuck):
            with pytest.raises(Closed, match="the server is stopping"):
                await refused
        engine.let_go()

    run(scenario())


def test_retry_after_is_when_the_request_nearest_to_its_end_ought_to_leave() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            assert queue.retry_after_s() == 1
            book, page = asked(queue, *["x" * 100] * 10), asked(queue, "x" * 300)
            await until(lambda: queue.waiting == 1)
            # At a pace of 10 characters a second, the page is 30 s.
            queue.measured(100, work_s=10.0, share_s=10.0)
            assert queue.retry_after_s() == 30
            engine.let_go(11)
            await asyncio.gather(book, page)

    run(scenario())


steps = st.one_of(
    st.just(("ask", 0)), st.just(("finish", 0)), st.tuples(st.just("leave"), st.integers(min_value=0, max_value=30))
)


def seen(queue: EngineQueue, engine: FakeEngine, waiting: int, running: int, begun: list[int]) -> bool:
    return (queue.waiting, queue.running) == (waiting, running) and heard(engine) == list(map(str, begun))


@settings(max_examples=60, deadline=None)
@given(schedule=st.lists(steps, max_size=40), size=st.integers(min_value=0, max_value=3))
def test_any_schedule_keeps_the_order_and_loses_nobody(schedule: list[tuple[str, int]], size: int) -> None:
    """Against a model of three lists: who waits, who runs, who was spoken."""

    async def scenario() -> None:
        engine = FakeEngine(held=True)
        tasks: list[asyncio.Task[list[Spoken]]] = []
        waiting: list[int] = []
        running: int | None = None
        begun: list[int] = []
        gone: set[int] = set()
        refused: set[int] = set()

        def begin_next() -> int | None:
            if not waiting:
                return None
            begun.append(waiting.pop(0))
            return begun[-1]

        async with a_queue(engine, size=size) as queue:
            for step, which in [*schedule, *(("finish", 0),) * (size + 1)]:
                if step == "ask":
                    number = len(tasks)
                    tasks.append(asked(queue, str(number)))
                    if running is not None and len(waiting) >= size:
                        refused.add(number)
                    else:
                        waiting.append(number)
                        running = begin_next() if running is None else running
                elif step == "leave" and which < len(tasks):
                    if which in waiting or which == running:
                        gone.add(which)
                    if which in waiting:
                        waiting.remove(which)
                    tasks[which].cancel()
                elif step == "finish" and running is not None:
                    engine.let_go()
                    running = begin_next()
                # The thread has taken the model's next, and the loop has seen everything else.
                await until(functools.partial(seen, queue, engine, len(waiting), int(running is not None), begun))
                await asyncio.sleep(0)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert (queue.waiting, queue.running) == (0, 0)
        for number, answer in enumerate(answers):
            if number in gone:
                assert isinstance(answer, asyncio.CancelledError)
            elif number in refused:
                assert isinstance(answer, QueueFull | asyncio.CancelledError)
            else:
                assert isinstance(answer, list)
                np.testing.assert_array_equal(answer[0].samples, noise(an_utterance(str(number))))

    run(scenario())
