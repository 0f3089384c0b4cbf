"""Steps of a memory that are not sums of gradients: orthogonalised ones, and weights that are made from an accumulator.

Shapes: `[..., in, out]`, one matrix for each row, head and layer.
Reference: Jordan et al. 2024 (Muon), the coefficients of its Newton-Schulz iteration; Behrouz et al. 2025 (Atlas),
arXiv:2505.23735; Behrouz et al. 2025 (MIRAS), arXiv:2504.13173, section 5.
Differs: `lq` and `kl` keep the accumulator as the state and make the weights from it at chunk borders; the elastic net
thresholds what is used and not what is accumulated.
"""

import torch
from torch import Tensor

# name of a retention, and the default of its number: exponent, threshold or scale
RETENTIONS = {"decay": 0.0, "lq": 4.0, "elastic_net": 0.01, "kl": 1.0}

NEWTON_SCHULZ_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1 by five Newton-Schulz steps, differentiable."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-1, -2) if tall else matrix
    x = x * torch.rsqrt(x.square().sum((-1, -2), keepdim=True) + 1e-12)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(-1, -2)
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


def retain(name: str, accumulator: Tensor, number: float) -> Tensor:
    """The weights that an accumulator stands for.

    Args:
        name: `decay`: itself. `lq`: divided by its q-norm to the power q - 2 (q = 2: itself). `elastic_net`: shrunk
            towards 0 by a threshold (0: itself). `kl`: softmax over the inputs of each unit, times a scale.
        accumulator: `[..., in, out]`.
        number: q, the threshold, or the scale.
    """
    if name == "lq":
        norm = (accumulator.square() + 1e-12).pow(number / 2).sum((-1, -2), keepdim=True)
        return accumulator * norm.pow((2 - number) / number)
    if name == "elastic_net":
        return accumulator.sign() * (accumulator.abs() - number).relu()
    if name == "kl":
        return number * accumulator.softmax(-2)
    return accumulator
