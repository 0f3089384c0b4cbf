"""Mixture of experts: every token goes through some of E gated feed-forward experts.

Shapes: B batch, T tokens, N = B * T, D hidden size, E experts, k choices a token, I expert width.
Reference: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
arXiv:2412.19437, section 2.1.2 (sigmoid scores, groups, selection bias, shared experts); Raposo et al. 2024,
"Mixture-of-Depths", arXiv:2404.02258, section 4.3 (a no-op expert); Meituan 2025, "LongCat-Flash Technical Report",
arXiv:2509.01322 (copy experts); `dispatch.py` for the other routings.
Differs: one part covers Mixtral, Jamba, GraniteMoeHybrid, Qwen2-MoE, DeepSeek-V3, LongCat-Flash, Switch, GShard, expert
choice and hash layers. In evaluation no token is dropped, and but for expert choice a token's output depends on that
token alone.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .experts import Experts, SharedExpert
from .masks import SequenceInfo
from .router import Router, check_name

IMPLEMENTATIONS = ("auto", "grouped", "loop")
LOSS_SCOPES = ("document", "batch")
_BALANCE = {"switch": 0.01, "gshard": 0.01}  # the coefficients of the papers


class MoE(nn.Module):
    """Mix channels by the top k of E experts, and by shared experts if there are any.

    The losses and the update of the selection bias are in `losses.py`; the model calls them with the recorded logits.

    Options that are None at first get a value that depends on `routing`; the config stores it.

    Args:
        hidden_size: Width D of the residual stream.
        num_experts: Number of experts with weights, E.
        top_k: Choices a token k: 2, or 1 with "switch". With "expert_choice" the mean experts a token, and with "hash"
            the experts of a token id.
        intermediate_size: Width I of one expert; 8/3 of D rounded up to a multiple of 64 if not given.
        activation: A name of `transformers.activations.ACT2FN`.
        scores: "softmax" (Mixtral, Jamba, Granite, Qwen) or "sigmoid" (DeepSeek-V3).
        renormalize: Whether a token's gates are divided by their sum, those of zero and copy experts included. With
            "softmax" that equals a softmax over the chosen logits. Jamba, Switch and expert choice do not.
        scaling_factor: Multiplies the gates at the end.
        num_groups: Groups the experts are split into, in order.
        top_k_groups: Groups a token may choose from; a group is worth the sum of its two best biased scores.
        selection_bias: Whether a bias balances the choices without a loss (DeepSeek-V3).
        bias_update_rate: Its step.
        num_shared_experts: Number of experts every token goes through.
        shared_intermediate_size: Width of one shared expert; `intermediate_size` if not given.
        shared_gate: Whether a sigmoid of the token scales the shared experts' output (Qwen2-MoE).
        num_zero_experts: Further choices that give 0, so that a token goes through 0 to k experts. One of them beside
            the residual is the no-op expert of integrated mixture of depths.
        num_copy_experts: Further choices that give the token itself, times its gate: what LongCat-Flash calls zero
            experts.
        routing: "top_k", where no token is ever dropped; "switch" (one expert) and "gshard" (two), where in training
            an expert has `capacity_factor * k * tokens / E` places for the real tokens of the batch, and a token
            without a place keeps its residual alone; "expert_choice", where experts choose tokens, which trains and
            cannot decode; "hash", where the token id decides and the router only weighs.
        capacity_factor: 1.25 with "switch", 1 with "gshard" and "expert_choice", otherwise not used. In training the
            documents of a batch share the places, so that their logits depend on one another.
        second_expert: GShard's second expert in training: "random", kept with probability twice its gate, or "always".
        jitter: In training the router's input is multiplied by a uniform draw from 1 - jitter to 1 + jitter (Switch).
        hash_seed: Which table "hash" uses.
        load_balancing_coef: Factor of the load balancing loss: 0.01 with "switch" and "gshard", 0 otherwise.
        z_loss_coef: Factor of the router z-loss.
        loss_scope: "document", or "batch" for transformers' formula, which changes with gradient accumulation.
        implementation: "grouped" needs `grouped_mm`, "loop" runs everywhere, "auto" takes the faster one that works.
            In a compiled graph the loop runs without branches. The choice changes only the speed.
        dropout: Probability of dropping an output in training.
    """

    full_precision = ("router", "shared_expert_gate")

    @property
    def batch_dependent(self) -> bool:
        """Whether in training the tokens of a batch depend on one another."""
        return self.capacity_factor is not None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 8,
        top_k: int | None = None,
        intermediate_size: int | None = None,
        activation: str = "silu",
        scores: str = "softmax",
        renormalize: bool | None = None,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        num_zero_experts: int = 0,
        num_copy_experts: int = 0,
        routing: str = "top_k",
        capacity_factor: float | None = None,
        second_expert: str = "random",
        jitter: float = 0.0,
        hash_seed: int = 0,
        load_balancing_coef: float | None = None,
        z_loss_coef: float = 0.0,
        loss_scope: str = "document",
        implementation: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_name("implementation", implementation, IMPLEMENTATIONS)
        check_name("loss_scope", loss_scope, LOSS_SCOPES)
        if activation not in ACT2FN:
            raise ValueError(f"activation: unknown {activation!r}, expected one of {sorted(ACT2FN)}")
        if intermediate_size is None:
            intermediate_size = 64 * -(-8 * hidden_size // (3 * 64))
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size={intermediate_size} must be at least 1")
        self.intermediate_size = intermediate_size
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        if load_balancing_coef is None:
            load_balancing_coef = _BALANCE.get(routing, 0.0)
        for name, value in (("load_balancing_coef", load_balancing_coef), ("z_loss_coef", z_loss_coef)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if load_balancing_coef and routing in ("expert_choice", "hash"):
            raise ValueError(f"load_balancing_coef={load_balancing_coef} has nothing to balance in routing={routing!r}")
        self.dropout = dropout
        self.load_balancing_coef, self.z_loss_coef, self.loss_scope = load_balancing_coef, z_loss_coef, loss_scope
        self.router = Router(
            hidden_size,
            num_experts=num_experts,
            top_k=top_k,
            scores=scores,
            renormalize=renormalize,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            selection_bias=selection_bias,
            bias_update_rate=bias_update_rate,
            num_zero_experts=num_zero_experts,
            num_copy_experts=num_copy_experts,
            routing=routing,
            capacity_factor=capacity_factor,
            second_expert=second_expert,
            jitter=jitter,
            hash_seed=hash_seed,
        )
        self.top_k, self.renormalize = self.router.top_k, self.router.renormalize
        self.capacity_factor = self.router.capacity_factor
        self.num_copy_experts, self.first_copy = num_copy_experts, num_experts + num_zero_experts
        self.experts = Experts(
            hidden_size,
            num_experts=num_experts,
            intermediate_size=intermediate_size,
            activation=activation,
            implementation=implementation,
            partial=self.router.num_choices > num_experts or self.capacity_factor is not None,
        )
        shared_size = intermediate_size if shared_intermediate_size is None else shared_intermediate_size
        self._add_shared_expert(hidden_size, num_shared_experts, shared_size, shared_gate, activation)

    def _add_shared_expert(
        self, hidden_size: int, num_shared_experts: int, shared_size: int, shared_gate: bool, activation: str
    ) -> None:
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={num_shared_experts} must not be negative")
        if shared_size < 1:
            raise ValueError(f"shared_intermediate_size={shared_size} must be at least 1")
        if shared_gate and not num_shared_experts:
            raise ValueError("shared_gate=True needs num_shared_experts of at least 1")
        self.shared_expert = self.shared_expert_gate = None
        if num_shared_experts:
            self.shared_intermediate_size = shared_size
            self.shared_expert = SharedExpert(
                hidden_size, intermediate_size=num_shared_experts * shared_size, activation=activation
            )
        if shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def init_weights(self, std: float) -> None:
        """Draw the router and the experts; the projections of the shared expert are plain linear layers."""
        self.router.init_weights(std)
        self.experts.init_weights(std)

    def forward(
        self, hidden_states: Tensor, state: None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, None]:
        """Map `[B, T, D]` to `[B, T, D]`; there is no state. A pad touches no other token.

        Raises:
            ValueError: Hash routing of embeddings.
            NotImplementedError: Expert choice with a cache.
        """
        _, weights, indices = self.router(hidden_states, sequence)
        output = self.experts(hidden_states.flatten(0, -2), indices.flatten(0, -2), weights.flatten(0, -2))
        output = output.view(hidden_states.shape)
        if self.num_copy_experts:
            copied = weights.masked_fill(indices < self.first_copy, 0.0).sum(-1, keepdim=True)
            output = output + (copied * hidden_states).to(output.dtype)
        output = self._add_shared(output, hidden_states)
        return nn.functional.dropout(output, self.dropout, self.training), None

    def _add_shared(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        if self.shared_expert is None:
            return output
        shared = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
        return output + shared

    def forward_reference(
        self, hidden_states: Tensor, state: None = None, sequence: SequenceInfo | None = None
    ) -> tuple[Tensor, None]:
        """Give the result of `forward` without dropout, one token and one expert at a time."""
        _, weights, indices = self.router(hidden_states, sequence)
        tokens = []
        for token, gates, chosen in zip(*(x.flatten(0, 1) for x in (hidden_states, weights, indices)), strict=True):
            output = torch.zeros_like(token)
            for weight, expert in zip(gates, chosen.tolist(), strict=True):
                if expert >= self.router.num_experts:
                    copies = self.num_copy_experts and expert >= self.first_copy
                    output = output + weight * token if copies else output
                    continue
                gate, up = (self.experts.gate_up_proj[expert] @ token).chunk(2)
                output = output + weight * (self.experts.down_proj[expert] @ (self.experts.activation(gate) * up))
            tokens.append(output.to(token.dtype))
        return self._add_shared(torch.stack(tokens).view(hidden_states.shape), hidden_states), None

    def state_spec(self, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """No state at any length."""
        return {}

    def state_size(self, num_tokens: int) -> int:
        """No state at any length."""
        return 0
