"""Mixture of experts: every token goes through its top k gated feed-forward experts, none is dropped.

Shapes: B batch, T tokens, N = B * T, D hidden size, E experts, k experts a token, I expert width.
Reference: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
arXiv:2412.19437, section 2.1.2 (sigmoid scores, groups, selection bias, shared experts).
Differs: one router covers Mixtral, Jamba, GraniteMoeHybrid, Qwen2-MoE and DeepSeek-V3; its logits are always computed
in float32. No token is dropped, so a token's output depends on that token alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .masks import SequenceInfo
from .router import Router, check_name

IMPLEMENTATIONS = ("auto", "grouped", "loop")
LOSS_SCOPES = ("document", "batch")


class Experts(nn.Module):
    """E gated feed-forward networks in two parameters, `gate_up_proj` `[E, 2I, D]` and `down_proj` `[E, D, I]`.

    Args:
        hidden_size: Width D of the residual stream.
        num_experts: Number of experts E.
        intermediate_size: Width I of one expert.
        activation: A name of `transformers.activations.ACT2FN`.
        implementation: See `MoE`.
    """

    def __init__(
        self, hidden_size: int, *, num_experts: int, intermediate_size: int, activation: str, implementation: str
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.implementation = implementation
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.activation = ACT2FN[activation]
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw every expert."""
        init.normal_(self.gate_up_proj, mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)

    def forward(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs, each times its gate.

        Args:
            hidden_states: `[N, D]`.
            indices: `[N, k]`, the chosen experts.
            weights: `[N, k]`, their gates.

        Returns:
            `[N, D]` in the type of `hidden_states`.
        """
        return self._choose(hidden_states, indices)(hidden_states, indices, weights).to(hidden_states.dtype)

    def _choose(self, hidden_states: Tensor, indices: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self._use_grouped(hidden_states, indices):
            return self._apply_grouped
        if torch.compiler.is_compiling():
            # a graph cannot branch on counts: read the weights of the few chosen, or run every expert on every token
            return self._apply_gathered if indices.numel() <= self.num_experts else self._apply_dense
        return self._apply_single if hidden_states.shape[0] == 1 else self._apply_loop

    def _use_grouped(self, hidden_states: Tensor, indices: Tensor) -> bool:
        if self.implementation == "loop":
            return False
        problem = _grouped_problem(hidden_states, self.gate_up_proj, self.down_proj)
        if self.implementation == "grouped":
            if problem is not None:
                raise ValueError(f"implementation='grouped' {problem}; use 'auto' or 'loop'")
            return True
        # on a CPU `grouped_mm` is a loop too: it saves calls, which counts as long as an expert has few tokens
        few = hidden_states.shape[0] > 1 and indices.numel() <= 64 * self.num_experts
        return problem is None and (few or hidden_states.device.type != "cpu")

    def _feed_forward(self, hidden_states: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = nn.functional.linear(hidden_states, gate_up).chunk(2, dim=-1)
        return nn.functional.linear(self.activation(gate) * up, down)

    def _slices(self) -> tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]:
        """Both parameters, to be indexed by expert; unbound once, so that their gradient is written once."""
        if torch.is_grad_enabled():
            return self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        return self.gate_up_proj, self.down_proj

    def _apply_loop(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """One expert after the other, each on its own tokens."""
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        tokens, gates = order // indices.shape[-1], weights.flatten()[order]
        gate_up, down = self._slices()
        parts = [
            self._feed_forward(chosen, gate_up[expert], down[expert])
            for expert, chosen in enumerate(hidden_states.index_select(0, tokens).split(counts))
            if counts[expert] or hidden_states.shape[0] == 0  # gradients exist even without any token
        ]
        output = torch.zeros(hidden_states.shape, dtype=weights.dtype, device=weights.device)
        return output.index_add(0, tokens, torch.cat(parts) * gates[:, None])

    def _apply_single(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The case of one token: nothing to sort, no weight is copied."""
        gate_up, down = self._slices()
        gates = weights.unbind(-1)
        parts = [
            self._feed_forward(hidden_states, gate_up[expert], down[expert]) * gate
            for expert, gate in zip(indices[0].tolist(), gates, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def _apply_gathered(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Copy the weights of every choice; for few tokens in a graph."""
        gate_up, down = self.gate_up_proj[indices], self.down_proj[indices]  # [N, k, 2I, D], [N, k, D, I]
        gate, up = torch.einsum("nd,nkid->nki", hidden_states, gate_up).chunk(2, dim=-1)
        output = torch.einsum("nki,nkdi->nkd", self.activation(gate) * up, down)
        return (output * weights[..., None]).sum(1)

    def _apply_dense(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Every expert on every token, keeping the chosen; for many tokens in a graph."""
        output = torch.zeros(hidden_states.shape, dtype=weights.dtype, device=weights.device)
        for expert, (gate_up, down) in enumerate(
            zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        ):
            gate = weights.masked_fill(indices != expert, 0.0).sum(-1, keepdim=True)
            part = self._feed_forward(hidden_states, gate_up, down) * gate
            output = output + part.masked_fill(gate == 0, 0.0)  # an overflow in an expert not chosen must not count
        return output

    def _apply_grouped(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """All experts in one grouped product over tokens sorted by expert."""
        top_k = indices.shape[-1]
        dtype = _product_dtype(hidden_states)
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        experts = torch.arange(self.num_experts, device=flat.device)
        ends = torch.searchsorted(flat[order], experts, right=True).to(torch.int32)
        chosen = hidden_states.index_select(0, order // top_k).to(dtype)
        gate_up, down = self.gate_up_proj.to(dtype).transpose(1, 2), self.down_proj.to(dtype).transpose(1, 2)
        gate, up = nn.functional.grouped_mm(chosen, gate_up, offs=ends).chunk(2, dim=-1)
        output = nn.functional.grouped_mm(self.activation(gate) * up, down, offs=ends)
        # back in the order of the tokens by a gather: an index_add of a whole batch is not deterministic on a GPU
        output = output.index_select(0, order.argsort()).unflatten(0, (-1, top_k))
        return (output * weights[..., None]).sum(1)


def _product_dtype(hidden_states: Tensor) -> torch.dtype:
    """The type that autocast, or else the model, wants for matrix products."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype


def _grouped_problem(hidden_states: Tensor, *weights: Tensor) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot be called here, or None."""
    dtype = _product_dtype(hidden_states)
    if not hasattr(nn.functional, "grouped_mm"):
        return "needs torch.nn.functional.grouped_mm"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"does not work in {dtype}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return f"cannot be compiled in {dtype}"
    if any(weight.shape[-1] * dtype.itemsize % 16 for weight in weights):
        return "needs hidden and intermediate sizes of a multiple of 16 bytes"
    on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and any(weight.data_ptr() % 16 for weight in weights):
        return "needs weights aligned to 16 bytes"  # those of a memory-mapped file may not be
    return None


class SharedExpert(nn.Module):
    """The experts every token goes through, as one gated feed-forward network `[..., D]` to `[..., D]`."""

    def __init__(self, hidden_size: int, *, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoE(nn.Module):
    """Mix channels by the top k of E experts, and by shared experts if there are any.

    The losses and the update of the selection bias are in `losses.py`; the model calls them with the recorded logits.

    Args:
        hidden_size: Width D of the residual stream.
        num_experts: Number of experts E.
        top_k: Experts a token k.
        intermediate_size: Width I of one expert; 8/3 of D rounded up to a multiple of 64 if not given.
        activation: A name of `transformers.activations.ACT2FN`.
        scores: "softmax" (Mixtral, Jamba, Granite, Qwen) or "sigmoid" (DeepSeek-V3).
        renormalize: Whether a token's gates are divided by their sum. With "softmax" that equals a softmax over the
            chosen logits. Jamba does not.
        scaling_factor: Multiplies the gates at the end.
        num_groups: Groups the experts are split into.
        top_k_groups: Groups a token may choose from.
        selection_bias: Whether a bias balances the choice of experts without a loss (DeepSeek-V3).
        bias_update_rate: Its step.
        num_shared_experts: Number of experts every token goes through.
        shared_intermediate_size: Width of one shared expert; `intermediate_size` if not given.
        shared_gate: Whether a sigmoid of the token scales the shared experts' output (Qwen2-MoE).
        load_balancing_coef: Factor of the load balancing loss.
        z_loss_coef: Factor of the router z-loss.
        loss_scope: "document", or "batch" for transformers' formula, which changes with gradient accumulation.
        implementation: "grouped" needs `grouped_mm`, "loop" runs everywhere, "auto" takes the faster one that works.
            In a compiled graph the loop runs without branches. The choice changes only the speed.
        dropout: Probability of dropping an output in training.
    """

    full_precision = ("router", "shared_expert_gate")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        intermediate_size: int | None = None,
        activation: str = "silu",
        scores: str = "softmax",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_k_groups: int = 1,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        load_balancing_coef: float = 0.0,
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
        for name, value in (("load_balancing_coef", load_balancing_coef), ("z_loss_coef", z_loss_coef)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
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
        )
        self.experts = Experts(
            hidden_size,
            num_experts=num_experts,
            intermediate_size=intermediate_size,
            activation=activation,
            implementation=implementation,
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
        """Map `[B, T, D]` to `[B, T, D]`; there is no state. A pad is routed as any token and touches no other."""
        _, weights, indices = self.router(hidden_states)
        output = self.experts(hidden_states.flatten(0, -2), indices.flatten(0, -2), weights.flatten(0, -2))
        output = self._add_shared(output.view(hidden_states.shape), hidden_states)
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
        _, weights, indices = self.router(hidden_states)
        tokens = []
        for token, gates, chosen in zip(*(x.flatten(0, 1) for x in (hidden_states, weights, indices)), strict=True):
            output = torch.zeros_like(token)
            for weight, expert in zip(gates, chosen.tolist(), strict=True):
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
