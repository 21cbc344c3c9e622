"""The demo on several machines: a node and an engine on each, a router, Redis, and UCX between the nodes.

1 reuse      an engine computed; engines of other machines answer with its blocks, which their nodes fetch
2 withdraw   a template version is withdrawn at one node: every node and the router acknowledge
3 survive    a node is killed under load; then a whole machine, with the only copy of a prompt's blocks
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvfabric.demo import checks
from kvfabric.demo.checks import Check
from kvfabric.demo.replay import Answer, Client
from kvfabric.demo.report import Step, run_figures
from kvfabric.demo.slice import BLOCK_TOKENS, TENANTS
from kvfabric.demo.telling import ANSWER_TOKENS, Telling, full_tokens, must_succeed

_WITHDRAWN_GROUPS = 4


class Machines(Telling):
    """See the module."""

    groups_if_quick = 4
    groups = 10

    async def run(self) -> None:
        fleet = self._fleet
        self._progress.line(
            f"kvfabric demo: {len(self._jobs)} requests of a real chat service's log, {len(TENANTS)} "
            f"tenants; {fleet.num_nodes} nodes with an engine each, a router and Redis on this machine, "
            "UCX between the nodes"
        )
        self._report.figures["nodes"] = fleet.num_nodes
        await self._set_up(
            f"starting {fleet.num_nodes} nodes, creating tenants and the shared template"
        )
        async with Client(fleet.router_url, fleet.keys, ANSWER_TOKENS) as client:
            self._client = client
            await self._reuse()
            await self._withdraw()
            await self._survive()

    # --- 1 ---

    async def _reuse(self) -> None:
        step = self._step("1  What one machine computed, others answer with")
        fleet = self._fleet
        self._progress.stage("starting the engine of the first machine, and the router")
        await fleet.start_engines([0], fabric=True)
        await fleet.start_router(fabric=True)
        self._progress.end()
        await self._warm_up(salt=1)
        computed = await self._closed_loop("computed at the first machine", self._jobs)
        must_succeed(computed)
        self._expected = {answer.job.index: answer for answer in computed}
        await fleet.settled(0)

        self._progress.stage("starting the other engines, killing the first; its node lives on")
        mark = fleet.audit_mark()
        await fleet.start_engines(range(1, fleet.num_nodes), fabric=True)
        await fleet.kill_engines([0])
        await fleet.wait_engines_known()
        self._progress.end()
        answers = await self._closed_loop("the same requests at the other machines", self._jobs)
        told = await self._explained(answers)
        step.figures |= {
            "first_machine": run_figures(computed),
            "other_machines": run_figures(answers),
            "blocks_of_other_machines": sum(
                one["node"]["peer_blocks"] for one in told if one["node"] is not None
            ),
        }
        self._check(step, checks.all_succeeded("answered", answers))
        self._check_answers(step, answers)
        lines = fleet.audit_lines(mark)
        self._check(step, checks.came_from_other_machines("fetched over UCX", told, lines))
        self._check(step, checks.loads_equal_stores("loaded parts", fleet.audit_lines()))

    async def _explained(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [await self._fleet.explain(one.job.tenant, one.request_id) for one in answers]

    # --- 2 ---

    async def _withdraw(self) -> None:
        step = self._step("2  The template's version is withdrawn at one node, for all")
        fleet = self._fleet
        self._progress.stage("starting the first engine again")
        await fleet.start_engines([0], fabric=True)
        await fleet.wait_engines_known()
        self._progress.end()
        jobs = [self._jobs[index] for index in self._first_of_groups(_WITHDRAWN_GROUPS)]
        jobs *= fleet.num_nodes
        nodes = [f"node-{index}" for index in range(fleet.num_nodes)]

        receipt = await fleet.withdraw_template(at=fleet.num_nodes - 1)
        self._show_receipt(step, "withdrawn", receipt, holders=nodes)
        answers = await self._closed_loop("prompts with the template", jobs)
        before = [BLOCK_TOKENS] * len(jobs)
        self._check(step, checks.no_more_than_ideal("nothing from it on", answers, before))
        told = await fleet.explain(answers[0].job.tenant, answers[0].request_id)
        step.figures["explained_miss"] = told
        self._check(step, checks.miss_is_explained("and it can say why", told, BLOCK_TOKENS))
        self._check_answers(step, answers)

        receipt = await fleet.promote_template()
        self._show_receipt(step, "put back", receipt, holders=nodes)
        answers = await self._closed_loop("the same, version back", jobs)
        whole, reused = sum(map(full_tokens, jobs)), sum(a.cached_tokens for a in answers)
        seen = f"{reused} of {whole} tokens reused"
        # More than what no template is in: so much was reused while it was withdrawn.
        self._check(step, Check("warm again", reused > sum(before), seen))
        self._check_answers(step, answers)

    # --- 3 ---

    async def _survive(self) -> None:
        step = self._step("3  A node dies under load; a whole machine dies")
        await self._lose_a_node(step)
        await self._lose_a_machine(step)

    async def _lose_a_node(self, step: Step) -> None:
        fleet = self._fleet
        third_answered = asyncio.Event()
        answered = meanwhile = 0

        def count(_: Answer) -> None:
            nonlocal answered
            answered += 1
            if answered >= len(self._jobs) // 3:
                third_answered.set()

        async def crash() -> None:
            nonlocal meanwhile
            await third_answered.wait()
            await fleet.kill_node(1)
            meanwhile = -answered

        self._progress.stage("the slice again; SIGKILL to a node in its midst", len(self._jobs))
        async with asyncio.TaskGroup() as group:
            load = group.create_task(self._closed(self._jobs, count))
            group.create_task(crash())
        meanwhile += answered
        self._progress.end()
        answers = load.result()
        self._check(step, checks.all_succeeded("answered across the node's death", answers))
        seen = f"{meanwhile} of {len(answers)} requests answered after the kill"
        self._check(step, Check("without that node", meanwhile > 0, seen))
        self._check_answers(step, answers)
        self._progress.stage("starting the node again")
        await fleet.start_nodes(1)
        await fleet.wait_engines_known()
        self._progress.end()

    async def _lose_a_machine(self, step: Step) -> None:
        """With the only copy of a prompt's blocks; asked for again before anybody noticed."""
        fleet = self._fleet
        (job,) = self._strangers(1, salt=2)
        first = await self._client.complete(job)
        must_succeed([first])
        told = await fleet.explain(job.tenant, first.request_id)
        lost = str(told["engine"])
        index = int(lost.rpartition("-")[2])
        await fleet.settled(index)
        self._progress.stage(f"SIGKILL to node and engine of the machine that has a prompt: {lost}")
        await fleet.kill_node(index)
        await fleet.kill_engines([index])
        self._progress.end()
        again = await self._client.complete(job)
        told = await fleet.explain(job.tenant, again.request_id)
        step.figures["explained_loss"] = told
        self._check(
            step,
            checks.answered_without_machine("answered nevertheless", again, told, lost, first),
        )
        answers = await self._closed_loop("the slice without that machine", self._jobs)
        self._check(step, checks.all_succeeded("answered by the others", answers))
        self._check_answers(step, answers)
