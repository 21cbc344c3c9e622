"""Against `transformers` on the same folders: logits, answers, tokens, chats; and the server over one."""

from __future__ import annotations

import asyncio
import json
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, web
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.reference.server import create_app
from kvfabric_engine.testing import ask

from kvfabric.config import EngineConfig
from tests.engine import hf_folder

pytestmark = pytest.mark.slow  # transformers alone takes seconds to import

FAMILIES = ["llama", "qwen2", "qwen3"]
TOKENS = random.Random(3).choices(range(3, hf_folder.VOCAB), k=300)
ENDS = [1, 2, 19, 50, 64, 65, 128, 200, 201, 299, 300]
"""Tokens before which logits are compared, and where a forward ends."""
ROUNDING = 3.0
"""How much further from float64's logits ours may be than transformers' in float32."""

LLAMA3_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}{%- set system_message = '' %}{%- endif %}\n"
    "{{- '<|im_start|>system\\n\\n' }}\n"
    "{%- if tools is defined and tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}\n"
    "{%- set ns = namespace(count=0) %}\n"
    "{{- system_message + eos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message['role'] not in ['user', 'assistant'] %}\n"
    "        {{- raise_exception('only users and assistants') }}\n"
    "    {%- endif %}\n"
    "    {%- set ns.count = ns.count + 1 %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim | tojson }}\n"
    "    {%- if ns.count > 9 %}{%- break %}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n\\n' }}\n"
    "{%- endif %}\n"
)


@dataclass(frozen=True)
class Reference:
    """A folder that transformers wrote, and what transformers makes of it."""

    folder: Path
    model: Any

    def logits(self, dtype: torch.dtype) -> torch.Tensor:
        """[len(ENDS), vocab], computed in `dtype`. The angles of rotation are float32 in either."""
        with torch.no_grad():
            found: torch.Tensor = self.model.to(dtype)(torch.tensor([TOKENS])).logits[0]
        return found[[end - 1 for end in ENDS]]

    def greedy(self, prompt: list[int], num: int) -> tuple[int, ...]:
        tokens = torch.tensor([prompt])
        found = self.model.float().generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=num
        )
        return tuple(found[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own parts, about each other
        import transformers
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def references(
    transformers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    """One for each family, made when first asked for."""
    made: dict[str, Reference] = {}

    def reference(family: str) -> Reference:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            hf_folder.write_tokenizer(folder)
            made[family] = Reference(folder, _write_model(transformers, family, folder))
        return made[family]

    return reference


def _write_model(transformers: Any, family: str, folder: Path) -> Any:
    keys = {k: v for k, v in hf_folder.config(family).items() if k != "architectures"}
    name = hf_folder.ARCHITECTURES[family]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**keys)
    model = getattr(transformers, name)(config).eval()
    missing = model.load_state_dict(hf_folder.tensors(family), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    assert not missing.unexpected_keys
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="60KB" if family == "qwen2" else "5GB")
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def link(folder: Path, copy: Path) -> None:
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)


def configure(folder: Path, **changes: Any) -> EngineConfig:
    small = {"max_model_tokens": 512, "hbm_blocks": 128, "block_tokens": 16} | changes
    return EngineConfig(model_path=str(folder), **small)


def ours(folder: Path) -> torch.Tensor:
    """float32 [len(ENDS), vocab]: TOKENS in chunks of odd lengths over scattered pages."""
    model = Model(configure(folder))
    s = model.shape
    shape = PoolShape(64, s.num_layers, 16, s.num_kv_heads, s.head_dim, model.dtype, 64)
    pool, pages = shape.create(model.device), random.Random(5).sample(range(64), 19)
    spans = [
        Span(TOKENS[start:end], start, pages, True)
        for start, end in zip([0, *ENDS], ENDS, strict=False)
    ]
    return torch.cat([model.forward(pool, [span]) for span in spans])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    references: Callable[[str], Reference], family: str
) -> None:
    """As near to float64's as transformers' own float32: what is between the two is rounding."""
    reference = references(family)
    exact, theirs = reference.logits(torch.float64), reference.logits(torch.float32)
    mine = ours(reference.folder)
    print(
        f"{family}: largest difference {error(mine, theirs.double()):.2g} of logits up to "
        f"{exact.abs().max():.2g}; from float64 {error(mine, exact):.2g}, theirs {error(theirs, exact):.2g}"
    )
    assert error(mine, exact) < ROUNDING * error(theirs, exact)
    assert error(mine, theirs.double()) < ROUNDING * error(theirs, exact)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 500000.0}}),
        ("llama", {"rope_parameters": hf_folder.LLAMA3_ROPE | {"factor": 9.0}}),
        ("qwen2", {"rms_norm_eps": 1e-4}),
        ("qwen3", {"rope_parameters": {"rope_theta": 1000100.0}}),
    ],
)
def test_a_wrong_setting_would_be_seen(
    references: Callable[[str], Reference], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """The comparison has teeth: a little of any setting is far more than rounding."""
    reference = references(family)
    link(reference.folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    hf_folder.write_json(tmp_path / "config.json", config | changes)
    exact, theirs = reference.logits(torch.float64), reference.logits(torch.float32)
    assert error(ours(tmp_path), exact) > 4 * ROUNDING * error(theirs, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(
    references: Callable[[str], Reference], family: str
) -> None:
    """Greedy, cold and with a prefix from HBM."""
    reference = references(family)
    expected = reference.greedy(TOKENS[:100], 12)
    with Engine(configure(reference.folder)) as engine:
        cold = ask(engine, TOKENS[:100], max_tokens=12)
        warm = ask(engine, TOKENS[:100], max_tokens=12)
    assert cold.token_ids == warm.token_ids == expected
    assert (cold.reused.hbm, warm.reused.hbm) == (0, 96)


@pytest.mark.parametrize("template", [hf_folder.CHATML, LLAMA3_TEMPLATE])
def test_tokens_and_chats_are_those_of_transformers(
    transformers: Any, references: Callable[[str], Reference], tmp_path: Path, template: str
) -> None:
    """The same ids for texts and for chats, from the same files."""
    link(references("llama").folder, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with Engine(configure(tmp_path)) as engine:
        mine = engine.tokenizer
    for text in ("the quick fox", "naïve — 🦊\n\n  x", "<|im_end|> special"):
        assert mine.encode(text) == theirs.encode(text)
    system, user = {"role": "system", "content": "  Be <brief> & 'kind'."}, 'the "fox"\n🦊 '
    answer = {"role": "assistant", "content": "a dog"}
    for chat in (
        [{"role": "user", "content": user}],
        [system, {"role": "user", "content": user}, answer, {"role": "user", "content": "again"}],
    ):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert mine.encode_chat(chat) == expected


# --- the server over a folder ---


@pytest.fixture(scope="module")
def engine(references: Callable[[str], Reference]) -> Iterator[Engine]:
    with Engine(configure(references("qwen3").folder)) as engine:
        yield engine


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[ClientSession]:
    runner = web.AppRunner(create_app(engine), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        yield session
    await runner.cleanup()


async def post(http: ClientSession, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with http.post(path, json={"temperature": 0, "return_token_ids": True} | body) as answer:
        document: dict[str, Any] = await answer.json()
        return answer.status, document


async def test_server_says_which_model_and_tokenizer(engine: Engine) -> None:
    """Named after its folder; the tokenizer is none that a router could take for bytes."""
    async with serving(engine) as http, http.get("/v1/models") as answer:
        (model,) = (await answer.json())["data"]
    assert model["id"] == Path(engine.config.model_path).name
    assert model["kvfabric"]["tokenizer"] == engine.tokenizer.name
    assert model["kvfabric"]["tokenizer"].startswith("hf:")
    assert model["kvfabric"]["model_revision"] == engine.model.revision


async def test_server_speaks_the_folders_language(engine: Engine) -> None:
    """Text in is its tokens, text out is theirs, a chat goes through the template."""
    text = "the quick brown fox jumps over the lazy dog, naïve 🦊"
    ids = engine.tokenizer.encode(text)
    async with serving(engine) as http:
        _, of_text = await post(http, "/v1/completions", prompt=text, max_tokens=8)
        _, of_ids = await post(http, "/v1/completions", prompt=ids, max_tokens=8)
        chat = [{"role": "user", "content": text}]
        status, of_chat = await post(http, "/v1/chat/completions", messages=chat, max_tokens=8)
    choice = of_text["choices"][0]
    assert choice == of_ids["choices"][0]
    expected = await asyncio.to_thread(ask, engine, ids, max_tokens=8, salt="x", ignore_eos=False)
    assert tuple(choice["token_ids"]) == expected.token_ids
    fast = hf_folder.tokenizer()
    assert choice["text"] == fast.decode([*ids, *choice["token_ids"]])[len(fast.decode(ids)) :]
    assert status == 200
    assert of_chat["usage"]["prompt_tokens"] == len(engine.tokenizer.encode_chat(chat))


async def test_server_refuses_what_the_template_does(engine: Engine, tmp_path: Path) -> None:
    """A client's error, in the OpenAI shape; so is a prompt that is too long by far."""
    link(Path(engine.config.model_path), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    user = [{"role": "user", "content": "x"}]
    with Engine(configure(tmp_path)) as other:
        async with serving(other) as http:
            status, document = await post(http, "/v1/chat/completions", messages=user)
            assert (status, document["error"]["param"]) == (400, "messages")
            assert "not today" in document["error"]["message"]
            status, document = await post(http, "/v1/completions", prompt="the dog " * 50_000)
            assert (status, document["error"]["param"]) == (400, "prompt")


async def test_answer_ends_where_the_folder_says(engine: Engine) -> None:
    """The first token of an answer, declared as an end, ends it."""
    first = (await asyncio.to_thread(ask, engine, TOKENS[:20], max_tokens=1)).token_ids[0]
    folder = Path(engine.config.model_path)
    settings = folder / "generation_config.json"
    before = settings.read_text()
    try:
        hf_folder.write_json(settings, {"eos_token_id": [first]})
        with Engine(configure(folder)) as other:
            answer = await asyncio.to_thread(
                ask, other, TOKENS[:20], max_tokens=5, ignore_eos=False
            )
    finally:
        settings.write_text(before)
    assert (answer.token_ids, answer.finish.value) == ((first,), "stop")
