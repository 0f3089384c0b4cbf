"""In and out of other formats, and onto the Hub."""

from .native import export_native, import_native
from .upcycle import upcycle, upcycle_model

__all__ = ["export_native", "import_native", "upcycle", "upcycle_model"]
