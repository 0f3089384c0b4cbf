"""Router: which experts a token goes through, and how much each counts.

Shapes: D hidden size, E experts, k experts a token.
Reference: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
arXiv:2412.19437, section 2.1.2; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv:2408.15664.
Differs: one router covers Mixtral, Jamba, GraniteMoeHybrid, Qwen2-MoE and DeepSeek-V3; its logits are always computed
in float32.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .precision import Float32Islands, state_dtype

SCORES = ("softmax", "sigmoid")


def check_name(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise the `ValueError` for an option that takes one of a few names."""
    if value not in allowed:
        raise ValueError(f"{option}: unknown {value!r}, expected one of {list(allowed)}")


def _linear_without_autocast(hidden_states: Tensor, weight: Tensor) -> Tensor:
    device_type = hidden_states.device.type
    if not torch.is_autocast_enabled(device_type):  # entering the context costs more than the product of one token
        return nn.functional.linear(hidden_states, weight)
    with torch.autocast(device_type, enabled=False):
        return nn.functional.linear(hidden_states, weight)


class Router(Float32Islands):
    """Choose k of E experts for every token and weigh them.

    The parameter is `weight` `[E, D]`. With `selection_bias` there is a persistent float32 buffer `selection_bias`
    `[E]`, added to the scores when experts are chosen and never part of a gate. `tokens_per_expert` `[E]` counts the
    tokens since the last update of that bias; it is a plain attribute because DistributedDataParallel would overwrite a
    buffer with the first rank's counts.

    Args:
        hidden_size: Width D of the residual stream.
        num_experts: Number of experts E.
        top_k: Experts a token k.
        scores: "softmax" or "sigmoid" of the logits.
        renormalize: Whether the k gates are divided by their sum.
        scaling_factor: Multiplies the gates at the end.
        num_groups: Groups the experts are split into, in order.
        top_k_groups: Groups a token may choose from; a group is worth the sum of its two best biased scores.
        selection_bias: Whether there is a selection bias.
        bias_update_rate: Step of the bias in one `losses.update_selection_bias`.
    """

    float32_names = ("selection_bias",)

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        scores: str = "softmax",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        check_name("scores", scores, SCORES)
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        if not 1 <= top_k_groups <= num_groups:
            raise ValueError(f"top_k_groups={top_k_groups} must be between 1 and num_groups={num_groups}")
        if top_k > top_k_groups * (num_experts // num_groups):
            raise ValueError(
                f"top_k={top_k} is more than the {num_experts // num_groups} experts in each of "
                f"top_k_groups={top_k_groups} groups"
            )
        if bias_update_rate < 0:
            raise ValueError(f"bias_update_rate={bias_update_rate} must not be negative")
        self.num_experts, self.top_k = num_experts, top_k
        self.score_function, self.renormalize, self.scaling_factor = scores, renormalize, scaling_factor
        self.num_groups, self.top_k_groups = num_groups, top_k_groups
        self.bias_update_rate = bias_update_rate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        wide = state_dtype(torch.get_default_dtype())  # whatever type the model is built in
        self.register_buffer("selection_bias", torch.empty(num_experts, dtype=wide) if selection_bias else None)
        self._load: Tensor | None = None
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw the weight; no expert is preferred and nothing is counted yet."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.selection_bias is not None:
            init.zeros_(self.selection_bias)
        self._load = None

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tokens counted for each expert since the last `reset_load`, `[E]`, int64."""
        if self._load is None:
            return torch.zeros(self.num_experts, dtype=torch.long, device=self.weight.device)
        return self._load

    @torch.no_grad()
    def add_load(self, counts: Tensor) -> None:
        """Add `[E]` to `tokens_per_expert`."""
        self._load = self.tokens_per_expert.to(counts.device) + counts

    def reset_load(self) -> None:
        """Set `tokens_per_expert` to zero."""
        self._load = None

    def load_counts(self) -> Tensor:
        """What `losses.update_selection_bias` adds up over processes: `tokens_per_expert` as float64, `[E]`."""
        return self.tokens_per_expert.double()

    @torch.no_grad()
    def apply_load(self, counts: Tensor) -> None:
        """Raise the bias of experts with less than the mean of `counts` `[E]`, lower the others, and count anew."""
        if self.selection_bias is not None:
            missing = (counts.mean() - counts).sign().to(self.selection_bias)
            self.selection_bias += self.bias_update_rate * missing
        self.reset_load()

    def scores(self, router_logits: Tensor) -> Tensor:
        """Turn logits `[..., E]` into scores `[..., E]`, without the selection bias."""
        return router_logits.sigmoid() if self.score_function == "sigmoid" else router_logits.softmax(-1)

    def select(self, scores: Tensor) -> Tensor:
        """Choose the experts `[..., k]` for scores `[..., E]`: selection bias and groups included, no gradient."""
        scores = scores.detach()
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.to(scores.dtype)
        if self.top_k_groups < self.num_groups:
            grouped = scores.unflatten(-1, (self.num_groups, -1))  # [..., groups, E / groups]
            worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = worth.topk(self.top_k_groups, dim=-1).indices
            closed = torch.ones_like(worth, dtype=torch.bool).scatter(-1, best, False)
            scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return scores.topk(self.top_k, dim=-1).indices

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route `[..., D]`.

        Returns:
            Logits `[..., E]` and gates `[..., k]`, both float32 or float64, and the chosen experts `[..., k]`.
        """
        wide = state_dtype(hidden_states.dtype)
        router_logits = _linear_without_autocast(hidden_states.to(wide), self.weight.to(wide))
        scores = self.scores(router_logits)
        if self.selection_bias is None and self.num_groups == self.top_k_groups:
            weights, indices = scores.topk(self.top_k, dim=-1)  # the same choice as `select`
        else:
            indices = self.select(scores)
            weights = scores.gather(-1, indices)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all sigmoids can underflow
        if self.scaling_factor != 1.0:
            weights = weights * self.scaling_factor
        return router_logits, weights, indices

    def extra_repr(self) -> str:
        """Show the choice."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, scores={self.score_function}"
