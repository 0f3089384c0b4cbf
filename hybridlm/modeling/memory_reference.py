"""The memory as a plain loop over rows and tokens, by autograd of the objective: the truth of `memory`.

Shapes: B batch, T tokens, H heads, K head width, C chunk size, c window.
"""

from typing import Any

import torch
from torch import Tensor

from .masks import SequenceInfo
from .memory_update import orthogonalize
from .objectives import objective, slope


def scan_by_tokens(
    scan: Any, queries: Tensor, tokens: Tensor, state: Any, sequence: SequenceInfo
) -> tuple[Tensor, None, dict[str, Tensor | None]]:
    """Do what `MemoryScan` does, with its arguments and results, but for the trace."""
    outputs, kept = [], []
    for row in range(queries.shape[0]):
        length = sequence.num_tokens if sequence.lengths is None else int(sequence.lengths[row])
        memory = TokenMemory(
            scan, tokens[row], None if state is None else _row_of(state, row), _fill(scan, sequence, row)
        )
        read = []
        for t in range(queries.shape[1]):
            if t >= length:
                read.append(torch.zeros_like(queries[row, t]))
                continue
            if sequence.starts is not None and sequence.starts[row if len(sequence.starts) > 1 else 0, t]:
                memory.forget()
            read.append(memory.step(queries[row, t], tokens[row, t]))
        outputs.append(torch.stack(read))
        kept.append(memory.state())
    names = kept[0]
    state = {name: None if names[name] is None else torch.stack([k[name] for k in kept]) for name in names}
    return torch.stack(outputs), None, state


def _fill(scan: Any, sequence: SequenceInfo, row: int) -> int:
    """Tokens of the open chunk before the call."""
    past = 0 if sequence.num_past is None else int(sequence.num_past[row])
    start = 0 if sequence.past_doc_start is None else int(sequence.past_doc_start[row])
    return (past - start) % scan.chunk_size


def _row_of(state: Any, row: int) -> dict[str, Tensor | None]:
    names = ("memory", "momentum", "open_tokens", "recent_tokens")
    return {name: None if getattr(state, name) is None else getattr(state, name)[row] for name in names}


class TokenMemory:
    """One row's memory; weights `[H, in, out]` a layer."""

    def __init__(self, scan: Any, like: Tensor, state: dict[str, Tensor | None] | None, fill: int) -> None:
        self.net, self.chunk_size, self.window, self.detach = scan.network, scan.chunk_size, scan.window, scan.detach
        self.like = like
        self.forget()
        if state is not None:
            self.start = [x[0] for x in self.net.split(state["memory"][None])]
            if self.net.momentum:
                self.start_momentum = [x[0] for x in self.net.split(state["momentum"][None])]
            if self.window > 1:
                self.recent = list(state["recent_tokens"])
            self._begin_chunk()
            for token in state["open_tokens"][:fill]:
                self._learn(token)

    def forget(self) -> None:
        """Begin a document."""
        heads = self.net.num_heads
        self.start = [self.like.new_zeros(heads, *shape) for shape in self.net.shapes]
        self.start_momentum = [torch.zeros_like(x) for x in self.start] if self.net.momentum else None
        self.recent = [torch.zeros_like(self.like[0]) for _ in range(self.window - 1)]
        self._begin_chunk()

    def _begin_chunk(self) -> None:
        self.closed = self.start
        if self.detach:
            self.start = [x.detach() for x in self.start]
            self.start_momentum = None if self.start_momentum is None else [x.detach() for x in self.start_momentum]
        self.momentum = self.start_momentum
        self.moved = [torch.zeros_like(x) for x in self.start]  # what the chunk has added
        self.kept = self.like.new_ones(self.net.num_heads, 1, 1)
        self.rate = 0.0
        self.open: list[Tensor] = []

    def _weights(self, moved: list[Tensor]) -> list[Tensor]:
        return self.net.weights(torch.cat([x.flatten(1) for x in moved], dim=-1)[None])

    def _now(self, step: list[Tensor]) -> list[Tensor]:
        """The memory after the last token, as what it has moved from the initial weights."""
        decayed = [self.kept * x for x in self.start]
        if self.net.forget_to == "zero":
            initial = [w.to(self.like.dtype) for w in self.net.initial]
            decayed = [x - (1 - self.kept) * w for x, w in zip(decayed, initial, strict=True)]
        return [x + s for x, s in zip(decayed, step, strict=True)]

    def step(self, query: Tensor, token: Tensor) -> Tensor:
        """Learn a token `[H, F]` and answer its query `[H, K]`."""
        self._learn(token)
        full = len(self.open) == self.chunk_size
        if self.net.at_borders and not full:
            return self.net.read(self._weights(self.start), query[None, :, None])[0, :, 0]
        now = self._after()
        answer = self.net.read(self._weights(now), query[None, :, None])[0, :, 0]
        if full:
            self._close(now)
        return answer

    def learn(self, token: Tensor) -> None:
        """Learn a token; what `recall` reads moves on when the chunk is full."""
        self._learn(token)
        if len(self.open) == self.chunk_size:
            self._close(self._after())

    def recall(self, query: Tensor) -> Tensor:
        """Answer a query from the memory with which the open chunk began, which is no constant here."""
        return self.net.read(self._weights(self.closed), query[None, :, None])[0, :, 0]

    def _after(self) -> list[Tensor]:
        """The memory after the last token."""
        step = self.moved
        if self.net.optimizer == "muon":
            step = [self.rate * orthogonalize(x) for x in step]
        return self._now(step)

    def _close(self, now: list[Tensor]) -> None:
        self.recent = (self.recent + self.open)[len(self.open) :] if self.window > 1 else []
        self.start, self.start_momentum = now, self.momentum
        self._begin_chunk()

    def _learn(self, token: Tensor) -> None:
        self.open.append(token)
        theta, log_eta, log_keep = (token[:, 2 * self.net.head_dim + i, None, None] for i in range(3))
        gradient = [torch.zeros_like(x) for x in self.start]
        sources = (self.recent + self.open)[-self.window :]
        for source in sources:
            gamma = source[:, -1, None, None] if self.window > 1 else 1.0
            gradient = [g + gamma * x for g, x in zip(gradient, self._gradient(source), strict=True)]
        step = [-theta * g for g in gradient]
        if self.net.momentum:
            step = [log_eta.exp() * s + x for s, x in zip(self.momentum, step, strict=True)]
            self.momentum = step
        self.moved = [log_keep.exp() * m + s for m, s in zip(self.moved, step, strict=True)]
        self.kept, self.rate = self.kept * log_keep.exp(), self.rate + theta

    def _gradient(self, token: Tensor) -> list[Tensor]:
        """Autograd of the objective at the weights with which the chunk began, under the bounds."""
        net, width = self.net, self.net.head_dim
        key, value = token[None, :, None, :width], token[None, :, None, width : 2 * width]
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            weights = [w if tracked else w.detach().requires_grad_() for w in self._weights(self.start)]
            weights = [w if w.requires_grad else w.requires_grad_() for w in weights]
            prediction = net.read(weights, key)
            loss = objective(net.objective, prediction, value, net.objective_p, net.objective_threshold).sum()
            gradient = torch.autograd.grad(loss, weights, create_graph=tracked)
            length = slope(net.objective, prediction, value, net.objective_p, net.objective_threshold)
            length = (length.square().sum(-1) + 1e-12).sqrt()[0]  # [H, 1]
            squares = sum(g[0].square().sum((-1, -2)) for g in gradient)[:, None]
            factor = torch.ones_like(squares)
            if net.max_gradient is not None:
                factor = factor * (net.max_gradient / length).clamp(max=1.0)
            if net.max_curvature is not None:
                factor = factor * (net.max_curvature * length.square() / (squares + 1e-12)).clamp(max=1.0)
            bounded = [g[0] * factor[..., None] for g in gradient]
        return bounded if tracked else [g.detach() for g in bounded]

    def state(self) -> dict[str, Tensor | None]:
        """The state's tensors of this row."""

        def flat(parts: list[Tensor]) -> Tensor:
            return torch.cat([x.flatten(1) for x in parts], dim=-1)

        empty = [torch.zeros_like(self.like[0])] * (self.chunk_size - 1 - len(self.open))
        slots = self.open + empty
        return {
            "memory": flat(self.start),
            "momentum": flat(self.start_momentum) if self.net.momentum else None,
            "open_tokens": torch.stack(slots) if slots else self.like.new_zeros(0, *self.like.shape[1:]),
            "recent_tokens": torch.stack(self.recent) if self.window > 1 else None,
        }
