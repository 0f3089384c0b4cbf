"""What a memory is trained for at test time: objectives by name, each with its slope in closed form.

An objective compares a prediction with a value, both `[..., V]`, and is a sum over V.

Reference: Behrouz et al. 2025, "It's All Connected" (MIRAS), arXiv:2504.13173, section 5; Titans' is `l2`.
Differs: `lp` is smooth at 0 by a root of the square plus a constant (nothing for p = 2), where the paper uses tanh;
`huber` has a fixed threshold in each element.
"""

import torch
from torch import Tensor

OBJECTIVES = ("l2", "lp", "huber", "kl", "dot")
_SMOOTH = 1e-6


def objective(name: str, prediction: Tensor, value: Tensor, p: float = 3.0, threshold: float = 1.0) -> Tensor:
    """The loss of one association, `[...]`; `slope` is its derivative, and the tests hold them together.

    Args:
        name: `l2` squared error, `lp` its p-th power, `huber` squared up to a threshold and linear beyond it, `kl`
            divergence of softmax(prediction) from softmax(value), `dot` the negative inner product, twice (so that a
            linear memory that forgets nothing is linear attention).
        prediction: `[..., V]`.
        value: `[..., V]`.
        p: Exponent of `lp`.
        threshold: Of `huber`; of `kl` the temperature.
    """
    error = prediction - value
    if name == "l2":
        return error.square().sum(-1)
    if name == "lp":
        return _root(error, p).pow(p / 2).sum(-1)
    if name == "huber":
        size = error.abs()
        return torch.where(size <= threshold, error.square(), threshold * (2 * size - threshold)).sum(-1)
    if name == "kl":
        target, log_given = (value / threshold).softmax(-1), (prediction / threshold).log_softmax(-1)
        return (target * (target.log() - log_given)).sum(-1)
    return -2 * (prediction * value).sum(-1)


def slope(name: str, prediction: Tensor, value: Tensor, p: float = 3.0, threshold: float = 1.0) -> Tensor:
    """The derivative of `objective` by the prediction, `[..., V]`."""
    error = prediction - value
    if name == "l2":
        return 2 * error
    if name == "lp":
        return p * error * _root(error, p).pow(p / 2 - 1)
    if name == "huber":
        return 2 * error.clamp(-threshold, threshold)
    if name == "kl":
        return ((prediction / threshold).softmax(-1) - (value / threshold).softmax(-1)) / threshold
    return -2 * value


def _root(error: Tensor, p: float) -> Tensor:
    return error.square() if p == 2 else error.square() + _SMOOTH
