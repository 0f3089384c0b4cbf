"""In and out of other formats, and onto the Hub."""

from .native import export_native, import_native

__all__ = ["export_native", "import_native"]
