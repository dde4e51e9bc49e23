"""Text tokenizers of the `tokenizers` library, whose JSON files are data and run no code."""

from collections.abc import Iterable
from pathlib import Path

N_BYTES = 256           # every byte is an entry of a byte-level vocabulary


def library():
    """The `tokenizers` package, which only text with a tokenizer needs."""
    try:
        import tokenizers
    except ImportError:
        raise SystemExit(
            "a text tokenizer needs the tokenizers library: pip install tokenizers"
        ) from None
    return tokenizers


def load(path: str | Path):
    """A tokenizer from its JSON file.  ->  tokenizers.Tokenizer"""
    if not Path(path).is_file():
        raise SystemExit(f"no file {str(path)!r}: a tokenizer is a JSON file of the tokenizers "
                         "library")
    try:
        return library().Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises plain Exceptions
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"{path} is no tokenizer of the tokenizers library: {reason}") from None


def train(text: Iterable[str], vocab: int):
    """Byte-level BPE of at most `vocab` entries, all bytes among them: it can write any text.

    text: pieces in order  ->  tokenizers.Tokenizer
    """
    if vocab <= N_BYTES:
        raise SystemExit(f"--train-tokenizer {vocab}: {N_BYTES} entries are the bytes, "
                         "so it must be larger")
    lib = library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def vocabulary(tokenizer) -> int:
    """The number of ids, added tokens included; ids need not be contiguous."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def as_json(tokenizer) -> bytes:
    """The content of its file."""
    return tokenizer.to_str(pretty=True).encode()


def encode(tokenizer, pieces: list[str]) -> list[int]:
    """The ids of pieces of text, one after the other."""
    encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    return [token for piece in encoded for token in piece.ids]


def decode(tokenizer, ids: Iterable[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)
