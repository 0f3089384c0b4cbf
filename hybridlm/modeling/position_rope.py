"""Rotary positions, with the length scalings of transformers.

Reference: Su et al. 2021, "RoFormer", arXiv:2104.09864; Peng et al. 2023, "YaRN", arXiv:2309.00071.
Differs: `dynamic` scaling needs its length in the config, since one read off the input would make the logits depend on
how a sequence is cut, on the other rows and on earlier calls.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .masks import SequenceInfo
from .precision import Float32Islands, state_dtype

SCALINGS = ("linear", "yarn", "llama3", "dynamic")
_REQUIRED = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "dynamic": ("factor", "original_max_position_embeddings"),
}


class RopePosition(Float32Islands):
    """Rotate the first part of every query and key by an angle that grows with the position.

    Args:
        head_dim: Width K of a head.
        theta: Base of the frequencies.
        partial_rotary_factor: Fraction of K that is rotated.
        scaling: `None`, or `{"rope_type": "linear" | "yarn" | "llama3" | "dynamic", "factor": ...}` with the keys that
            transformers documents for it; `dynamic` also needs `length`, the tokens that its base is computed for.
    """

    float32_names = ("inv_freq",)

    def __init__(
        self, head_dim: int, *, theta: float = 10000.0, partial_rotary_factor: float = 1.0, scaling: dict | None = None
    ) -> None:
        super().__init__()
        if not 0 < partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor={partial_rotary_factor} must lie in (0, 1]")
        self.rotary_dim = int(head_dim * partial_rotary_factor)
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"partial_rotary_factor={partial_rotary_factor} of head_dim={head_dim} must be even")
        if theta <= 0:
            raise ValueError(f"theta={theta} must be positive")
        self.head_dim, self.theta = head_dim, theta
        self.scaling = self._check(scaling)
        # float32 whatever type the model is built in
        self.register_buffer("inv_freq", torch.empty(self.rotary_dim // 2, dtype=torch.float32), persistent=False)
        self.init_weights()

    @staticmethod
    def _check(scaling: dict | None) -> dict | None:
        if scaling is None or scaling.get("rope_type") == "default":
            return None
        kind = scaling.get("rope_type")
        if kind not in SCALINGS:
            raise ValueError(f"scaling.rope_type: unknown {kind!r}, expected one of {sorted(SCALINGS)}")
        for name in _REQUIRED[kind]:
            if scaling.get(name) is None:
                raise ValueError(f"scaling.{name}: missing, {kind!r} needs {list(_REQUIRED[kind])}")
        if kind == "dynamic" and not isinstance(scaling.get("length"), int):
            raise ValueError(
                "scaling.length: missing; without a fixed length 'dynamic' would follow the longest sequence seen and "
                "its logits would depend on how the sequence is cut; give the length, or use 'yarn'"
            )
        return dict(scaling)

    def frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies `[rotary_dim / 2]` in float32 and the factor on the rotation."""
        if self.scaling is None:
            exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
            return 1.0 / self.theta**exponent, 1.0
        parameters = {**self.scaling, "rope_theta": self.theta}
        length = parameters.pop("length", None)
        trained = self.scaling.get("original_max_position_embeddings")
        config = SimpleNamespace(
            rope_parameters=parameters,
            head_dim=self.rotary_dim,
            hidden_size=self.rotary_dim,
            num_attention_heads=1,
            max_position_embeddings=trained,
            per_layer_config=None,
            standardize_rope_params=lambda: None,
        )
        with torch.device("cpu"):
            return ROPE_INIT_FUNCTIONS[self.scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)

    def init_weights(self, std: float = 0.0) -> None:
        """Compute the frequencies; nothing is random."""
        frequencies, self.rotation_factor = self.frequencies()
        init.copy_(self.inv_freq, frequencies)

    def forward(self, query: Tensor, key: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Rotate `[B, H, T, K]` and `[B, G, T, K]` by the positions of the call."""
        memo = ("rope", self.theta, self.rotary_dim, repr(self.scaling), query.dtype)
        if memo not in sequence.memo:
            wide = state_dtype(query.dtype)
            angles = sequence.positions[..., None].to(wide) * self.inv_freq.to(wide)  # [B, T, rotary_dim / 2]
            angles = torch.cat([angles, angles], dim=-1)[:, None]  # [B, 1, T, rotary_dim]
            factor = self.rotation_factor
            sequence.memo[memo] = (angles.cos() * factor).to(query.dtype), (angles.sin() * factor).to(query.dtype)
        cos, sin = sequence.memo[memo]
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def _rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.rotary_dim < self.head_dim:
            rotated, rest = states.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
            return torch.cat([_turn(rotated, cos, sin), rest], dim=-1)
        return _turn(states, cos, sin)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-right, left], dim=-1) * sin
