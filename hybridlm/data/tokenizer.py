"""Tokenizers: any from Hugging Face, or the built-in byte tokenizer that needs no download."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTE_TOKENIZER = "byte"


def byte_alphabet() -> dict[str, int]:
    """The printable character that `tokenizers`' ByteLevel shows each byte as, mapped to that byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose token ids are the bytes of the UTF-8 text.

    258 tokens: 0 to 255 are the bytes, 256 is `<eos>` (also the start of a document), 257 is `<pad>`. Text that holds
    the characters `<eos>` is cut into bytes like any other, so every string comes back as it was.
    """
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<eos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer `name`: `byte`, a folder, or a name on the Hub.

    Raises:
        ValueError: There is no such tokenizer, or it has no end-of-sequence token to put between documents.
    """
    if name == BYTE_TOKENIZER:
        return build_byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        kind = "a folder without a readable tokenizer" if Path(name).is_dir() else "neither a folder nor on the Hub"
        raise ValueError(f"tokenizer: {name!r} is not 'byte', but {kind}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name!r} has no eos_token, which marks where a document ends")
    return tokenizer
