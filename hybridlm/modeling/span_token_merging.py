"""Token merging: neighbours that say the same share one place in a run of layers.

Tokens form groups, one token a group enters, and every token reads what the last one that entered brought back. Each
keeps its own residual stream, so merged tokens stay distinct. Positions inside are those of the tokens that entered.

Shapes: B batch, T tokens, D hidden size, n residual streams, N = n * D, A bins of angles.
Reference: Hwang et al. 2025, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling" (H-Net),
arXiv:2507.07955, section 2.2 (learned boundaries, smoothing, ratio loss); Nawrot et al. 2021, "Hierarchical
Transformers Are More Efficient Language Models" (Hourglass), arXiv:2110.13711, section 2.2 (fixed strides and their
shift).
Differs: the layers' change is spread over a group, not their output. A calibrated threshold is ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .document_loss import spread_over_documents, sum_by_document
from .loads import NUM_COUNTS
from .masks import SequenceInfo, trailing
from .passage import Selection, SpanRecord, stream_mean
from .precision import project, state_dtype
from .router import check_name
from .spans import Span

BOUNDARIES = ("cosine", "learned", "stride")
REPRESENTATIVES = ("first", "mean")
ANGLE_BINS = 2048  # between 0 and pi: neighbours that are nearly equal must not share one bin


@dataclass
class OpenGroup:
    """Where a row stands; only what the options need is kept.

    Attributes:
        last: `[B, D]`, the last token.
        position: `[B]`, its position id.
        total: `[B, N]`, sum of the open group.
        size: `[B]`, its number of tokens.
        gate: `[B]`, probability of the boundary that opened it.
    """

    last: Tensor | None = None
    position: Tensor | None = None
    total: Tensor | None = None
    size: Tensor | None = None
    gate: Tensor | None = None


class TokenMerging(Span):
    """Let one token a group enter.

    Args:
        hidden_size: Width D of the residual stream.
        boundary: Where a group begins; always at the first token of a document. "cosine" begins one where the cosine to
            the token before lies below a threshold, "learned" where that of two projections does, as in H-Net, and
            "stride" after a fixed number of tokens.
        representative: What enters. The "first" token of a group enters at once and serves its own group. The "mean" of
            a group enters when the group is complete and serves later tokens: with "stride" at its last token, with
            another boundary at the first token of the next group. The last is the default for "stride".
        threshold: Cosine below which a group begins; 0.5 for "cosine" and 0 for "learned", where that is a probability
            of one half, if not given. Above 1, and not calibrated, every token is a group of its own.
        target_ratio: Tokens a group that calibration or the ratio loss aim at; 2 if not given.
        bias_update_rate: Of the way to the threshold that would have met the target in the last optimizer step, the
            share that the threshold of "cosine" goes; 0 fixes it.
        loss_coef: Factor of the ratio loss of "learned".
        stride: Tokens a group for "stride", and for it alone; 2 if not given.
        ceiling: After n tokens of a document at most `ceil(ceiling * n)` have entered; `None` for no limit. A first
            token that may not enter joins the group before.
    """

    float32_names = ("threshold_bias",)
    full_precision = ("query_proj", "key_proj")
    holds = True

    def __init__(
        self,
        hidden_size: int,
        *,
        boundary: str = "cosine",
        representative: str | None = None,
        threshold: float | None = None,
        target_ratio: float | None = None,
        bias_update_rate: float = 0.3,
        loss_coef: float = 0.03,
        stride: int | None = None,
        ceiling: float | None = None,
    ) -> None:
        super().__init__(hidden_size, ceiling)
        check_name("boundary", boundary, BOUNDARIES)
        if representative is None:
            representative = "mean" if boundary == "stride" else "first"
        check_name("representative", representative, REPRESENTATIVES)
        if threshold is None and boundary != "stride":
            threshold = 0.5 if boundary == "cosine" else 0.0
        if stride is not None and boundary != "stride":
            raise ValueError(f"stride={stride} needs boundary='stride'; with boundary={boundary!r} set target_ratio")
        if boundary == "stride":
            if threshold is not None:
                raise ValueError(f"threshold={threshold} must be null with boundary='stride', which compares nothing")
            stride = 2 if stride is None else stride
            if target_ratio not in (None, stride):
                raise ValueError(f"target_ratio={target_ratio} must be null with boundary='stride'; set stride")
            target_ratio = float(stride)
        target_ratio = 2.0 if target_ratio is None else target_ratio
        self.boundary, self.representative, self.threshold = boundary, representative, threshold
        self.target_ratio, self.stride = target_ratio, stride
        self.bias_update_rate, self.loss_coef = bias_update_rate, loss_coef
        self._check_options()
        needs_state = boundary != "stride" or representative == "mean"
        self.choice_type = OpenGroup if needs_state else None
        learned = boundary == "learned"
        self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False) if learned else None
        self.key_proj = nn.Linear(hidden_size, hidden_size, bias=False) if learned else None
        self.register_buffer("threshold_bias", torch.zeros(()) if boundary == "cosine" else None)
        self._angles: Tensor | None = None
        self.init_weights(0.02)

    def _check_options(self) -> None:
        if self.threshold is not None and not self.threshold > -1:
            raise ValueError(f"threshold={self.threshold} must be above -1, the least cosine")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        if not 1 <= self.target_ratio < math.inf:
            raise ValueError(f"target_ratio={self.target_ratio} must be at least 1")
        if self.boundary == "learned" and self.target_ratio == 1:
            raise ValueError("target_ratio=1 must be above 1 with boundary='learned'; threshold=2 merges nothing")
        if not 0 <= self.bias_update_rate <= 1:
            raise ValueError(f"bias_update_rate={self.bias_update_rate} must lie in [0, 1]")
        if self.loss_coef < 0:
            raise ValueError(f"loss_coef={self.loss_coef} must not be negative")
        if self.ceiling is None:
            return
        if self.boundary == "stride":
            raise ValueError(f"ceiling={self.ceiling} must be null with boundary='stride', whose share is fixed")
        if self.representative == "mean":
            raise ValueError(
                f"ceiling={self.ceiling} must be null with representative='mean': a group that may not enter would be "
                "lost to all later tokens"
            )
        if self.ceiling * self.target_ratio < 1:
            raise ValueError(f"ceiling={self.ceiling} must not be below 1 / target_ratio, {1 / self.target_ratio:.3g}")

    def init_weights(self, std: float) -> None:
        """Begin with the cosine of the tokens themselves, and at the given threshold."""
        for projection in (self.query_proj, self.key_proj):
            if projection is not None:
                init.eye_(projection.weight)
        if self.threshold_bias is not None:
            init.zeros_(self.threshold_bias)

    def max_tokens(self, num_tokens: int) -> int:
        """Most tokens that enter among the first `num_tokens` of a document."""
        if self.boundary != "stride":
            return super().max_tokens(num_tokens)
        rounded = num_tokens + self.stride - 1 if self.representative == "first" else num_tokens
        return rounded // self.stride

    def expected_share(self) -> float:
        """Groups a token."""
        if self.boundary == "stride":
            return 1 / self.stride
        fixed = self.boundary == "learned" or not self.bias_update_rate
        return 1.0 if fixed and self.threshold > 1 else 1 / self.target_ratio

    def state_spec(self, num_streams: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What the span keeps in a cache; see `Span.state_spec`."""
        wide, spec = state_dtype(dtype), super().state_spec(num_streams, dtype)
        if self.boundary != "stride":
            spec["choice.last"] = ((self.hidden_size,), wide)
        if self.representative == "mean":
            spec["choice.total"] = ((num_streams * self.hidden_size,), wide)
            spec["choice.size"] = ((), wide)
        if self.representative == "mean" and self.boundary != "stride":
            spec["choice.position"] = ((), torch.long)
        if self.representative == "mean" and self.boundary == "learned":
            spec["choice.gate"] = ((), wide)
        return spec

    def select(
        self, stream: Tensor, state: OpenGroup | None, sequence: SequenceInfo
    ) -> tuple[Selection, OpenGroup | None]:
        """Find where groups begin, and what enters; see `Span.select`."""
        state, after = OpenGroup() if state is None else state, OpenGroup()
        place = sequence.index if sequence.doc_start is None else sequence.index - sequence.doc_start
        place = place.expand(stream.shape[:2])  # [B, T], tokens before in the same document
        probability = None
        if self.boundary == "stride":
            turn = place % self.stride
            scores, opens = turn.to(state_dtype(stream.dtype)), turn == 0
        else:
            scores, after.last = self._cosine(stream, state, sequence)
            scores = torch.where(place == 0, -1.0, scores)
            if self.boundary == "learned":
                scores = probability = self._probability(scores)
                opens = scores >= 0.5
            else:
                opens = (scores < self.threshold + self.threshold_bias) | (place == 0)
        if sequence.token_mask is not None:
            opens = opens & sequence.token_mask
        if self.representative == "first":
            selection = Selection(opens, scores, retain=None if probability is None else 1 - probability)
        else:
            selection = self._means(stream, scores, opens, place, state, after, sequence)
        if probability is not None:
            confidence = torch.where(opens, probability, 1 - probability)
            selection.weight = 1 + (confidence - confidence.detach())  # 1, with a gradient
        return selection, after if self.choice_type else None

    def _cosine(self, stream: Tensor, state: OpenGroup, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """The cosine of each token to the one before `[B, T]`, and the last token of every row `[B, D]`."""
        tokens = stream_mean(stream)
        tokens = tokens.to(state_dtype(tokens.dtype))
        if self.query_proj is None:
            tokens = tokens.detach()
        before = torch.zeros_like(tokens[:, 0]) if state.last is None else state.last
        queries, keys = tokens, _shifted(tokens, before)
        if self.query_proj is not None:
            queries, keys = project(queries, self.query_proj.weight), project(keys, self.key_proj.weight)
        cosine = nn.functional.cosine_similarity(queries, keys, dim=-1).clamp(-1, 1)
        return cosine, _last(tokens, before, sequence)

    def _probability(self, cosine: Tensor) -> Tensor:
        """Probability of a boundary `[B, T]`: one half where the cosine is the threshold."""
        if self.threshold > 1:
            return 1 + 0 * cosine  # every token for certain, and a gradient of 0
        return ((1 - cosine + self.threshold) / 2).clamp(0, 1).masked_fill(cosine == -1, 1.0)

    def _means(
        self,
        stream: Tensor,
        scores: Tensor,
        opens: Tensor,
        place: Tensor,
        state: OpenGroup,
        after: OpenGroup,
        sequence: SequenceInfo,
    ) -> Selection:
        """Let the mean of every group that is complete enter; fills in the state after the call."""
        values = stream.flatten(2).to(state_dtype(stream.dtype))  # [B, T, N]
        real = torch.ones_like(scores) if sequence.token_mask is None else sequence.token_mask.to(scores.dtype)
        values = values * real[..., None]
        number = opens.long().cumsum(1)  # [B, T], of the group; 0 is the one that was open before
        totals = _sum_by_group(values, state.total, number)  # [B, 1 + T, N]
        sizes = _sum_by_group(real, state.size, number)
        if self.boundary == "stride":
            closes, closed, positions = (place % self.stride == self.stride - 1) & (real > 0), number, None
        else:
            closes, closed = opens & (place > 0), (number - 1).clamp(min=0)
            own = sequence.positions.expand_as(place)
            before = torch.zeros_like(own[:, 0]) if state.position is None else state.position
            positions, after.position = _shifted(own, before), _last(own, before, sequence)
        size = _of_group(sizes, closed)
        means = _of_group(totals, closed) / size.clamp(min=1)[..., None]
        retain = None
        if self.boundary == "learned":  # a group is as sure as the boundary that opened it
            gates = _sum_by_group(torch.where(opens, scores, 0.0), state.gate, number)
            retain, after.gate = 1 - _of_group(gates, closed), _of_group(gates, number[:, -1:])[:, 0]
        after.total, after.size = (_of_group(sums, number[:, -1:])[:, 0] for sums in (totals, sizes))
        return Selection(
            closes,
            scores,
            inputs=means.to(stream.dtype).view_as(stream),
            positions=positions,
            retain=retain,
            sizes=torch.where(closes, size, 0.0),
        )

    def token_losses(self, record: SpanRecord, segment_ids: Tensor | None) -> Tensor | None:
        """The ratio loss of H-Net, equation 10, `[B, T]`: its mean over a document is the document's."""
        if self.boundary != "learned" or not self.training:
            return None
        probability, reached, ratio = record.scores, record.reached.to(record.scores.dtype), self.target_ratio
        counts = sum_by_document((probability.detach() >= 0.5).to(reached) * reached, segment_ids)  # [B, M]
        shares = counts / sum_by_document(reached, segment_ids).clamp(min=1)
        share = spread_over_documents(shares, segment_ids).expand_as(probability)
        losses = (ratio - 1) * share * probability + (1 - share) * (1 - probability)
        return self.loss_coef * ratio / (ratio - 1) * losses

    @torch.no_grad()
    def add_load(self, record: SpanRecord) -> None:
        """Count what a forward in training chose, and the angles between neighbours."""
        super().add_load(record)
        if self.threshold_bias is None:
            return
        angles = record.scores.double().clamp(-1, 1).acos() / math.pi
        bins = (angles * ANGLE_BINS).long().clamp(max=ANGLE_BINS - 1).flatten()
        counts = angles.new_zeros(ANGLE_BINS).scatter_add(0, bins, record.reached.to(angles.dtype).flatten())
        self._angles = counts if self._angles is None else self._angles.to(counts.device) + counts

    def reset_load(self) -> None:
        """Start counting anew."""
        super().reset_load()
        self._angles = None

    def load_counts(self) -> Tensor:
        """As `Span.load_counts`, followed by the tokens by angle `[A]` where there is a threshold."""
        counts = super().load_counts()
        if self.threshold_bias is None:
            return counts
        angles = counts.new_zeros(ANGLE_BINS) if self._angles is None else self._angles.to(counts.device)
        return torch.cat([counts, angles])

    @torch.no_grad()
    def apply_load(self, counts: Tensor, moves: bool = True) -> None:
        """Move the threshold towards the one that gives the target; see `Span.apply_load`."""
        counts, angles = counts[:NUM_COUNTS], counts[NUM_COUNTS:]
        if self.threshold_bias is not None and self.bias_update_rate and moves:
            below = angles.cumsum(0)
            wanted = (1 - 1 / self.target_ratio) * below[-1]  # tokens that should stay in the group of the one before
            at = torch.searchsorted(below, wanted).clamp(max=ANGLE_BINS - 1)
            inside = 1 - (below[at] - wanted) / angles[at].clamp(min=1)
            best = torch.cos(math.pi * (at + inside) / ANGLE_BINS)
            step = self.bias_update_rate * (best - self.threshold - self.threshold_bias.to(best))
            self.threshold_bias += torch.where(below[-1] > 0, step, 0.0).to(self.threshold_bias)
        super().apply_load(counts, moves)

    def extra_repr(self) -> str:
        """Show the choice."""
        groups = f"stride={self.stride}" if self.boundary == "stride" else f"target_ratio={self.target_ratio}"
        what = f"boundary={self.boundary}, representative={self.representative}, {groups}"
        return f"layers={self.start}..{self.stop - 1}, {what}"


def _shifted(values: Tensor, before: Tensor) -> Tensor:
    """`[B, T, ...]` one token later, after `before` `[B, ...]`."""
    return torch.cat([before[:, None], values[:, :-1]], dim=1)


def _last(values: Tensor, before: Tensor, sequence: SequenceInfo) -> Tensor:
    """The value `[B, ...]` at the last real token of every row; `before` where there is none."""
    if sequence.lengths is None:
        return values[:, -1].clone()  # a view would keep all of a long call alive
    number = sequence.lengths[:, None].expand(values.shape[0], 1)
    return _of_group(torch.cat([before[:, None], values], dim=1), number)[:, 0]


def _sum_by_group(values: Tensor, before: Tensor | None, number: Tensor) -> Tensor:
    """Sum `[B, T, ...]` over the tokens of a group, `[B, 1 + T, ...]`; group 0 begins with `before` `[B, ...]`."""
    first = torch.zeros_like(values[:, 0]) if before is None else before
    sums = torch.cat([first[:, None], torch.zeros_like(values)], dim=1)
    return sums.scatter_add(1, trailing(number, values).expand_as(values), values)


def _of_group(sums: Tensor, number: Tensor) -> Tensor:
    """Read `[B, G, ...]` at the groups `[B, T]`."""
    index = trailing(number, sums).expand(*number.shape, *sums.shape[2:])
    return sums.gather(1, index)
