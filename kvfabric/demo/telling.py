"""What the demo's stories have in common: fleet, prompts, and the answers that all later ones must equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from kvfabric.demo import checks, ideal, replay
from kvfabric.demo import slice as demo_slice
from kvfabric.demo.checks import Check
from kvfabric.demo.fleet import MODEL_FLAGS, TEMPLATE, VERSION, Fleet
from kvfabric.demo.processes import DemoError
from kvfabric.demo.progress import Progress
from kvfabric.demo.replay import Answer, Client, Job
from kvfabric.demo.report import Report, Step, receipt_lines
from kvfabric.demo.slice import BLOCK_TOKENS, TENANTS

ANSWER_TOKENS = 8
VISITOR = "visitor"
"""A tenant of its own for warming up and for measuring capacity, so that the slice's tenants start cold."""

_OTHER_BLOCKS = 1 << 32
"""Block ids from here on are not the log's: prompts of the slice's shapes that share nothing."""

_WARM_UP_REQUESTS = 4


class Telling:
    """Prepares what every story needs, shows its steps and notes what was checked."""

    groups_if_quick: ClassVar[int]
    groups: ClassVar[int | None] = None
    """Prefix groups of the slice that are sent; None: all."""

    def __init__(self, fleet: Fleet, progress: Progress, report: Report) -> None:
        self._fleet = fleet
        self._progress = progress
        self._report = report
        self._concurrency = 2 * fleet.num_engines
        requests = demo_slice.load()
        groups = self.groups_if_quick if report.quick else self.groups
        self._requests = requests if groups is None else demo_slice.first_groups(requests, groups)
        self._jobs = [
            Job(index, request.tenant, tuple(demo_slice.prompt(request.blocks)))
            for index, request in enumerate(self._requests)
        ]
        self._ideal = ideal.reusable_tokens(self._requests)
        self._expected: dict[int, Answer] = {}
        self._through_fabric: list[Answer] = []
        self._client: Client
        report.figures |= {
            "requests": len(self._jobs),
            "prompt_tokens": sum(len(job.prompt) for job in self._jobs),
            "answer_tokens": ANSWER_TOKENS,
            "engine_flags": {flag.lstrip("-"): value for flag, value in MODEL_FLAGS.items()},
        }

    async def run(self) -> None:
        """Tell it. Raises DemoError where it cannot go on."""
        raise NotImplementedError

    async def _set_up(self, label: str) -> None:
        self._progress.stage(label)
        await self._fleet.start_nodes(*range(self._fleet.num_nodes))
        for tenant in (*TENANTS, VISITOR):
            await self._fleet.create_tenant(tenant)
        await self._fleet.register_template()
        self._progress.end()

    # --- prompts ---

    def _strangers(self, count: int, *, salt: int) -> list[Job]:
        """Prompts of the slice's lengths whose blocks nobody else sends."""
        jobs = []
        for index, request in enumerate(self._requests[:count]):
            base = _OTHER_BLOCKS * (1 + salt * len(self._requests) + index)
            blocks = [base + position for position in range(len(request.blocks))]
            jobs.append(Job(index, VISITOR, tuple(demo_slice.prompt(blocks))))
        return jobs

    def _first_of_groups(self, count: int) -> list[int]:
        first: dict[int, int] = {}
        for index, request in enumerate(self._requests):
            first.setdefault(request.group, index)
        return list(first.values())[:count]

    async def _warm_up(self, *, salt: int) -> None:
        jobs = self._strangers(_WARM_UP_REQUESTS, salt=salt)
        must_succeed(await self._closed_loop("warming up", jobs))

    async def _closed_loop(self, label: str, jobs: Sequence[Job]) -> list[Answer]:
        self._progress.stage(label, len(jobs))
        answers = await self._closed(jobs, lambda _: None)
        self._progress.end()
        return answers

    async def _closed(self, jobs: Sequence[Job], on_answer: replay.OnAnswer) -> list[Answer]:
        def advance(answer: Answer) -> None:
            on_answer(answer)
            self._progress.advance()

        return await replay.closed_loop(self._client, jobs, self._concurrency, advance)

    # --- what is shown and noted ---

    def _step(self, title: str) -> Step:
        self._progress.title(title)
        self._report.steps.append(Step(title))
        return self._report.steps[-1]

    def _check(self, step: Step, check: Check) -> None:
        step.checks.append(check)
        self._progress.check(check)

    def _check_answers(self, step: Step, answers: Sequence[Answer]) -> None:
        self._check(step, checks.same_answers("answers", self._expected, answers))

    def _show_receipt(
        self, step: Step, what: str, receipt: dict[str, Any], *, holders: Iterable[str] = ()
    ) -> None:
        """`holders`: whose acknowledgement it must have, besides a router's."""
        step.figures[f"receipt_{what.replace(' ', '_')}"] = receipt
        self._progress.line(f"  receipt: template {TEMPLATE} version {VERSION} {what}")
        for line in receipt_lines(receipt):
            self._progress.line(f"    {line}")
        check = checks.receipt_is_complete(f"receipt ({what})", receipt, ["router"], holders)
        self._check(step, check)


def must_succeed(answers: Sequence[Answer]) -> None:
    check = checks.all_succeeded("", answers)
    if not check.passed:
        raise DemoError(check.seen)


def full_tokens(job: Job) -> int:
    """Prompt tokens in full blocks: what a warm prompt reuses."""
    return BLOCK_TOKENS * len(ideal.full_blocks(job.prompt))
