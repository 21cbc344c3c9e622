"""Failures that nobody notices, because requests are answered all the same: they just reuse nothing. Pure.

What a router sees of its nodes and engines, looked through for what `kvfabric doctor ROUTER_URL` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvfabric import __version__
from kvfabric_router.policy import EngineView
from kvfabric_router.tokenizers import UNKNOWN, TokenCounts

OK, WARN, FAIL = "ok", "warn", "fail"
MAX_SKEW_S = 5.0
ENOUGH_TOKENS = 4096
"""Predicted or computed by engines, before nothing reused means something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """As `kvfabric doctor` prints it; `advice` is empty for ok."""

    subject: str
    result: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class NodeSight:
    """One link. `version` is empty before the first contact; `clock_ahead_s`: of its clock over ours;
    `stale_serves`: that its auditor met."""

    target: str
    connected: bool
    version: str
    clock_ahead_s: float
    stale_serves: int = 0


@dataclass(frozen=True, slots=True)
class EngineSight:
    """An engine as it says, what its node says otherwise (`differs`), and all nodes that name it.

    `ours`: the tokenizer that its prompts are tokenized with, `expected`: the one that is configured for its
    model; UNKNOWN for none. `counts`: whether it counts as many tokens.
    """

    view: EngineView
    differs: tuple[str, ...]
    nodes: tuple[str, ...]
    ours: str = UNKNOWN
    expected: str = UNKNOWN
    counts: TokenCounts = field(default_factory=TokenCounts)


@dataclass(frozen=True, slots=True)
class Totals:
    """Since start: tokens of prompts that were answered, that the index promised, that engines reused;
    requests whose engine had no valid handle; blocks in the index now."""

    prompt_tokens: int
    promised_tokens: int
    reused_tokens: int
    no_handle: int
    index_blocks: int


def examine(
    nodes: Sequence[NodeSight], engines: Sequence[EngineSight], totals: Totals
) -> list[Finding]:
    """In the order they are printed."""
    return [
        *_nodes(nodes),
        *(finding for engine in engines for finding in _engine(engine)),
        *_together(engines),
        _overlap(totals),
        _handles(totals),
    ]


def _nodes(nodes: Sequence[NodeSight]) -> Iterator[Finding]:
    if not nodes:
        yield Finding("nodes", FAIL, "no node is linked", "see router.nodes and router.directory")
    for node in nodes:
        name = f"node {node.target}"
        if node.stale_serves:
            text = f"served withdrawn blocks to its own auditor, {node.stale_serves} times"
            yield Finding(
                name, FAIL, text, "its log names them; stop it, and report it as SECURITY.md says"
            )
        if not node.connected:
            advice = "is it running, and reachable from here? The router's log says why"
            yield Finding(name, FAIL, "no events: not connected", advice)
        elif node.version != __version__:
            text = f"runs {node.version}, this router {__version__}"
            yield Finding(name, WARN, text, "upgrade the older one")
        elif abs(node.clock_ahead_s) > MAX_SKEW_S:
            text = f"its clock is {node.clock_ahead_s:+.1f} s from this router's"
            yield Finding(name, FAIL, text, "set the clocks by NTP: handles expire by them")
        else:
            yield Finding(name, OK, f"connected, {node.version}")


def _engine(engine: EngineSight) -> Iterator[Finding]:
    view, name = engine.view, f"engine {engine.view.engine_id}"
    if len(engine.nodes) > 1:
        text = f"registered at {len(engine.nodes)} nodes: {', '.join(engine.nodes)}"
        yield Finding(name, FAIL, text, "two engines with one endpoint? Each needs its own")
    elif not engine.nodes:
        text = "no node speaks for it: no handles, and what it holds is guessed"
        yield Finding(name, WARN, text, "give it its node's socket")
    wrong = _tokenizer(engine)
    if wrong is not None:
        yield wrong
    if engine.differs:
        text = f"its node knows another {', '.join(engine.differs)} than it says itself"
        yield Finding(name, FAIL, text, "restart it: its session is an earlier one's")
    if len(engine.nodes) == 1 and not engine.differs and wrong is None:
        yield Finding(name, OK, f"serves {view.model_name}")


def _tokenizer(engine: EngineSight) -> Finding | None:
    """What is wrong with how its prompts are tokenized here."""
    view, name = engine.view, f"engine {engine.view.engine_id}"
    configure = f'router.tokenizers = ["{view.model_name}=FOLDER"], with its tokenizer.json'
    if engine.counts.differ:
        text = (
            f"it counted other tokens than the router in {engine.counts.num_different} prompts of "
            f"{engine.counts.num_different + engine.counts.num_equal}: its tokenizer or chat template differs"
        )
        return Finding(
            name, FAIL, text, "is the folder in router.tokenizers the one that it serves?"
        )
    if engine.expected not in (UNKNOWN, engine.ours):
        text = f"its tokenizer {view.tokenizer} is not {engine.expected}, configured for its model"
        return Finding(name, FAIL, text, f"{configure} and chat template")
    if engine.ours == UNKNOWN:
        said = f" {view.tokenizer!r}" if view.tokenizer else ""
        text = f"no tokenizer for it here{said}: routed approximately, by text; templates end its reuse"
        return Finding(name, WARN, text, configure)
    return None


def _together(engines: Sequence[EngineSight]) -> Iterator[Finding]:
    """Engines of one model that cannot share a block."""
    by_model: dict[str, dict[str, list[str]]] = {}
    for engine in engines:
        model = engine.view.model
        if model is not None:
            kind = (
                f"{model.block_tokens} tokens a block, layout {model.layout_fingerprint.hex()[:8]}"
            )
            kind += f", weights {model.model_revision[:12]}"
            names = by_model.setdefault(engine.view.model_name, {}).setdefault(kind, [])
            names.append(engine.view.engine_id)
    for name, kinds in sorted(by_model.items()):
        if len(kinds) > 1:
            told = "; ".join(f"{', '.join(who)}: {kind}" for kind, who in sorted(kinds.items()))
            advice = "start them with the same flags and weights"
            yield Finding(f"model {name}", WARN, f"its engines share nothing ({told})", advice)


def _overlap(totals: Totals) -> Finding:
    if totals.promised_tokens >= ENOUGH_TOKENS and not totals.reused_tokens:
        text = f"{totals.promised_tokens} tokens were promised by the index, none was reused"
        advice = "does cache_salt reach the engine, and is its prefix cache on?"
        return Finding("overlap", FAIL, text, advice)
    if totals.prompt_tokens >= ENOUGH_TOKENS and not totals.index_blocks:
        text = f"{totals.prompt_tokens} prompt tokens were answered and the index is empty"
        return Finding("overlap", FAIL, text, "do the engines publish events to their nodes?")
    text = f"{totals.reused_tokens} of {totals.prompt_tokens} prompt tokens were reused"
    return Finding("overlap", OK, text)


def _handles(totals: Totals) -> Finding:
    if totals.no_handle:
        text = f"{totals.no_handle} requests came to their engine without a valid handle"
        advice = "does kv_transfer_params pass through, and do node and router share the keyring?"
        return Finding("handles", FAIL, text, advice)
    return Finding("handles", OK, "no request was without")
