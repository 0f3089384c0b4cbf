"""The position encodings by name, for every mixer that has an option `position`."""

from torch import nn

from .position_none import NoPosition
from .position_rope import RopePosition

POSITIONS = {"none": NoPosition, "rope": RopePosition}


def build_position(position: dict | None, head_dim: int) -> nn.Module:
    """Build what an option `position` asks for; `None` is no position.

    Raises:
        ValueError: The encoding refused an option; the message starts with `position.`.
    """
    options = {"name": "none"} if position is None else dict(position)
    try:
        return POSITIONS[options.pop("name")](head_dim, **options)
    except ValueError as error:
        raise ValueError(f"position.{error}") from error
