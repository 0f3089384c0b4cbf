"""How the checks add gradients of micro-batches."""

import torch

from hybridlm.testing.base import add_gradients


def test_a_gradient_that_only_one_piece_has_stays_in_the_sum():
    one = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert add_gradients(add_gradients({}, one), {"a": torch.tensor(3.0)}) == {"a": 4.0, "b": 2.0}
