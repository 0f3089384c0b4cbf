"""Titans' memory as layer (MAL): a memory, and behind it attention over a sliding window.

    m = M(x),  y = Attention([P ; norm(x + m)]),  o = m + y

Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, section 4.3.
Differs: between the two lie a residual and a norm, as between any two layers, which the paper leaves out of its
formulas; the memory does not see the persistent tokens P, which are keys and values of the attention (see
`attention_branch.py`); see also `memory.py` and `memory_gates.py`.
"""

from collections.abc import Callable

from torch import Tensor

from .norms import RMSNorm
from .titans import MemoryAndWindow


class TitansMALMixer(MemoryAndWindow):
    __doc__ = MemoryAndWindow.__doc__

    def build_joint(self, norm_eps: float) -> None:
        """Build the norm between the memory and the attention."""
        self.norm = RMSNorm(self.hidden_size, eps=norm_eps)

    def join(
        self, hidden_states: Tensor, attend: Callable[[Tensor], Tensor], remember: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Let attention read what the memory has made of the tokens."""
        remembered = remember(hidden_states)
        return remembered + attend(self.norm(hidden_states + remembered))
