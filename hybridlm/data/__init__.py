"""Documents, tokenizers, packed rows and synthetic recall."""

from .documents import Documents, load_documents
from .packing import Framer, PackedRows, PackedStream, PackingCounts, pack_documents, row_fields
from .recall import RecallRows, RecallVocabulary, key_value_recall, passkey
from .tokenizer import build_byte_tokenizer, load_tokenizer

__all__ = [
    "Documents",
    "Framer",
    "PackedRows",
    "PackedStream",
    "PackingCounts",
    "RecallRows",
    "RecallVocabulary",
    "build_byte_tokenizer",
    "key_value_recall",
    "load_documents",
    "load_tokenizer",
    "pack_documents",
    "passkey",
    "row_fields",
]
