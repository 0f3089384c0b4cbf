"""Mixture of depths: a router lets a fixed share of the tokens through a run of layers.

Shapes: B batch, T tokens, D hidden size.
Reference: Raposo et al. 2024, "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
arXiv:2404.02258; the loss-free bias: Wang et al. 2024, arXiv:2408.15664.
Differs: the router's weight scales the change that the layers make, not their output with the residual in it. The
router reads normalised hidden states, so that its scores have one scale at every depth. `rule="threshold"` is ours: one
causal rule in training and in use; DeepSeek's update by the sign alone let spans die.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .loads import SpanLoad
from .masks import SequenceInfo
from .passage import Selection, SpanRecord, stream_mean
from .precision import project, state_dtype
from .router import check_name
from .spans import Span, ceil_share

RULES = ("threshold", "auxiliary_loss", "predictor", "random")
WEIGHTS = ("sigmoid", "raw")


class DepthRouter(nn.Linear):
    """The projection `[..., D]` to `[..., 1]` that scores tokens."""

    def reset_parameters(self) -> None:
        """Start as `init_weights` says."""
        self.init_weights(1.0)

    def init_weights(self, std: float) -> None:
        """Draw the weights so that scores have variance 1 at any width; `std` is not used."""
        init.normal_(self.weight, mean=0.0, std=1.0)
        if self.bias is not None:
            init.zeros_(self.bias)


class MixtureOfDepths(Span):
    """Let the tokens enter that a router scores highest.

    Args:
        hidden_size: Width D of the residual stream.
        capacity: Share of the tokens that enters: exactly, rounded up, in top-k training; as a target otherwise.
        rule: How a token is chosen without seeing later ones. "threshold" compares the score with a bias that is moved
            towards the capacity once an optimizer step, in training too. "auxiliary_loss" and "predictor" train by the
            top k of each document, as the paper does, and then ask whether the score is positive, which a binary cross
            entropy teaches the router itself or a small network beside it that the stream does not notice. "random"
            draws tokens by their place in the document, as a control.
        weight: Factor on what the layers change: the "raw" score, as in the paper, or its "sigmoid".
        loss_coef: Factor of the binary cross entropy.
        bias_update_rate: Step of the bias for each unit of (capacity - share). The bias is added to the score: a larger
            one lets more tokens in.
        predictor_size: Width of the predictor's hidden layer; a quarter of D, at least 8, if not given.
        ceiling: After n tokens of a document at most `ceil(ceiling * n)` have entered; `None` for no limit. It bounds
            the keys that the layers store.
    """

    float32_names = ("threshold_bias",)
    full_precision = ("router", "predictor.0", "predictor.2")

    def __init__(
        self,
        hidden_size: int,
        *,
        capacity: float = 0.125,
        rule: str = "threshold",
        weight: str = "sigmoid",
        loss_coef: float = 0.01,
        bias_update_rate: float = 1.0,
        predictor_size: int | None = None,
        ceiling: float | None = None,
    ) -> None:
        super().__init__(hidden_size, ceiling)
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity={capacity} must lie in (0, 1]")
        if ceiling is not None and ceiling < capacity:
            raise ValueError(f"ceiling={ceiling} must not be below capacity={capacity}")
        check_name("rule", rule, RULES)
        check_name("weight", weight, WEIGHTS)
        for name, value in (("loss_coef", loss_coef), ("bias_update_rate", bias_update_rate)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        self.predictor_size = max(hidden_size // 4, 8) if predictor_size is None else predictor_size
        if self.predictor_size < 1:
            raise ValueError(f"predictor_size={predictor_size} must be at least 1")
        self.capacity, self.rule, self.weight_function = capacity, rule, weight
        self.loss_coef, self.bias_update_rate = loss_coef, bias_update_rate
        self.top_k_in_evaluation = False  # a measurement that sees the future: `analysis.leaky_top_k`
        self.router = DepthRouter(hidden_size, 1, bias=rule == "auxiliary_loss")  # which moves the cut to a score of 0
        self.predictor = None
        if rule == "predictor":
            hidden = nn.Linear(hidden_size, self.predictor_size)
            self.predictor = nn.Sequential(hidden, nn.GELU(), nn.Linear(self.predictor_size, 1))
        bias = torch.zeros(()) if rule == "threshold" else None
        self.register_buffer("threshold_bias", bias)
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Let the bias start where scores of variance 1 meet the capacity."""
        if self.threshold_bias is not None:
            init.constant_(self.threshold_bias, NormalDist().inv_cdf(min(self.capacity, 0.9999)))

    def expected_share(self) -> float:
        """The capacity."""
        return self.capacity

    def sees_the_future(self, sequence: SequenceInfo) -> bool:
        """Whether this call takes the top k of whole documents."""
        if self.rule in ("threshold", "random"):
            return self.top_k_in_evaluation and not self.training and not sequence.use_cache
        return (self.training or self.top_k_in_evaluation) and not sequence.use_cache

    def select(self, stream: Tensor, state: None, sequence: SequenceInfo) -> tuple[Selection, None]:
        """Score tokens and choose; see `Span.select`."""
        inputs = stream_mean(stream)
        inputs = inputs.to(state_dtype(inputs.dtype))
        inputs = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + 1e-6)
        scores = project(inputs * self.hidden_size**-0.5, self.router.weight, self.router.bias)[..., 0]  # [B, T]
        logits = scores if self.predictor is None else self._predict(inputs.detach())
        if self.sees_the_future(sequence):
            wished = top_share(scores, self.capacity, sequence)
        elif self.rule == "random":
            wished = self._draw(sequence)
        else:
            bias = 0 if self.threshold_bias is None else self.threshold_bias
            wished = logits + bias > 0
        if sequence.token_mask is not None:
            wished = wished & sequence.token_mask
        weight = scores.sigmoid() if self.weight_function == "sigmoid" else scores
        if self.predictor is not None and self.training:
            weight = weight + 0 * logits  # a gradient of 0 for the predictor where no loss asks for it
        return Selection(wished, logits, weight), None

    def _predict(self, inputs: Tensor) -> Tensor:
        hidden, activation, output = self.predictor
        return project(activation(project(inputs, hidden.weight, hidden.bias)), output.weight, output.bias)[..., 0]

    def _draw(self, sequence: SequenceInfo) -> Tensor:
        """A fixed draw for each place in a document, another one in every span."""
        place = sequence.index if sequence.doc_start is None else sequence.index - sequence.doc_start
        value = (place + 1) * 0x9E3779B1 + (self.number + 1) * 0x85EBCA77
        for _ in range(2):
            value = ((value ^ (value >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
        return ((value ^ (value >> 16)) & 0xFFFF) < self.capacity * 0x10000

    def token_losses(self, record: SpanRecord, segment_ids: Tensor | None) -> Tensor | None:
        """Binary cross entropy of the decision against what the top k took, `[B, T]`, where there is one to learn."""
        if self.rule not in ("auxiliary_loss", "predictor") or not self.training:
            return None
        targets = record.taken.to(record.scores.dtype)
        losses = nn.functional.binary_cross_entropy_with_logits(record.scores, targets, reduction="none")
        return self.loss_coef * losses

    def predicted(self, record: SpanRecord) -> Tensor | None:
        """What would be decided without seeing later tokens, where the top k decides in training."""
        return record.scores > 0 if self.rule in ("auxiliary_loss", "predictor") else None

    @torch.no_grad()
    def apply_load(self, counts: Tensor, moves: bool = True) -> None:
        """Move the bias towards the capacity; see `Span.apply_load`."""
        if self.threshold_bias is not None and moves:
            load = SpanLoad.from_counts(counts)
            step = self.bias_update_rate * (self.capacity - load.wished / load.reached.clamp(min=1))
            self.threshold_bias += (step * (load.reached > 0)).to(self.threshold_bias)
        super().apply_load(counts, moves)

    def extra_repr(self) -> str:
        """Show the choice."""
        return f"layers={self.start}..{self.stop - 1}, capacity={self.capacity}, rule={self.rule}"


def top_share(scores: Tensor, capacity: float, sequence: SequenceInfo) -> Tensor:
    """The `ceil(capacity * length)` best tokens of every document: later tokens have a say.

    Args:
        scores: `[B, T]`.
        capacity: Share of a document.
        sequence: The call; documents end with it.

    Returns:
        `[B, T]`, True at the best; among equals the earlier ones.
    """
    scores = scores.detach()
    if sequence.token_mask is not None:
        scores = scores.masked_fill(~sequence.token_mask, float("-inf"))
    document = torch.zeros_like(scores, dtype=torch.long) if sequence.segment_ids is None else sequence.segment_ids
    document = document.expand(scores.shape)
    real = torch.ones_like(document) if sequence.token_mask is None else sequence.token_mask.long()
    lengths = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.long, device=scores.device)
    lengths = lengths.scatter_add(1, document, real)  # [B, documents]
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, document.gather(1, order).argsort(dim=1, stable=True))  # by document, best first
    places = torch.arange(scores.shape[1], device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter(1, order, places)
    counts = torch.zeros_like(lengths).scatter_add(1, document, torch.ones_like(document))  # pads included
    rank = place - (counts.cumsum(1) - counts).gather(1, document)
    taken = rank < ceil_share(capacity, lengths).gather(1, document)
    return taken if sequence.token_mask is None else taken & sequence.token_mask
