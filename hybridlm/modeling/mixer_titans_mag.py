"""Titans' memory as gate (MAG): a sliding window and a memory side by side, the one multiplied by the other.

    y = Attention([P ; x]),  m = M(x),  o = W (norm(y) * sigmoid(norm(m)))

Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, section 4.2.
Differs: the memory does not see the persistent tokens P, which are keys and values of the attention (see
`attention_branch.py`); the product is projected; see also `memory.py` and `memory_gates.py`.
"""

from collections.abc import Callable

from torch import Tensor

from .titans import GateByMemory, MemoryAndWindow


class TitansMAGMixer(MemoryAndWindow):
    __doc__ = MemoryAndWindow.__doc__

    def build_joint(self, norm_eps: float) -> None:
        """Build the gate."""
        self.gate = GateByMemory(self.hidden_size, norm_eps)

    def join(
        self, hidden_states: Tensor, attend: Callable[[Tensor], Tensor], remember: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Gate what attention says by what the memory says."""
        return self.gate(attend(hidden_states), remember(hidden_states))
