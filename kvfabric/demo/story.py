"""The demo on one machine: five steps, each a short story with the conditions that it must meet.

1 compare    the same engines and load, with their own cache, then through the fabric
2 survive    engines are killed; the node is killed under load
3 withdraw   a template version is taken out of service, and put back
4 isolate    one tenant's prompts, sent by another
5 judge      reuse against the slice's ideal
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from kvfabric.demo import checks, ideal, replay
from kvfabric.demo import slice as demo_slice
from kvfabric.demo.checks import Check
from kvfabric.demo.fleet import NUM_ENGINES
from kvfabric.demo.replay import Answer, Client, Job
from kvfabric.demo.report import Step, request_rows, run_figures, side_by_side
from kvfabric.demo.slice import BLOCK_TOKENS, TENANTS, SliceRequest
from kvfabric.demo.telling import ANSWER_TOKENS, Telling, full_tokens, must_succeed

LOAD_SHARE = 0.7
"""Of the measured capacity: what the slice is replayed at."""

_QUICK_GROUPS = 4
_WITHDRAWN_GROUPS = 6
_WARM_UP_REQUESTS = 4
_ANSWER_S = 30.0


class Story(Telling):
    """See the module."""

    groups_if_quick = _QUICK_GROUPS

    async def run(self) -> None:
        tokens = sum(len(job.prompt) for job in self._jobs)
        self._progress.line(
            f"kvfabric demo: {len(self._jobs)} requests of a real chat service's log, {tokens:,} prompt "
            f"tokens, {len(TENANTS)} tenants; 1 node, {NUM_ENGINES} engines, 1 router on this machine"
        )
        self._report.figures |= {
            "ideal_tokens": sum(self._ideal),
            "ideal_share_of_tokens": round(sum(self._ideal) / tokens, 4),
            "ideal_share_of_whole_log_blocks": ideal.WHOLE_TRACE_SHARE,
        }
        await self._set_up("starting the node, creating tenants and the shared template")
        async with Client(self._fleet.router_url, self._fleet.keys, ANSWER_TOKENS) as client:
            self._client = client
            await self._compare()
            await self._survive()
            await self._withdraw()
            await self._isolate()
        self._judge()

    # --- 1 ---

    async def _compare(self) -> None:
        step = self._step("1  The same load without and with the fabric")
        per_s = await self._start_baseline()
        arrivals = replay.arrivals_at_rate([r.arrival_ms for r in self._requests], per_s)
        baseline = await self._replay("own HBM caches, round robin", arrivals)
        self._expected = {answer.job.index: answer for answer in baseline}

        await self._fleet.stop_router_and_engines()
        await self._start_with_fabric()
        self._through_fabric = await self._replay("through the fabric", arrivals)

        figures = run_figures(baseline), run_figures(self._through_fabric)
        self._progress.line(side_by_side(*figures, sum(self._ideal)))
        step.figures |= {
            "baseline": figures[0],
            "fabric": figures[1],
            "baseline_requests": request_rows(baseline, self._ideal),
            "fabric_requests": request_rows(self._through_fabric, self._ideal),
        }
        self._check(step, checks.all_succeeded("answered without the fabric", baseline))
        self._check(step, checks.all_succeeded("answered with the fabric", self._through_fabric))
        self._check_answers(step, self._through_fabric)
        self._check(step, checks.loads_equal_stores("loaded parts", self._fleet.audit_lines()))
        self._check(
            step,
            checks.no_more_than_ideal(
                "own prefixes only", self._through_fabric, ideal.shared_tokens(self._requests)
            ),
        )

    async def _start_baseline(self) -> float:
        """Engines without the node behind round robin; returns the rate to replay at."""
        self._progress.stage("starting two engines with their own cache and a round-robin router")
        await self._fleet.start_engines(range(NUM_ENGINES), fabric=False)
        await self._fleet.start_router(fabric=False)
        self._progress.end()
        await self._warm_up(salt=1)
        jobs = self._strangers(len(self._jobs) // 3, salt=2)
        started = time.monotonic()
        answers = await self._closed_loop("measuring the capacity", jobs)
        seconds = time.monotonic() - started
        must_succeed(answers)
        capacity = len(jobs) / seconds
        per_s = LOAD_SHARE * capacity
        self._report.figures |= {
            "capacity_requests_per_s": round(capacity, 2),
            "load_requests_per_s": round(per_s, 2),
        }
        self._progress.line(f"  capacity {capacity:.1f} requests/s, replaying at {per_s:.1f}")
        return per_s

    async def _start_with_fabric(self) -> None:
        self._progress.stage("starting the same engines with the node, and the router")
        await self._fleet.start_engines(range(NUM_ENGINES), fabric=True)
        await self._fleet.start_router(fabric=True)
        self._progress.end()
        await self._warm_up(salt=3)

    async def _replay(self, label: str, arrivals: Sequence[float]) -> list[Answer]:
        self._progress.stage(label, len(self._jobs))
        answers = await replay.open_loop(
            self._client, self._jobs, arrivals, lambda _: self._progress.advance()
        )
        self._progress.end()
        return answers

    # --- 2 ---

    async def _survive(self) -> None:
        step = self._step("2  Engines die; the node dies under load")
        await self._lose_an_engine(step)
        await self._lose_the_node(step)

    async def _lose_an_engine(self, step: Step) -> None:
        await self._fleet.settled()
        mark = self._fleet.audit_mark()
        self._progress.stage("killing one engine and starting it again; then killing the other")
        await self._fleet.kill_engines([0])
        await self._fleet.start_engines([0], fabric=True)
        await self._fleet.wait_engines_known()
        # The other one would answer from its own memory what it answered before.
        await self._fleet.kill_engines(range(1, NUM_ENGINES))
        self._progress.end()
        answers = await self._closed_loop("the slice's first requests again", self._jobs[:16])
        self._check(step, checks.all_succeeded("answered after the engine's death", answers))
        self._check_answers(step, answers)
        lines = self._fleet.audit_lines(mark)
        self._check(step, checks.first_from_host("restarted engine hits host", lines, answers))
        await self._fleet.start_engines(range(1, NUM_ENGINES), fabric=True)
        await self._fleet.wait_engines_known()

    async def _lose_the_node(self, step: Step) -> None:
        sealed = {key.hex() for key in (await self._fleet.settled()).sealed_keys}
        answers, meanwhile = await self._crash_node_under_load()
        self._check(step, checks.all_succeeded("answered across the node's crash", answers))
        seen = f"{meanwhile} requests answered between the kill and the restart"
        self._check(step, Check("while the node was gone", meanwhile > 0, seen))
        self._check_answers(step, answers)
        status = await self._fleet.adopted()
        adopted = "adopted" if status.arena_adopted else "not adopted"
        self._check(step, Check("arena", status.arena_adopted, f"memory of the old node {adopted}"))
        after = {key.hex() for key in status.sealed_keys}
        self._check(step, checks.all_still_sealed("sealed blocks after the crash", sealed, after))
        step.figures["sealed_blocks"] = len(sealed)
        await self._read_sealed(step, sealed, answers)

    async def _crash_node_under_load(self) -> tuple[list[Answer], int]:
        """The answers, and how many of them came while there was no node."""
        answered = 0
        third_answered, one_more = asyncio.Event(), asyncio.Event()
        meanwhile = 0

        def count(_: Answer) -> None:
            nonlocal answered
            answered += 1
            one_more.set()
            if answered == len(self._jobs) // 3:
                third_answered.set()

        async def crash() -> None:
            nonlocal meanwhile
            await third_answered.wait()
            await self._fleet.kill_node()
            before = answered
            # A node is back sooner than a slow machine answers.
            one_more.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_S):
                    await one_more.wait()
            await self._fleet.start_nodes(0)
            meanwhile = answered - before

        self._progress.stage("the slice again; SIGKILL to the node in its midst", len(self._jobs))
        async with asyncio.TaskGroup() as group:
            load = group.create_task(self._closed(self._jobs, count))
            group.create_task(crash())
        self._progress.end()
        return load.result(), meanwhile

    async def _read_sealed(self, step: Step, sealed: set[str], across: Sequence[Answer]) -> None:
        """With both engines' memory empty, every sealed block must come from the node. `across` the crash: on
        a slow machine these already bring what is on SSD back to memory."""
        self._progress.stage("starting both engines anew, their memory empty")
        mark = self._fleet.audit_mark()
        await self._fleet.kill_engines(range(NUM_ENGINES))
        await self._fleet.start_engines(range(NUM_ENGINES), fabric=True)
        await self._fleet.wait_engines_known()
        self._progress.end()
        answers = await self._closed_loop("the slice once more", self._jobs)
        lines = self._fleet.audit_lines(mark)
        step.figures["after_restart"] = run_figures(answers)
        self._check(step, checks.all_succeeded("answered after the restarts", answers))
        self._check_answers(step, answers)
        self._check(step, checks.some_tokens("SSD is warm", "ssd", [*across, *answers]))
        self._check(step, checks.all_sealed_served("every sealed block is warm", sealed, lines))

    # --- 3 ---

    async def _withdraw(self) -> None:
        step = self._step("3  The template's version is withdrawn, and put back")
        jobs = [self._jobs[index] for index in self._first_of_groups(_WITHDRAWN_GROUPS)]
        whole = [full_tokens(job) for job in jobs]
        await self._closed_loop("prompts with the template", jobs)
        await self._fleet.settled()
        answers = await self._closed_loop("the same again", jobs)
        self._check(step, checks.reused_exactly("warm before", answers, whole))

        receipt = await self._fleet.withdraw_template()
        self._show_receipt(step, "withdrawn", receipt)
        answers = await self._closed_loop("the same, version withdrawn", jobs)
        before_template = [BLOCK_TOKENS] * len(jobs)
        self._check(step, checks.reused_exactly("only before it", answers, before_template))
        told = await self._fleet.explain(answers[0].job.tenant, answers[0].request_id)
        step.figures["explained_miss"] = told
        self._check(step, checks.miss_is_explained("and it can say why", told, BLOCK_TOKENS))
        self._check_answers(step, answers)

        receipt = await self._fleet.promote_template()
        self._show_receipt(step, "put back", receipt)
        answers = await self._closed_loop("the same, version back", jobs)
        self._check(step, checks.reused_exactly("warm again", answers, whole))
        self._check_answers(step, answers)

    # --- 4 ---

    async def _isolate(self) -> None:
        step = self._step("4  One tenant's prompts, sent by another")
        owner, other = TENANTS[:2]
        own = [r for r in self._requests if r.tenant == owner]
        prompts = _private_prompts(own)
        cold = [0] * len(prompts)
        for name, tenant, label in (
            ("first time", owner, "for the first time"),
            ("another tenant", other, "by another tenant"),
            ("the same tenant", owner, "by the same tenant again"),
            ("the other again", other, "by the other again"),
        ):
            jobs = [Job(index, tenant, prompt) for index, prompt in enumerate(prompts)]
            warm = name in ("the same tenant", "the other again")
            expected = [full_tokens(job) for job in jobs] if warm else cold
            answers = await self._closed_loop(f"private prompts {label}", jobs)
            self._check(step, checks.reused_exactly(name, answers, expected))
            await self._fleet.settled()

    # --- 5 ---

    def _judge(self) -> None:
        step = self._step("5  Reuse against the ideal")
        gate = checks.reused_share_of_ideal(
            "the slice through the fabric", self._through_fabric, sum(self._ideal)
        )
        self._check(step, gate)
        self._check(step, checks.loads_equal_stores("all loads", self._fleet.audit_lines()))


def _private_prompts(requests: Sequence[SliceRequest]) -> list[tuple[int, ...]]:
    """One prompt a group, of the blocks behind the one that all tenants have in common."""
    first: dict[int, SliceRequest] = {}
    for request in requests:
        first.setdefault(request.group, request)
    return [tuple(demo_slice.prompt(r.blocks[1:], template=False)) for r in first.values()]
