from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from pydantic import SecretStr

from flux_prefect.api.pacing import Pacer, PacingTimeout, Turn, shared_pacer

FOREVER = 60.0
KEY = SecretStr("sk-test")


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - a pacer rings no bell for its onlookers
            await asyncio.sleep(0.002)


async def _accept(pacer: Pacer, calls: int) -> None:
    for _ in range(calls):
        turn = pacer.turn(FOREVER)
        async with pacer.slot(turn):
            pacer.accepted(turn)


async def _refuse(pacer: Pacer, pause: float = 0.0) -> None:
    turn = pacer.turn(FOREVER)
    async with pacer.slot(turn):
        pacer.refused(turn, pause)


@asynccontextmanager
async def _hold(pacer: Pacer, calls: int) -> AsyncIterator[list[Turn]]:
    """Slots for so many calls at once."""
    turns = [pacer.turn(FOREVER) for _ in range(calls)]
    async with AsyncExitStack() as slots:
        for turn in turns:
            await slots.enter_async_context(pacer.slot(turn))
        yield turns


async def _burst(pacer: Pacer, *, sent: int, held: int, pause: float = 0.0) -> None:
    """So many calls at once, of which the service takes only the first ones."""
    async with _hold(pacer, held), AsyncExitStack() as all_refused:
        refused = []
        for turn in [pacer.turn(FOREVER) for _ in range(sent - held)]:
            slot = await all_refused.enter_async_context(AsyncExitStack())
            await slot.enter_async_context(pacer.slot(turn))
            refused.append((turn, slot))
        for turn, slot in refused:
            pacer.refused(turn, pause)
            await slot.aclose()


async def _windows(pacer: Pacer, windows: int) -> None:
    """So many times as many calls at once as are allowed, all of them taken."""
    for _ in range(windows):
        async with _hold(pacer, pacer.limit) as turns:
            for turn in turns:
                pacer.accepted(turn)


async def test_never_more_calls_at_once_than_the_limit() -> None:
    """Fifty calls through three slots: three at once, and all of them done."""
    pacer = Pacer(3)
    at_once: list[int] = []
    inside = 0

    async def call() -> None:
        nonlocal inside
        async with pacer.slot(pacer.turn(FOREVER)):
            inside += 1
            at_once.append(inside)
            await asyncio.sleep(0.001)
            inside -= 1

    await asyncio.gather(*(call() for _ in range(50)))
    assert len(at_once) == 50
    assert max(at_once) == 3
    assert pacer.in_flight == 0


async def test_who_asked_first_goes_first_also_after_a_refusal() -> None:
    """A refused call keeps its place before those that asked later."""
    pacer = Pacer(1)
    order: list[str] = []

    async def call(name: str, turn: Turn, *, refused: bool = False) -> None:
        async with pacer.slot(turn):
            order.append(name)
            await asyncio.sleep(0.005)
            if not refused:
                return
            pacer.refused(turn, 0.0)
        await call(name, turn)

    turns = [pacer.turn(FOREVER) for _ in range(3)]
    await asyncio.gather(call("a", turns[0], refused=True), call("b", turns[1]), call("c", turns[2]))
    assert order[0] == "a"
    assert order.index("c") == 3
    # "b" got the slot that "a" left, then "a" was before "c".
    assert order == ["a", "b", "a", "c"]


async def test_all_calls_may_go_at_once_until_one_is_refused() -> None:
    """The setting's whole limit is available from the start."""
    pacer = Pacer(50)
    with anyio.fail_after(1):
        async with _hold(pacer, 50):
            assert pacer.in_flight == 50
    assert pacer.learned_limit is None


async def test_one_burst_of_refusals_halves_the_limit_once() -> None:
    """Calls that were in flight at the halving belong to the same burst; the next burst halves again."""
    pacer = Pacer(8)
    await _burst(pacer, sent=8, held=6)
    assert pacer.limit == 4
    await _refuse(pacer)
    assert pacer.limit == 2


@pytest.mark.parametrize(
    ("sent", "held", "limit", "ceiling", "learnt"),
    [
        (8, 7, 4, 7, 7),
        (8, 4, 4, 4, 4),
        (8, 3, 3, 3, 3),
        (8, 1, 1, 1, 1),
        (50, 7, 7, 7, 7),
        (8, 0, 1, None, 1),  # a service that accepts nothing gives no estimate of its limit
        (2, 1, 4, None, 4),  # nor does one that refuses while few calls are out
    ],
)
async def test_a_burst_leaves_what_the_service_holds(
    sent: int, held: int, limit: int, ceiling: int | None, learnt: int
) -> None:
    """At most half of what it was, and what was not refused is remembered as the ceiling."""
    pacer = Pacer(max(sent, 8))
    await _burst(pacer, sent=sent, held=held)
    assert (pacer.limit, pacer.ceiling, pacer.learned_limit) == (limit, ceiling, learnt)


async def test_below_the_ceiling_the_limit_grows_with_every_accepted_call() -> None:
    """So much was held before; at the ceiling this ends."""
    pacer = Pacer(16)
    await _burst(pacer, sent=16, held=11)
    seen = [pacer.limit]
    for _ in range(5):
        await _accept(pacer, 1)
        seen.append(pacer.limit)
    assert seen == [8, 9, 10, 11, 11, 11]


async def test_beyond_the_ceiling_one_more_is_tried_after_sixteen_full_windows() -> None:
    """A full window with it proves that the service has grown: from there each window is worth one more."""
    pacer = Pacer(50)
    await _burst(pacer, sent=50, held=7)
    await _windows(pacer, 15)
    assert pacer.limit == 7
    await _windows(pacer, 1)
    assert (pacer.limit, pacer.ceiling) == (8, 7)
    await _windows(pacer, 1)
    assert (pacer.limit, pacer.ceiling) == (9, None)
    await _windows(pacer, 3)
    assert pacer.limit == 12


async def test_each_refused_try_doubles_the_windows_before_the_next() -> None:
    """Up to 64; each halves the limit too, which is back at the ceiling as soon as calls are accepted."""
    pacer = Pacer(50)
    await _burst(pacer, sent=50, held=7)
    for windows in (16, 32, 64, 64):
        await _windows(pacer, windows - 1)
        assert pacer.limit == 7
        await _windows(pacer, 1)
        assert pacer.limit == 8
        await _burst(pacer, sent=8, held=7)
        assert (pacer.limit, pacer.ceiling) == (4, 7)
        await _accept(pacer, 3)
        assert pacer.limit == 7


async def test_a_service_that_has_grown_is_tried_again_soon() -> None:
    """Refusals at the old ceiling do not count against the new one."""
    pacer = Pacer(50)
    await _burst(pacer, sent=50, held=7)
    await _windows(pacer, 16)
    await _burst(pacer, sent=8, held=7)
    await _accept(pacer, 3)
    await _windows(pacer, 32 + 1)
    assert (pacer.limit, pacer.ceiling) == (9, None)
    await _burst(pacer, sent=9, held=8)
    await _accept(pacer, 4)
    assert (pacer.limit, pacer.ceiling) == (8, 8)
    await _windows(pacer, 16)
    assert pacer.limit == 9


async def test_calls_that_leave_room_prove_nothing_beyond_the_ceiling() -> None:
    """One call at a time, however often, does not show that eight would be taken."""
    pacer = Pacer(50)
    await _burst(pacer, sent=50, held=7)
    await _accept(pacer, 500)
    assert pacer.limit == 7


async def test_looking_for_more_costs_at_most_a_sixteenth_of_the_time() -> None:
    """A refused call would stop everybody for a pause, so sixteen pauses pass before the next is risked."""
    pacer = Pacer(50)
    await _burst(pacer, sent=50, held=7, pause=0.05)
    refused_at = time.monotonic()
    while pacer.limit == 7:
        await _windows(pacer, 1)
        await asyncio.sleep(0.001)
    assert 16 * 0.05 <= time.monotonic() - refused_at < 5


@pytest.mark.parametrize("grown", [7, 12])
async def test_an_unknown_limit_is_found(grown: int) -> None:
    """Of fifty at once the service takes seven: few are refused, and where it takes more later, that is found too."""
    pacer = Pacer(50)
    room = 7
    inside = done = refused = 0

    async def call() -> None:
        nonlocal inside, done, refused
        turn = pacer.turn(FOREVER)
        while True:
            async with pacer.slot(turn):
                if inside < room:
                    inside += 1
                    await asyncio.sleep(0.002)
                    inside -= 1
                    done += 1
                    pacer.accepted(turn)
                    return
                await asyncio.sleep(0.0005)
                refused += 1
                pacer.refused(turn, 0.0)

    with anyio.fail_after(20):
        await asyncio.gather(*(call() for _ in range(1000)))
        room = grown
        await asyncio.gather(*(call() for _ in range(1000)))
    assert done == 2000
    assert refused < 0.05 * (done + refused)
    assert pacer.ceiling == grown


async def test_what_an_earlier_process_learnt_is_where_it_begins() -> None:
    """As the limit and as the ceiling, beyond which it goes with the same care."""
    pacer = Pacer(50)
    pacer.resume(7)
    await _windows(pacer, 15)
    assert (pacer.limit, pacer.ceiling) == (7, 7)
    await _windows(pacer, 1)
    assert pacer.limit == 8


async def test_what_was_learnt_stays_under_the_setting() -> None:
    """A setting that is lower holds; where it is raised, what was learnt is reached quickly, and not passed."""
    pacer = Pacer(4)
    pacer.resume(7)
    assert pacer.limit == 4
    pacer.max_in_flight = 50
    assert pacer.limit == 4
    await _accept(pacer, 10)
    assert pacer.limit == 7


async def test_a_raised_setting_does_not_forget_a_ceiling() -> None:
    """Also where the limit stands at the setting, as it tries one call more."""
    pacer = Pacer(8)
    await _burst(pacer, sent=8, held=7)
    await _accept(pacer, 3)
    await _windows(pacer, 16)
    assert pacer.limit == 8
    pacer.max_in_flight = 50
    assert pacer.limit == 8


async def test_the_limit_never_falls_below_one() -> None:
    """However often the service refuses, one call at a time goes on."""
    pacer = Pacer(3)
    for _ in range(4):
        await _refuse(pacer)
    assert pacer.limit == 1
    await _accept(pacer, 1)
    assert pacer.limit == 2


async def test_with_no_ceiling_known_the_limit_grows_by_one_after_a_full_window() -> None:
    """From two: two calls to three, three more to four, and there it stays, as that is its maximum."""
    pacer = Pacer(4)
    await _refuse(pacer)
    seen = []
    for _ in range(9):
        await _accept(pacer, 1)
        seen.append(pacer.limit)
    assert seen == [2, 3, 3, 3, 4, 4, 4, 4, 4]


async def test_success_of_calls_sent_before_the_halving_does_not_raise_the_limit() -> None:
    """They were taken under the old load, so they prove nothing of the new limit."""
    pacer = Pacer(8)
    async with _hold(pacer, 7) as early:
        await _refuse(pacer)
        for turn in early:
            pacer.accepted(turn)
    assert (pacer.limit, pacer.ceiling) == (4, 7)


async def test_a_refusal_stops_everybody_until_its_pause_is_over() -> None:
    """Those who waited already and those who come later; the longest pause holds."""
    pacer = Pacer(2)
    started = time.monotonic()
    passed: list[float] = []

    async def call() -> None:
        async with pacer.slot(pacer.turn(FOREVER)):
            passed.append(time.monotonic() - started)

    one, two = pacer.turn(FOREVER), pacer.turn(FOREVER)
    async with pacer.slot(one), pacer.slot(two):
        waiting = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        pacer.refused(one, 0.15)
        pacer.refused(two, 0.05)
    await asyncio.gather(waiting, call())
    assert min(passed) >= 0.15
    assert max(passed) < 2


async def test_waiters_go_on_after_the_pause_though_the_refused_call_is_gone() -> None:
    """The clock alone wakes them."""
    pacer = Pacer(1)
    turn = pacer.turn(FOREVER)
    async with pacer.slot(turn):
        waiting = asyncio.create_task(_accept(pacer, 1))
        await asyncio.sleep(0.01)
        pacer.refused(turn, 0.05)
    with anyio.fail_after(2):
        await waiting


async def test_a_call_gives_up_when_it_was_refused_for_too_long() -> None:
    """Its patience starts with its first refusal, and only `TimeoutError` needs to be caught."""
    pacer = Pacer(1)
    turn = pacer.turn(0.1)
    started = time.monotonic()
    with pytest.raises(TimeoutError):  # noqa: PT012 - as a caller repeats
        while True:
            async with pacer.slot(turn):
                pacer.refused(turn, 0.02)
    assert 0.05 < time.monotonic() - started < 1
    assert pacer.in_flight == 0


async def test_a_pause_longer_than_the_patience_is_not_waited_for() -> None:
    """No waiting helps, so the call fails at once."""
    pacer = Pacer(1)
    turn = pacer.turn(5.0)
    async with pacer.slot(turn):
        pacer.refused(turn, 3600)
    with anyio.fail_after(1), pytest.raises(PacingTimeout):
        async with pacer.slot(turn):
            pytest.fail("a slot inside the pause")


async def test_a_call_never_sent_gives_up_when_all_others_are_refused() -> None:
    """A line does not wait longer than its patience for a service that takes nothing."""
    pacer = Pacer(1)
    turn = pacer.turn(FOREVER)
    async with pacer.slot(turn):
        pacer.refused(turn, 0.0)
        with anyio.fail_after(2), pytest.raises(PacingTimeout):
            async with pacer.slot(pacer.turn(0.05)):
                pytest.fail("a second slot")


async def test_waiting_behind_calls_that_the_service_takes_costs_no_patience() -> None:
    """A long line before a service that works is no failure."""
    pacer = Pacer(1)
    turn = pacer.turn(FOREVER)
    async with pacer.slot(turn):
        waiting = asyncio.create_task(_patient(pacer, 0.01))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    assert await waiting == "sent"


async def test_a_call_that_the_service_takes_ends_the_count_of_patience() -> None:
    """Earlier refusals do not count against the calls that wait now."""
    pacer = Pacer(1)
    await _refuse(pacer)
    await _accept(pacer, 1)
    async with pacer.slot(pacer.turn(FOREVER)):
        waiting = asyncio.create_task(_patient(pacer, 0.01))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    assert await waiting == "sent"


async def _patient(pacer: Pacer, patience: float) -> str:
    async with pacer.slot(pacer.turn(patience)):
        return "sent"


async def test_cancelled_waiters_leak_no_slot() -> None:
    """Cancelled while waiting, while being given a slot, or while holding one: all slots come back."""
    pacer = Pacer(2)

    async def call(hold: float) -> None:
        async with pacer.slot(pacer.turn(FOREVER)):
            await asyncio.sleep(hold)

    for step in range(40):
        tasks = [asyncio.create_task(call(0.0005 * (i % 3))) for i in range(8)]
        await asyncio.sleep(0.0003 * (step % 5))
        for task in tasks[step % 3 :: 2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert pacer.in_flight == 0
    with anyio.fail_after(1):
        await asyncio.gather(call(0), call(0))


async def test_a_slot_given_to_a_waiter_that_is_being_cancelled_goes_to_the_next() -> None:
    """Both happen in one turn of the event loop: the slot is free again."""
    pacer = Pacer(1)
    holder = pacer.turn(FOREVER)
    async with pacer.slot(holder):
        first, second = (asyncio.create_task(_patient(pacer, FOREVER)) for _ in range(2))
        await asyncio.sleep(0.01)
    # The slot is the first one's by now, but it has not run since.
    first.cancel()
    with anyio.fail_after(1):
        assert await second == "sent"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert pacer.in_flight == 0


async def test_a_call_cancelled_in_the_line_may_wait_again_in_its_place() -> None:
    """Its ticket holds, and gives it one slot, not two."""
    pacer = Pacer(1)
    order: list[str] = []

    async def call(name: str, turn: Turn) -> None:
        async with pacer.slot(turn):
            order.append(name)
            await asyncio.sleep(0.001)

    first, second = pacer.turn(FOREVER), pacer.turn(FOREVER)
    async with _hold(pacer, 1):
        waiting = [asyncio.create_task(call("second", second)), asyncio.create_task(call("first", first))]
        await asyncio.sleep(0.01)
        waiting[1].cancel()
        await asyncio.wait(waiting[1:])
        waiting.append(asyncio.create_task(call("first", first)))
        await asyncio.sleep(0.01)
    with anyio.fail_after(1):
        await asyncio.gather(waiting[0], waiting[2])
        await _accept(pacer, 1)
    assert order == ["first", "second"]
    assert pacer.in_flight == 0


def test_one_limit_holds_over_threads_with_their_own_loops() -> None:
    """Tasks mapped from a sync flow each run on their own loop: together they keep to the limit."""
    pacer = Pacer(2)
    guard = threading.Lock()
    inside, most, done = 0, 0, 0

    async def call() -> None:
        nonlocal inside, most, done
        async with pacer.slot(pacer.turn(FOREVER)):
            with guard:
                inside += 1
                most = max(most, inside)
            await asyncio.sleep(0.001)
            with guard:
                inside -= 1
                done += 1

    async def many() -> None:
        with anyio.fail_after(5):
            await asyncio.gather(*(call() for _ in range(25)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done, most, pacer.in_flight) == (75, 2, 0)


def test_a_loop_that_ends_with_waiters_takes_no_slot_with_it() -> None:
    """A thread whose loop is torn down in the middle leaves the others working."""
    pacer = Pacer(1)

    async def abandon() -> None:
        waiting = asyncio.create_task(_patient(pacer, FOREVER))
        await asyncio.sleep(0.01)
        assert not waiting.done()  # and asyncio.run cancels it

    async def scenario() -> None:
        async with pacer.slot(pacer.turn(FOREVER)):
            await asyncio.to_thread(asyncio.run, abandon())
        assert await _patient(pacer, FOREVER) == "sent"

    asyncio.run(scenario())
    assert pacer.in_flight == 0


async def test_slowing_down_is_logged_once_a_burst(caplog: pytest.LogCaptureFixture) -> None:
    """One line with the new limit and the pause."""
    pacer = Pacer(4)
    one, two = pacer.turn(FOREVER), pacer.turn(FOREVER)
    with caplog.at_level(logging.INFO, logger="flux_prefect"):
        async with pacer.slot(one), pacer.slot(two):
            pacer.refused(one, 3.0)
            pacer.refused(two, 3.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the service asked to slow down; at most 2 calls at once, the next in 3.0 s"
    ]


def test_a_process_has_one_pacer_for_an_account() -> None:
    """Whichever way its URL is written; another endpoint has its own, and so has another key."""
    one = shared_pacer("https://one.test", KEY, 4)
    assert shared_pacer("HTTPS://ONE.test/", KEY, 4) is one
    assert shared_pacer("https://one.test", SecretStr(f" {KEY.get_secret_value()}\n"), 4) is one
    assert shared_pacer("https://two.test", KEY, 4) is not one
    assert shared_pacer("https://one.test", SecretStr("sk-another"), 4) is not one
    assert (one.limit, one.max_in_flight) == (4, 4)


async def test_the_last_setting_of_the_shared_limit_holds() -> None:
    """Raised or lowered for all, and what was learnt from refusals stays."""
    pacer = shared_pacer("https://three.test", KEY, 4)
    assert shared_pacer("https://three.test", KEY, 8).limit == 8
    await _refuse(pacer)
    shared_pacer("https://three.test", KEY, 16)
    assert (pacer.limit, pacer.max_in_flight) == (4, 16)
    shared_pacer("https://three.test", KEY, 2)
    assert (pacer.limit, pacer.max_in_flight) == (2, 2)


def test_threads_that_ask_at_once_share_one_pacer() -> None:
    """Two pacers for one endpoint would be twice its limit."""
    start = threading.Barrier(8)
    found: list[Pacer] = []

    def ask() -> None:
        start.wait()
        found.append(shared_pacer("https://four.test", KEY, 4))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_below_one_is_refused(most: int) -> None:
    """It would stop everything for ever."""
    with pytest.raises(ValueError, match="max_in_flight"):
        Pacer(most)
