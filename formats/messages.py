"""What is printed in one line: values in messages, the nearest of some words, pipes that close."""

import difflib
import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_SHOWN = 100             # characters of a value in a message


def shown(value: Any) -> str:
    """A value in a message: on one line, cut short where it is long."""
    return " ".join(reprlib.repr(value).split())[:MAX_SHOWN]


def nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0)
    return f"did you mean {close[0]}?" if close else ""


def is_plain(text: str) -> bool:
    """Is this one line of characters that a file can be named by?"""
    return not any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in text)


@contextmanager
def may_stop_reading() -> Iterator[None]:
    """For what is printed into a pipe such as `| head`, which may close before the end."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # flushed at exit
        raise SystemExit(0) from None
