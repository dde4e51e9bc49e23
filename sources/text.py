"""Any text as sequences of bytes or of a tokenizer's tokens: --file F, cut into windows.

python data.py text --file F [--length 128] [--tokenizer bytes | T.json | --train-tokenizer 4096]

The windows of --length tokens do not overlap, and the last tenth of the file is held out. No
classes. The file is read in pieces, so it may be larger than memory.
"""

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sources import _tokenizer

MAKES_ITSELF = False
LENGTH = 128
MIN_SEQUENCES = 20
VAL_SHARE = 0.1
BLOCK = 2**20               # bytes read at a time
MAX_PARAGRAPH = 2**18       # characters
MAX_TRAINING = 2**27        # bytes that --train-tokenizer reads
# a new line after which text begins: no token of a common tokenizer reaches over it
PARAGRAPH = re.compile(r"(?<=\n)(?=\S)")


def folder_name(options) -> str:
    return Path(options.file).stem or "text"


def make(options) -> tuple[dict, Iterator, dict]:
    """Windows of tokens.

    ->  meta, chunks (split, tokens (m, 1, length), labels (m,)), {"tokenizer.json": its bytes}
    """
    path = Path(options.file)
    length = options.length or LENGTH
    if not os.path.isfile(options.file):
        raise SystemExit(f"no file {options.file!r}: name a text with --file F")
    size = path.stat().st_size
    tokenizer = find_tokenizer(path, size, options)
    if size < MIN_SEQUENCES * length:
        raise SystemExit(f"{path}: {size} bytes are too few for sequences of {length}")
    meta = {
        "name": options.name or path.stem,
        "vocab": _tokenizer.vocabulary(tokenizer) if tokenizer else 256,
        "grid": [1, length],
        "n_classes": 0,
        "class_names": [],
        "palette": "text",
        "given": [],
    }
    kept = {"tokenizer.json": _tokenizer.as_json(tokenizer)} if tokenizer else {}
    return meta, split_windows(path, size, tokenizer, length), kept


def find_tokenizer(path: Path, size: int, options):
    """The tokenizer that the options name or that is trained now; None for bytes."""
    if options.train_tokenizer and options.tokenizer:
        raise SystemExit("--tokenizer and --train-tokenizer exclude each other")
    if options.train_tokenizer:
        stop = char_start(path, min(int(size * (1 - VAL_SHARE)), MAX_TRAINING))
        text = (piece for pieces in paragraphs(path, 0, stop) for piece in pieces)
        tokenizer = _tokenizer.train(text, options.train_tokenizer)
        n_ids = _tokenizer.vocabulary(tokenizer)
        if n_ids < options.train_tokenizer:
            print(f"note: {path} gives a vocabulary of {n_ids}, not {options.train_tokenizer}")
        return tokenizer
    if options.tokenizer in ("", "bytes"):
        return None
    tokenizer = _tokenizer.load(options.tokenizer)
    pieces = next(paragraphs(path, 0, size), [])
    if _tokenizer.decode(tokenizer, _tokenizer.encode(tokenizer, pieces)) != "".join(pieces):
        print(f"note: {options.tokenizer} does not keep the text of {path} exactly")
    return tokenizer


def char_start(path: Path, position: int) -> int:
    """The first position from this one on at which a character of UTF-8 begins."""
    with open(path, "rb") as file:
        file.seek(position)
        following = file.read(4)
    is_inside = [byte & 0b1100_0000 == 0b1000_0000 for byte in following]
    return position + [*is_inside, False].index(False)


def split_windows(path: Path, size: int, tokenizer, length: int) -> Iterator[tuple]:
    """yields (split, tokens (m, 1, length), labels (m,))"""
    middle = int(size * (1 - VAL_SHARE))
    if tokenizer:
        middle = char_start(path, middle)
    n_tokens = []               # of each piece that is read
    for split, start, stop in (("train", 0, middle), ("val", middle, size)):
        is_empty = True
        stream = counted(read_tokens(path, start, stop, tokenizer), n_tokens)
        for tokens in windows(stream, length):
            is_empty = False
            yield split, tokens, np.zeros(len(tokens), np.int64)
        if is_empty:
            raise SystemExit(f"{path}: {stop - start} bytes for {split} are too few for sequences "
                             f"of {length}")
    if tokenizer:
        print(f"{path}: {size / sum(n_tokens):.2f} bytes per token")


def counted(stream: Iterable[np.ndarray], lengths: list[int]) -> Iterator[np.ndarray]:
    """The stream itself; the lengths of its pieces are noted."""
    for tokens in stream:
        lengths.append(len(tokens))
        yield tokens


def windows(stream: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cut a stream of tokens into windows and drop the rest.  yields (m, 1, length)"""
    rest = np.empty(0, np.int64)
    for tokens in stream:
        tokens = np.concatenate([rest, tokens])
        n = len(tokens) // length
        if n:
            yield tokens[:n * length].reshape(n, 1, length)
        rest = tokens[n * length:]


def read_tokens(path: Path, start: int, stop: int, tokenizer) -> Iterator[np.ndarray]:
    """The tokens of a part of the file, in pieces.  yields (m,)"""
    if tokenizer is None:
        for block in read_blocks(path, start, stop):
            yield np.frombuffer(block, np.uint8)
        return
    for pieces in paragraphs(path, start, stop):
        yield np.array(_tokenizer.encode(tokenizer, pieces), np.int64)


def read_blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from start to stop, BLOCK at a time."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(BLOCK, stop - start))):
            start += len(block)
            yield block


def paragraphs(path: Path, start: int, stop: int) -> Iterator[list[str]]:
    """The text from start to stop, cut before lines that begin with text; a line of more than
    MAX_PARAGRAPH characters is cut before its last word, if it has words."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    n_read = start
    for block in read_blocks(path, start, stop):
        n_read += len(block)
        rest += decoded(path, decoder, block, n_read == stop)
        *pieces, rest = PARAGRAPH.split(rest)
        if len(rest) > MAX_PARAGRAPH:
            cut = rest.rfind(" ", len(rest) // 2)
            cut = len(rest) if cut < 0 else cut
            pieces.append(rest[:cut])
            rest = rest[cut:]
        if pieces:
            yield pieces
    if rest:
        yield [rest]


def decoded(path: Path, decoder, block: bytes, is_last: bool) -> str:
    try:
        return decoder.decode(block, is_last)
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 text ({error.reason}): "
                         "only --tokenizer bytes takes any file") from None
