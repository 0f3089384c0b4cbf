"""Router: which experts a token goes through, and how much each counts.

Shapes: D hidden size, E choices (experts, zero experts, copy experts, in this order), k choices a token.
Reference: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
arXiv:2412.19437, section 2.1.2; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv:2408.15664.
Differs: one router covers Mixtral, Jamba, GraniteMoeHybrid, Qwen2-MoE, DeepSeek-V3, Switch, GShard, expert choice and
hash layers; its logits are always computed in float32.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .dispatch import capacity_of, hashed_experts, tokens_of_experts, within_capacity
from .loads import warn_if_nobody_applies
from .masks import SequenceInfo
from .precision import Float32Islands, project, state_dtype

logger = logging.get_logger(__name__)

SCORES = ("softmax", "sigmoid")
ROUTINGS = ("top_k", "switch", "gshard", "expert_choice", "hash")
SECOND_EXPERTS = ("random", "always")
_CAPACITY_FACTORS = {"switch": 1.25, "gshard": 1.0, "expert_choice": 1.0}
_TOP_KS = {"switch": 1, "gshard": 2}


def check_name(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise the `ValueError` for an option that takes one of a few names."""
    if value not in allowed:
        raise ValueError(f"{option}: unknown {value!r}, expected one of {list(allowed)}")


class Router(Float32Islands):
    """Choose k of E for every token and weigh them; the options are those of `MoE`.

    The parameter is `weight` `[E, D]`. With `selection_bias` there is a persistent float32 buffer `selection_bias`
    `[E]`, added to the scores when experts are chosen and never part of a gate. `tokens_per_expert` `[E]` counts the
    tokens since the last update of that bias; it is a plain attribute because DistributedDataParallel would overwrite a
    buffer with the first rank's counts. So is `load_record` `[2, E]`, tokens and scores of all processes since it was
    last reset, from which the router's health is read.

    Args:
        hidden_size: Width D of the residual stream.
        bias_update_rate: Step of the bias in one `losses.update_selection_bias`.
    """

    float32_names = ("selection_bias",)

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 8,
        top_k: int | None = None,
        scores: str = "softmax",
        renormalize: bool | None = None,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
        num_zero_experts: int = 0,
        num_copy_experts: int = 0,
        routing: str = "top_k",
        capacity_factor: float | None = None,
        second_expert: str = "random",
        jitter: float = 0.0,
        hash_seed: int = 0,
    ) -> None:
        super().__init__()
        check_name("scores", scores, SCORES)
        check_name("routing", routing, ROUTINGS)
        check_name("second_expert", second_expert, SECOND_EXPERTS)
        for name, value in (("num_zero_experts", num_zero_experts), ("num_copy_experts", num_copy_experts)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
            if value and routing != "top_k":
                raise ValueError(f"{name}={value} needs routing='top_k', got {routing!r}")
        self.num_experts, self.num_choices = num_experts, num_experts + num_zero_experts + num_copy_experts
        self.routing, self.top_k = routing, _TOP_KS.get(routing, 2) if top_k is None else top_k
        self.score_function, self.scaling_factor = scores, scaling_factor
        self.renormalize = routing in ("top_k", "gshard", "hash") if renormalize is None else renormalize
        self.num_groups, self.top_k_groups = num_groups, top_k_groups
        self.bias_update_rate = bias_update_rate
        self.capacity_factor = _CAPACITY_FACTORS.get(routing) if capacity_factor is None else capacity_factor
        self.second_expert, self.jitter, self.hash_seed = second_expert, jitter, hash_seed
        self._check_counts()
        self._check_routing(selection_bias)
        self.weight = nn.Parameter(torch.empty(self.num_choices, hidden_size))
        wide = state_dtype(torch.get_default_dtype())  # whatever type the model is built in
        self.register_buffer("selection_bias", torch.empty(self.num_choices, dtype=wide) if selection_bias else None)
        self._load: Tensor | None = None
        self._shares: Tensor | None = None
        self.load_record: Tensor | None = None
        self.init_weights(0.02)

    def _check_counts(self) -> None:
        num_experts, top_k, num_groups = self.num_experts, self.top_k, self.num_groups
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        if not 1 <= top_k <= self.num_choices:
            others = self.num_choices - num_experts
            more = f" and the {others} zero and copy experts" if others else ""
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}{more}")
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
        if num_groups > 1 and (self.num_choices > num_experts or self.routing != "top_k"):
            raise ValueError(f"num_groups={num_groups} needs routing='top_k' without zero and copy experts")
        if not 1 <= self.top_k_groups <= num_groups:
            raise ValueError(f"top_k_groups={self.top_k_groups} must be between 1 and num_groups={num_groups}")
        if num_groups > 1 and top_k > self.top_k_groups * (num_experts // num_groups):
            raise ValueError(
                f"top_k={top_k} is more than the {num_experts // num_groups} experts in each of "
                f"top_k_groups={self.top_k_groups} groups"
            )
        if self.bias_update_rate < 0:
            raise ValueError(f"bias_update_rate={self.bias_update_rate} must not be negative")

    def _check_routing(self, selection_bias: bool) -> None:
        routing, wanted = self.routing, _TOP_KS.get(self.routing, self.top_k)
        if self.top_k != wanted:
            raise ValueError(f"top_k={self.top_k} does not go with routing={routing!r}, which takes {wanted}")
        if self.renormalize and routing == "switch":
            raise ValueError("renormalize=True makes the gate of routing='switch' always 1: the router would not learn")
        if self.renormalize and routing == "expert_choice":
            raise ValueError("renormalize=True does not go with routing='expert_choice': a token may have no expert")
        if selection_bias and routing in ("expert_choice", "hash"):
            raise ValueError(f"selection_bias=True does not go with routing={routing!r}")
        if self.capacity_factor is not None and routing not in _CAPACITY_FACTORS:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} needs a routing of {list(_CAPACITY_FACTORS)}, got {routing!r}"
            )
        if self.capacity_factor is not None and not 0.0 < self.capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor={self.capacity_factor} must be above 0")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"jitter={self.jitter} must be in [0, 1)")

    def init_weights(self, std: float) -> None:
        """Draw the weight; no expert is preferred and nothing is counted yet."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.selection_bias is not None:
            init.zeros_(self.selection_bias)
        self.load_record = None
        self.reset_load()

    def check_token_ids(self, token_ids: Tensor | None) -> None:
        """Raise the `ValueError` of hash routing without token ids."""
        if self.routing == "hash" and token_ids is None:
            raise ValueError("inputs_embeds: routing='hash' chooses experts by token id, give input_ids")

    def check_decodes(self) -> None:
        """Raise the `NotImplementedError` of expert choice in decoding: with a cache, or in `generate`."""
        if self.routing == "expert_choice":
            raise NotImplementedError(
                "routing='expert_choice' lets later tokens decide, so it cannot decode; the exact alternative is "
                "routing='top_k' with selection_bias=True. A forward with use_cache=False, here or in the config, "
                "evaluates; it is not causal"
            )

    @property
    def balanced_top_k(self) -> int:
        """Choices a token that the load balancing loss counts: GShard counts first choices only."""
        return 1 if self.routing == "gshard" else self.top_k

    @property
    def tokens_per_expert(self) -> Tensor:
        """Tokens counted for each choice since the last `reset_load`, `[E]`, int64."""
        if self._load is None:
            return torch.zeros(self.num_choices, dtype=torch.long, device=self.weight.device)
        return self._load

    @torch.no_grad()
    def add_load(self, counts: Tensor, shares: Tensor | None = None) -> None:
        """Add `[E]` to `tokens_per_expert`, and the tokens' summed scores `[E]` to what the record is made of."""
        self._load = self.tokens_per_expert.to(counts.device) + counts
        if self.selection_bias is not None:
            self.num_unapplied = warn_if_nobody_applies(self.num_unapplied)
        if shares is not None:
            self._shares = shares if self._shares is None else self._shares.to(shares.device) + shares

    def reset_load(self) -> None:
        """Set `tokens_per_expert` to zero."""
        self._load = self._shares = None
        self.num_unapplied = 0

    def load_counts(self) -> Tensor:
        """What `losses.update_selection_bias` adds up over processes: tokens and scores, `[2 * E]`, float64."""
        load = self.tokens_per_expert.double()
        shares = torch.zeros_like(load) if self._shares is None else self._shares.to(load)
        return torch.cat([load, shares])

    @torch.no_grad()
    def apply_load(self, counts: Tensor, moves: bool = True) -> None:
        """Raise the bias of choices with less than the mean load, lower the others, and count anew."""
        counts = counts.view(2, -1)
        if self.selection_bias is not None and moves:
            missing = (counts[0].mean() - counts[0]).sign().to(self.selection_bias)
            self.selection_bias += self.bias_update_rate * missing
        self.load_record = counts.clone() if self.load_record is None else self.load_record + counts
        self.reset_load()

    def scores(self, router_logits: Tensor) -> Tensor:
        """Turn logits `[..., E]` into scores `[..., E]`, without the selection bias."""
        return router_logits.sigmoid() if self.score_function == "sigmoid" else router_logits.softmax(-1)

    def select(self, scores: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Choose `[..., k]` for scores `[..., E]`: selection bias and groups included, no gradient.

        Raises:
            ValueError: Hash routing without `token_ids` `[...]`.
        """
        if self.routing == "hash":
            self.check_token_ids(token_ids)
            return hashed_experts(token_ids, self.top_k, self.num_experts, self.hash_seed)
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

    @torch.no_grad()
    def choices(
        self, router_logits: Tensor, token_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Which choices `[B, T, E]` the tokens made, whether or not an expert had a place left; none at pads."""
        scores = self.scores(router_logits)
        if self.routing == "expert_choice":
            return self._chosen_by_experts(scores, token_mask)
        indices = self.select(scores, token_ids)
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(-1, indices, True)
        return chosen if token_mask is None else chosen & token_mask.bool()[..., None]

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route `[..., D]`.

        Returns:
            Logits `[..., E]` and gates `[..., k]`, both float32 or float64, and the choices `[..., k]`. A choice of E
            is none: the token was dropped, or no further expert chose it.

        Raises:
            ValueError: Hash routing of embeddings.
            NotImplementedError: Expert choice with a cache.
        """
        wide = state_dtype(hidden_states.dtype)
        hidden_states = hidden_states.to(wide)
        if self.jitter and self.training:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
        router_logits = project(hidden_states, self.weight)
        scores = self.scores(router_logits)
        if self.routing == "expert_choice":
            return router_logits, *self._route_by_experts(scores, sequence)
        if self.routing != "hash" and self.selection_bias is None and self.num_groups == self.top_k_groups:
            weights, indices = scores.topk(self.top_k, dim=-1)  # the same choice as `select`
        else:
            indices = self.select(scores, None if sequence is None else sequence.token_ids)
            weights = scores.gather(-1, indices)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all sigmoids can underflow
        if self.capacity_factor is not None and self.training and not (sequence is not None and sequence.use_cache):
            weights, indices = self._drop(weights, indices, None if sequence is None else sequence.token_mask)
        if self.scaling_factor != 1.0:
            weights = weights * self.scaling_factor
        return router_logits, weights, indices

    def _capacity(self, num_tokens: int, token_mask: Tensor | None) -> Tensor | int:
        tokens = num_tokens if token_mask is None else token_mask.sum()
        return capacity_of(self.capacity_factor, self.top_k, self.num_experts, tokens)

    def _drop(self, weights: Tensor, indices: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take the choices away that go beyond an expert's capacity, those of pads, and GShard's random ones."""
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"routing={self.routing!r}: in training an expert has room for some of the batch's tokens only, so the "
                "logits of a token depend on the rest of the batch; in evaluation no token is dropped"
            )
        wanted = torch.ones_like(indices, dtype=torch.bool)
        if self.routing == "gshard" and self.second_expert == "random":
            wanted[..., 1] = 2 * weights[..., 1] > torch.rand_like(weights[..., 1])
        if token_mask is not None:
            wanted = wanted & token_mask.bool()[..., None]
        capacity = self._capacity(indices[..., 0].numel(), token_mask)
        kept = within_capacity(indices.flatten(0, -2), wanted.flatten(0, -2), self.num_experts, capacity)
        kept = kept.view(indices.shape)
        return weights.masked_fill(~kept, 0.0), indices.masked_fill(~kept, self.num_choices)

    def _chosen_by_experts(self, scores: Tensor, token_mask: Tensor | None) -> Tensor:
        mask = None if token_mask is None else token_mask.bool().flatten()
        flat = scores.flatten(0, -2)
        return tokens_of_experts(flat, mask, self._capacity(len(flat), mask)).view(scores.shape)

    def _route_by_experts(self, scores: Tensor, sequence: SequenceInfo | None) -> tuple[Tensor, Tensor]:
        """Gates and choices `[..., k]`; here k is the most experts that chose one token."""
        if sequence is not None and sequence.use_cache:
            self.check_decodes()
        compiling = torch.compiler.is_compiling()
        if not self.training and not compiling:
            logger.warning_once("routing='expert_choice': this evaluation is not causal, later tokens decide")
        chosen = self._chosen_by_experts(scores, None if sequence is None else sequence.token_mask)
        most = self.num_experts if compiling or chosen.numel() == 0 else max(int(chosen.sum(-1).max()), 1)
        weights = scores.masked_fill(~chosen, 0.0) * self.scaling_factor
        order = (scores.detach() + 1.0).masked_fill(~chosen, 0.0)
        indices = order.topk(most, dim=-1).indices
        return weights.gather(-1, indices), indices.masked_fill(~chosen.gather(-1, indices), self.num_choices)

    def extra_repr(self) -> str:
        """Show the choice."""
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, scores={self.score_function}, routing={self.routing}"
        )
