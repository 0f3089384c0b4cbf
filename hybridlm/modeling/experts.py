"""Experts: gated feed-forward networks that a token goes through by choice, and those every token goes through.

Shapes: N tokens, D hidden size, E experts, k choices a token, I expert width.
Reference: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
arXiv:2412.19437, section 2.1.2 (shared experts).
Differs: a choice may be no expert at all, so that tokens of one batch go through different numbers of experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN


class Experts(nn.Module):
    """E gated feed-forward networks in two parameters, `gate_up_proj` `[E, 2I, D]` and `down_proj` `[E, D, I]`.

    Args:
        hidden_size: Width D of the residual stream.
        num_experts: Number of experts E.
        intermediate_size: Width I of one expert.
        activation: A name of `transformers.activations.ACT2FN`.
        implementation: See `MoE`.
        partial: Whether a choice may be none of the experts: any number of E or above.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        intermediate_size: int,
        activation: str,
        implementation: str,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.partial = partial
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
            indices: `[N, k]`, the chosen experts; E or above for none.
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
        counts = torch.bincount(flat, minlength=self.num_experts)[: self.num_experts].tolist()
        order = order[: sum(counts)]  # what comes after went to no expert
        tokens, gates = order // indices.shape[-1], weights.flatten()[order]
        gate_up, down = self._slices()
        parts = [
            self._feed_forward(chosen, gate_up[expert], down[expert])
            for expert, chosen in enumerate(hidden_states.index_select(0, tokens).split(counts))
            if counts[expert] or not order.numel()  # gradients exist even without any token
        ]
        output = torch.zeros(hidden_states.shape, dtype=weights.dtype, device=weights.device)
        return output.index_add(0, tokens, torch.cat(parts) * gates[:, None])

    def _apply_single(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The case of one token: nothing to sort, no weight is copied."""
        chosen = indices[0].tolist()
        if self.partial and min(chosen) >= self.num_experts:
            return self._apply_loop(hidden_states, indices, weights)
        gate_up, down = self._slices()
        parts = [
            self._feed_forward(hidden_states, gate_up[expert], down[expert]) * gate
            for expert, gate in zip(chosen, weights.unbind(-1), strict=True)
            if expert < self.num_experts
        ]
        return sum(parts[1:], parts[0])

    def _apply_gathered(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Copy the weights of every choice; for few tokens in a graph."""
        absent = indices >= self.num_experts if self.partial else None
        if absent is not None:
            indices = indices.clamp(max=self.num_experts - 1)
        gate_up, down = self.gate_up_proj[indices], self.down_proj[indices]  # [N, k, 2I, D], [N, k, D, I]
        gate, up = torch.einsum("nd,nkid->nki", hidden_states, gate_up).chunk(2, dim=-1)
        output = torch.einsum("nki,nkdi->nkd", self.activation(gate) * up, down) * weights[..., None]
        return (output if absent is None else output.masked_fill(absent[..., None], 0.0)).sum(1)

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
        absent = (flat[order] >= self.num_experts)[:, None] if self.partial else None
        if absent is not None:  # rows behind the last group are left undefined, in backward too
            chosen = chosen.masked_fill(absent, 0.0)
        gate_up, down = self.gate_up_proj.to(dtype).transpose(1, 2), self.down_proj.to(dtype).transpose(1, 2)
        gate, up = nn.functional.grouped_mm(chosen, gate_up, offs=ends).chunk(2, dim=-1)
        output = nn.functional.grouped_mm(self.activation(gate) * up, down, offs=ends)
        if absent is not None:
            output = output.masked_fill(absent, 0.0)
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
