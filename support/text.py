"""Tokens as text and text as tokens: bytes, or what the tokenizer kept with the data says."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats import meta_file
from sources import _tokenizer

GAP = "[...]"               # in a prompt, where text is filled in


def is_text(meta: dict[str, Any]) -> bool:
    return meta["palette"] == "text"


class Text(NamedTuple):
    """The two ways between text and tokens."""
    tokenizer: Any = None   # of the tokenizers library; None: a token is a byte

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a prompt that was not typed in UTF-8."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise ValueError("--prompt is not UTF-8 text") from None
        if self.tokenizer is None:
            return list(raw)
        return _tokenizer.encode(self.tokenizer, [text])

    def to_bytes(self, tokens: np.ndarray) -> bytes:
        """One sequence (N,)."""
        if self.tokenizer is None:
            return tokens.astype(np.uint8).tobytes()
        return _tokenizer.decode(self.tokenizer, tokens.tolist()).encode()

    def to_str(self, tokens: np.ndarray) -> str:
        """One sequence (N,); what is cut in the middle of a character is shown as U+FFFD."""
        return self.to_bytes(tokens).decode(errors="replace")

    def word(self, token: int) -> str:
        """What a token shows of itself, alone."""
        return self.to_str(np.array([token]))


def load_text(folder: Path, meta: dict[str, Any]) -> Text:
    """The text of a folder of data or of a run."""
    path = meta_file.kept_file(folder, meta, "tokenizer")
    return Text(_tokenizer.load(path) if path else None)


# Prompts


def place_prompt(prompt: str, gap: int, n_tokens: int, text: Text) -> dict[int, list[int]]:
    """Where the tokens of a prompt stand in a sequence: {start: ids}.

    Text stands at the start. Where [...] divides it, the second part follows after `gap` tokens;
    with gap 0 it ends the sequence. Raises ValueError for prompts that do not fit.
    """
    parts = prompt.split(GAP)
    if len(parts) > 2:
        raise ValueError(f"--prompt has {len(parts) - 1} gaps {GAP}; it may have one")
    if gap and len(parts) == 1:
        raise ValueError(f"--gap {gap} is the length of the gap {GAP} in --prompt, which has none")
    placed = [text.encode(part) for part in parts]
    n_known = sum(map(len, placed))
    n_wanted = n_known + max(1, gap)
    if n_known == 0:
        raise ValueError("--prompt holds no text")
    if n_wanted > n_tokens:
        raise ValueError(f"--prompt and what is filled in are at least {n_wanted} tokens; "
                         f"a sequence of this run has {n_tokens}")
    starts = [0, len(placed[0]) + gap if gap else n_tokens - len(placed[-1])]
    return dict(zip(starts, placed, strict=False))
