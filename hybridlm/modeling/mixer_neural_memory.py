"""The neural memory of Titans as a mixer of its own (LMM); what it does is in `neural_memory.py`.

Reference: Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time", arXiv:2501.00663, sections 3 and 4.4.
Differs: see `memory.py` and `memory_gates.py`.
"""

from .neural_memory import NeuralMemory


class NeuralMemoryMixer(NeuralMemory):
    __doc__ = NeuralMemory.__doc__
