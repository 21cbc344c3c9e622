"""What a model is made of: its shape, its rotary settings, its tensors. Draws random ones from a seed.

`checkpoint.py` reads them from a folder instead; `model.py` computes with either. Every `Weights` carries a
revision: the digest of its tensors and of all that decides what is computed from them, so that two models
whose KV differs never share a key.

Shapes of tensors: H hidden, A query heads, K KV heads, D head dim, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch

from kvfabric.config import EngineConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROPE_THETA = 10_000.0
RMS_EPSILON = 1e-6
LINEAR_GAIN = 2.0
"""Standard deviation of a linear layer's weights times the root of its fan-in."""


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of slow rotations: beyond `original_positions / low_frequency` tokens a
    turn they are slowed by `factor`, below `original_positions / high_frequency` kept, blended between."""

    factor: float
    low_frequency: float
    high_frequency: float
    original_positions: int

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Radians a token in, radians a token out: same shape and dtype."""
        wavelength = 2 * torch.pi / frequencies
        slowed = frequencies / self.factor
        blend = self.original_positions / wavelength - self.low_frequency
        blend = blend / (self.high_frequency - self.low_frequency)
        blended = (1 - blend) * slowed + blend * frequencies
        stretched = torch.where(
            wavelength > self.original_positions / self.low_frequency, slowed, blended
        )
        is_kept = wavelength < self.original_positions / self.high_frequency
        return torch.where(is_kept, frequencies, stretched)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. `precision`: dtype in which angles are made before cos and sin.

    A checkpoint wants the float32 angles of its training: far into a context they differ from exact ones.
    """

    theta: float
    scaling: Llama3Scaling | None = None
    precision: torch.dtype = torch.float32

    def describe(self) -> str:
        """As the block layout declares it: equal texts, equal rotations."""
        text = f"neox theta={self.theta:.17g}"
        if self.scaling is None:
            return text
        s = self.scaling
        return (
            f"{text} llama3 factor={s.factor:.17g} low={s.low_frequency:.17g} "
            f"high={s.high_frequency:.17g} original={s.original_positions}"
        )

    def tables(
        self, num_positions: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [num_positions, D]: both halves of a head share their angles; the first half of sin is
        that of the angles turned round, as rotating uses it."""
        half = torch.arange(0, head_dim, 2, dtype=self.precision) / head_dim
        frequencies = 1.0 / self.theta**half
        if self.scaling is not None:
            frequencies = self.scaling.apply(frequencies)
        angles = torch.outer(torch.arange(num_positions, dtype=self.precision), frequencies)
        cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What fixes the computation beside the values of the weights.

    `max_positions`: longest context that the model was made for, 0 for any. `tied`: the output layer is
    the embedding.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_epsilon: float
    rope: Rope
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. None: the architecture has no such tensor."""

    attention_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(A + 2 K) D, H]
    qkv_bias: torch.Tensor | None  # [(A + 2 K) D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    output: torch.Tensor  # [H, A D]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I, H]
    down: torch.Tensor  # [H, I]


@dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a model, of one dtype on one device. `revision`: 32 hex digits."""

    shape: ModelShape
    embedding: torch.Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [H]
    head: torch.Tensor  # [V, H]
    revision: str


def draw_weights(config: EngineConfig) -> Weights:
    """Random weights from `config.seed`: drawn on CPU in float32, so equal in every process.

    Their scale is large enough that another prompt's KV changes the answer: a test with feeble weights
    proves nothing.
    """
    draw = _Draw(config)
    embedding = draw.normal(config.vocab_size, config.hidden_size, std=1.0)
    layers = tuple(draw.layer() for _ in range(config.num_layers))
    final_norm = draw.ones(config.hidden_size)
    head = draw.linear(config.vocab_size, config.hidden_size)
    return Weights(_drawn_shape(config), embedding, layers, final_norm, head, draw.digest())


def _drawn_shape(config: EngineConfig) -> ModelShape:
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rms_epsilon=RMS_EPSILON,
        rope=Rope(ROPE_THETA, precision=torch.float64),
        qkv_bias=False,
        qk_norm=True,
        tied=False,
        max_positions=0,
    )


class _Draw:
    """Draws tensors in a fixed order and keeps a running digest of them."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = torch.device(config.device)
        self._dtype = DTYPES[config.dtype]
        self._generator = torch.Generator().manual_seed(config.seed)
        self._hash = blake2b(digest_size=16, person=b"kvf-weights-1")
        shape = f"theta={ROPE_THETA} epsilon={RMS_EPSILON} heads={config.num_heads}"
        self._hash.update(shape.encode())

    def digest(self) -> str:
        """32 hex digits of every tensor drawn so far, with shape and dtype."""
        return self._hash.hexdigest()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._dtype)
        self._hash.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        self._hash.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return tensor.to(self._device)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return self._keep(torch.randn(*shape, generator=self._generator) * std)

    def linear(self, fan_out: int, fan_in: int) -> torch.Tensor:
        return self.normal(fan_out, fan_in, std=LINEAR_GAIN / fan_in**0.5)

    def ones(self, size: int) -> torch.Tensor:
        return self._keep(torch.ones(size))

    def layer(self) -> LayerWeights:
        c = self._config
        heads = c.num_heads + 2 * c.num_kv_heads
        return LayerWeights(
            attention_norm=self.ones(c.hidden_size),
            qkv=self.linear(heads * c.head_dim, c.hidden_size),
            qkv_bias=None,
            q_norm=self.ones(c.head_dim),
            k_norm=self.ones(c.head_dim),
            output=self.linear(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=self.ones(c.hidden_size),
            gate_up=self.linear(2 * c.intermediate_size, c.hidden_size),
            down=self.linear(c.hidden_size, c.intermediate_size),
        )
