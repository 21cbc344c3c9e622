"""An asyncio event loop on virtual time, with processes that can be stopped, continued and killed in it.

Nothing here waits: when nothing is ready, the clock jumps to the next timer. Every callback belongs to the
process in whose context it was scheduled. A paused process's callbacks wait until it goes on, a dead one's
never run: so a crash runs no `finally`, as with SIGKILL, and a pause stops threads too, as SIGSTOP does.

Order is asyncio's own (first come, first served); which of two messages comes first is the network's draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import random
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

_PROCESS: ContextVar[Process] = ContextVar("simulated process")

EPOCH = 1_700_000_000.0
"""Unix seconds at virtual time 0."""


class Stalled(AssertionError):
    """Nothing is ready and no timer runs: whoever waits would wait for ever."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """See the module. `errors`: what callbacks and tasks raised and nobody took."""

    _ready: Any
    _write_to_self: Any
    _process_events: Any

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self.num_steps = 0
        self.errors: list[str] = []

    def time(self) -> float:
        return self._now

    def _write_to_self(self) -> None:  # type: ignore[no-redef]
        """Nobody sleeps who would have to be woken."""

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Of two timers for one moment the first made comes first."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def _run_once(self) -> None:
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stalled(f"nothing is left to do at {self._now:.6f} s")
            self._now = max(self._now, timers[0][0])
        now = self._now
        while timers and timers[0][0] <= now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_PROCESS)
            if process is None or process.runs(handle):
                self.num_steps += 1
                if process is None or not process.is_timed:
                    handle._run()
                    continue
                began = time.thread_time()
                handle._run()
                process.cpu_s += time.thread_time() - began

    def continue_with(self, handles: list[asyncio.Handle]) -> None:
        """What a paused process missed is ready now."""
        self._ready.extend(handles)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context.get('message')}: {error!r}")

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        if executor is None:
            executor = here().threads
        return super().run_in_executor(executor, func, *args)


class Process:
    """What lives and dies as one. `host`: of its network; `clock_ahead`: of its wall clock, seconds.
    `cpu_s`: real processor time of what it ran, while `is_timed`."""

    def __init__(self, loop: SimulatedLoop, name: str, host: str, rng: random.Random) -> None:
        self.loop = loop
        self.name = name
        self.host = host
        self.is_alive = True
        self.is_paused = False
        self.clock_ahead = 0.0
        self.is_timed = False
        self.cpu_s = 0.0
        self.threads = SimulatedThreads(self, rng)
        self._parked: list[asyncio.Handle] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._context: Context = copy_context()
        self._context.run(_PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<Process {self.name}>"

    def clock(self) -> float:
        """CLOCK_BOOTTIME: no jump ever moves it."""
        return 1000.0 + self.loop.time()

    def wall_clock(self) -> float:
        """Unix seconds as this process believes."""
        return EPOCH + self.loop.time() + self.clock_ahead

    def runs(self, handle: asyncio.Handle) -> bool:
        """Whether it may run now; a paused process keeps it for later."""
        if self.is_paused and self.is_alive:
            self._parked.append(handle)
        return self.is_alive and not self.is_paused

    def start(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """A task of this process."""
        task = self.loop.create_task(work, name=name, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=Context())
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.loop.errors.append("".join(traceback.format_exception(task.exception())))

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self.loop.call_later(delay_s, call, *args, context=self._context)

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        if self.is_paused:
            self.is_paused = False
            parked, self._parked = self._parked, []
            self.loop.continue_with(parked)

    def kill(self) -> None:
        """Nothing of it runs any more. Its tasks stay as they are, so that no `finally` runs."""
        self.is_alive = False
        self._parked.clear()


class SimulatedThreads(Executor):
    """Threads of a process: work runs at some moment, whole, and its end is heard of later."""

    def __init__(self, process: Process, rng: random.Random) -> None:
        self._process = process
        self._rng = rng

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except Exception as exc:  # noqa: BLE001 - the caller's
                self._process.call_later(self._delay(), future.set_exception, exc)
            else:
                self._process.call_later(self._delay(), future.set_result, result)

        self._process.call_later(self._delay(), run)
        return future

    def _delay(self) -> float:
        return 2e-5 + self._rng.expovariate(1 / 3e-4)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Work that was submitted still runs."""


def here() -> Process:
    """The process in whose context this runs."""
    return _PROCESS.get()


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[random.Random]:
    """Chance and entropy of the whole interpreter come from `seed`, and the garbage collector runs no
    finalizer meanwhile. Yields the run's own generator.

    Identities, incarnations and nonces are drawn from the system's entropy in many places of the product;
    this is the one source of all of them.
    """
    entropy = random.Random(f"entropy {seed}")
    state, source = random.getstate(), random._urandom  # type: ignore[attr-defined]
    was_on = gc.isenabled()
    gc.disable()
    random.seed(f"global {seed}")
    random._urandom = entropy.randbytes  # type: ignore[attr-defined]
    try:
        yield random.Random(f"run {seed}")
    finally:
        random._urandom = source  # type: ignore[attr-defined]
        random.setstate(state)
        if was_on:
            gc.enable()


def run(loop: SimulatedLoop, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on the loop to its end; then nothing of it runs any more."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main())
    finally:
        _bury(loop)
        asyncio.set_event_loop(None)
        loop.close()


def _bury(loop: SimulatedLoop) -> None:
    """Close what was left of dead processes and of this run; what their `finally` blocks do has no effect."""
    loop.num_steps = -1
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        for _ in range(8):  # one that awaits again while it is closed says so, and is closed again
            try:
                task.get_coro().close()
            except BaseException:  # noqa: BLE001 - nobody is there to be told
                continue
            break
    loop._ready.clear()
    loop._timers.clear()
    loop.errors.clear()
