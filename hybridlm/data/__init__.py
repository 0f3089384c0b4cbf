"""Documents, tokenizers and packed rows."""

from .documents import Documents, load_documents
from .packing import Framer, PackedRows, PackedStream, PackingCounts, pack_documents, row_fields
from .tokenizer import build_byte_tokenizer, load_tokenizer

__all__ = [
    "Documents",
    "Framer",
    "PackedRows",
    "PackedStream",
    "PackingCounts",
    "build_byte_tokenizer",
    "load_documents",
    "load_tokenizer",
    "pack_documents",
    "row_fields",
]
