"""meta.json: what it holds, and the files that travel with it."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from formats.messages import shown

SOURCES = Path(__file__).parent.parent / "sources"
MAX_IDS = 2**31             # of a vocabulary, and classes
MAX_TOKENS = 2**24          # of a sequence
MAX_AXES = 8                # of its grid
META_TYPES = {
    "name": str,
    "vocab": int,
    "grid": list,
    "n_classes": int,
    "class_names": list,
    "palette": (str, list),
    "given": list,
}
META_DEFAULTS = {"n_classes": 0, "class_names": [], "given": []}
KEPT = ("decoder", "tokenizer")     # files that travel with the tokens, by their key in meta.json


def source_names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))


def require_file(path: Path) -> None:
    """Refuse what is missing, and what opening would wait for, as a pipe."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path} cannot be read: it is missing or not a file")


def read_meta(folder: Path) -> dict:
    """Read and check a folder's meta.json."""
    path = folder / "meta.json"
    require_file(path)
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if isinstance(meta, dict):
        meta = META_DEFAULTS | meta
    message = meta_error(meta)
    if message:
        raise SystemExit(f"{path}: {message}")
    return meta


def meta_error(meta: object) -> str:
    """The first thing that is wrong with a meta.json, "" if nothing is."""
    for key, kind in META_TYPES.items():
        if not isinstance(meta, dict) or not has_type(meta.get(key), kind):
            return f"{key} is missing or of the wrong type"
    return size_error(meta) or display_error(meta) or score_error(meta) or kept_error(meta)


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance(), but True is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def size_error(meta: dict) -> str:
    """What is wrong with the vocabulary, the grid, the classes or the known tokens."""
    vocab = meta["vocab"]
    grid = meta["grid"]
    n_classes = meta["n_classes"]
    if vocab < 2 or n_classes < 0 or len(meta["class_names"]) != n_classes:
        return "vocab must be at least 2, and class_names must name n_classes classes"
    if vocab >= MAX_IDS or n_classes >= MAX_IDS:
        return f"vocab and n_classes must be less than {MAX_IDS}"
    if not is_grid(grid):
        return f"grid {shown(grid)} is not a list of sizes that hold at least two tokens"
    if math.prod(grid) > MAX_TOKENS or len(grid) > MAX_AXES:
        return f"grid {shown(grid)} holds more than {MAX_TOKENS} tokens, or has too many axes"
    for entry in meta["given"]:
        if not is_index(entry, vocab) and not is_position(entry, grid):
            return (f"given {shown(entry)} is neither an id below {vocab} "
                    "nor a position on the grid")
    return ""


def display_error(meta: dict) -> str:
    """What is wrong with the colours or the words."""
    palette = meta["palette"]
    if isinstance(palette, list) and not is_palette(palette, meta["vocab"]):
        return f"palette must name a colour (r, g, b), 0 to 255, for each of {meta['vocab']} tokens"
    if palette == "text" and meta["vocab"] > 256 and "tokenizer" not in meta:
        return (f"palette text is for bytes; a vocabulary of {meta['vocab']} needs a tokenizer "
                "beside it")
    if not all(isinstance(name, str) for name in meta["class_names"]):
        return "class_names must be words"
    for key in ("name", "palette"):
        if isinstance(meta[key], str) and leaves_folder(meta[key]):
            return f"{key} {shown(meta[key])} leaves the folder"
    return ""


def score_error(meta: dict) -> str:
    """What is wrong with the source that judges samples."""
    score = meta.get("score", "")
    is_certain = meta.get("is_certain", False)
    if not isinstance(score, str) or (score and score not in source_names()):
        return f"score {shown(score)} names no file in sources/"
    if not isinstance(is_certain, bool) or (is_certain and not score):
        return f"is_certain is {shown(is_certain)}; it must be true or false, and needs a score"
    return ""


def kept_error(meta: dict) -> str:
    """What is wrong with the entries of decoder and tokenizer, which are optional."""
    for key in KEPT:
        if key in meta and (message := file_error(meta[key])):
            return f"{key} {message}"
    return ""


def file_error(entry: object) -> str:
    """What is wrong with the name and the digest of a file."""
    if not isinstance(entry, dict) or entry.keys() != {"file", "sha256"}:
        return f"{shown(entry)} is not a file and its sha256"
    name = entry["file"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        return f"{shown(name)} is not a plain file name"
    if not isinstance(entry["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        return f"has the sha256 {shown(entry['sha256'])}, not 64 hex digits"
    return ""


def is_index(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def is_grid(grid: list) -> bool:
    """Is this a list of positive sizes with at least two tokens in all?"""
    if not grid or not all(type(size) is int and size > 0 for size in grid):
        return False
    return math.prod(grid) >= 2


def is_position(entry: object, grid: list[int]) -> bool:
    """Is this one index per axis of the grid?"""
    if not isinstance(entry, list) or len(entry) != len(grid):
        return False
    return all(map(is_index, entry, grid))


def is_palette(colours: list, vocab: int) -> bool:
    """Is this one colour for each token?"""
    return len(colours) == vocab and all(map(is_colour, colours))


def is_colour(colour: object) -> bool:
    """Is this [r, g, b], each from 0 to 255?"""
    if not isinstance(colour, list) or len(colour) != 3:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 255 for value in colour)


def leaves_folder(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


# Files that travel with the tokens


def kept_file(folder: Path, meta: dict, key: str) -> Path | None:
    """The decoder or tokenizer kept in a folder of data or of a run, refused if it has changed."""
    if key not in meta:
        return None
    path = folder / meta[key]["file"]
    require_file(path)
    if file_sha256(path) != meta[key]["sha256"]:
        raise SystemExit(f"{path} has changed: its sha256 is not that of meta.json")
    return path


def copy_kept_files(source: Path, folder: Path, meta: dict) -> None:
    """Copy decoder and tokenizer from one folder to another, unless they are there."""
    for key in KEPT:
        path = kept_file(source, meta, key)
        if path is None:
            continue
        target = folder / path.name
        if target.is_file() and file_sha256(target) == meta[key]["sha256"]:
            continue
        scratch = folder / f".{path.name}.tmp"
        shutil.copyfile(path, scratch)
        scratch.replace(target)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
