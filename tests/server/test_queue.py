"""Admission, order, deadlines, cancellation: laws of the queue before the engine."""

import asyncio
import functools
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatterbox_server.engine import Engine, EngineBroken, EngineError, Refused
from chatterbox_server.queue import Closed, EngineQueue, QueueFull, Spoken, WaitedTooLong, retry_after_s
from server.fakes import FakeEngine, a_queue, an_utterance, noise, run, until


def asked(queue: EngineQueue, text: str) -> asyncio.Task[Spoken]:
    return asyncio.create_task(queue.speak(an_utterance(text)))


def heard(engine: FakeEngine) -> list[str]:
    return [utterance.text for utterance in engine.heard]


def test_each_gets_its_own_sound_in_the_order_of_asking() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_queue(engine, size=20) as queue:
            texts = [f"text {number}" for number in range(20)]
            answers = await asyncio.gather(*(queue.speak(an_utterance(text)) for text in texts))
            assert heard(engine) == texts
            for text, spoken in zip(texts, answers, strict=True):
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
                await queue.speak(an_utterance("too much"))
            assert full.value.retry_after_s >= 1
            engine.let_go(3)
            await asyncio.gather(*welcome)
            assert "too much" not in heard(engine)

    run(scenario())


def test_a_queue_of_no_places_still_serves_one_at_a_time() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, size=0) as queue:
            first = asked(queue, "first")
            await until(lambda: queue.running == 1)
            with pytest.raises(QueueFull):
                await queue.speak(an_utterance("second"))
            engine.let_go()
            await first
            engine.let_go()
            await queue.speak(an_utterance("third"))

    run(scenario())


def test_waiting_has_an_end() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine, max_wait_s=0.05) as queue:
            first = asked(queue, "first")
            await until(lambda: queue.running == 1)
            with pytest.raises(WaitedTooLong, match=r"not begun after 0\.05 s of waiting"):
                await queue.speak(an_utterance("second"))
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
            np.testing.assert_array_equal((await second).samples, noise(an_utterance("second")))

    run(scenario())


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("refuse", Refused, "that recording is silent"),
        ("fail", EngineError, "the GPU is out of memory"),
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
            assert (await fine).samples.size

    run(scenario())


def test_a_broken_engine_is_reported_once_and_refuses_everyone() -> None:
    async def scenario() -> None:
        reported: list[EngineBroken] = []
        engine = FakeEngine(held=True)
        queue = EngineQueue(lambda: engine, size=8, max_wait_s=60, on_broken=reported.append)
        await queue.start()
        breaking, waiting = asked(queue, "break"), asked(queue, "waits")
        await until(lambda: queue.waiting == 1)
        engine.let_go()
        with pytest.raises(EngineBroken):
            await breaking
        for late in (waiting, asked(queue, "comes")):
            with pytest.raises(Closed, match="the engine is broken: device-side assert"):
                await late
        assert [str(error) for error in reported] == ["device-side assert"]
        assert not queue.alive
        await queue.close()

    run(scenario())


def test_the_engine_is_loaded_and_called_on_one_thread_that_is_not_the_loops() -> None:
    class Threaded(FakeEngine):
        def synthesize(self, utterance: Any) -> Any:
            threads.append(threading.current_thread())
            return super().synthesize(utterance)

    def load() -> Engine:
        threads.append(threading.current_thread())
        return Threaded()

    async def scenario() -> None:
        queue = EngineQueue(load, size=8, max_wait_s=60)
        await queue.start()
        await asyncio.gather(*(queue.speak(an_utterance(text)) for text in "abc"))
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
        queue = EngineQueue(load, size=8, max_wait_s=60)
        with pytest.raises(EngineError, match=r"cannot load: FileNotFoundError: no conds\.pt"):
            await queue.start()
        assert not queue.sound(60)

    run(scenario())


def test_an_utterance_that_runs_too_long_makes_the_engine_unsound() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_queue(engine) as queue:
            assert queue.busy_since is None
            assert queue.sound(0.0)
            task = asked(queue, "hangs")
            await until(lambda: queue.busy_since is not None)
            await until(lambda: not queue.sound(0.01))
            assert queue.sound(3600)
            engine.let_go()
            await task
            assert queue.sound(0.01)

    run(scenario())


def test_closing_refuses_who_waits_and_leaves_a_stuck_engine_behind() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        queue = EngineQueue(lambda: engine, size=8, max_wait_s=60)
        await queue.start()
        stuck, waits = asked(queue, "stuck"), asked(queue, "waits")
        await until(lambda: queue.waiting == 1)
        await queue.close(patience_s=0.01)
        with pytest.raises(Closed, match="the server is stopping"):
            await waits
        engine.let_go()
        await stuck

    run(scenario())


@pytest.mark.parametrize(
    ("recent_s", "elapsed_s", "expected"),
    [
        ((), 0.0, 1),
        ((4.0,), 0.0, 4),
        ((2.0, 4.0, 6.0), 0.0, 4),
        ((4.0,), 1.5, 3),
        ((4.0,), 60.0, 1),
    ],
)
def test_retry_after_is_when_the_running_utterance_ought_to_end(
    recent_s: tuple[float, ...], elapsed_s: float, expected: int
) -> None:
    assert retry_after_s(recent_s, elapsed_s=elapsed_s) == expected


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
        tasks: list[asyncio.Task[Spoken]] = []
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
                assert isinstance(answer, Spoken)
                np.testing.assert_array_equal(answer.samples, noise(an_utterance(str(number))))

    run(scenario())
