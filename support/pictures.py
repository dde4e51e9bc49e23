"""Pictures of token sequences: cells in the data's colours, characters, or a decoder's images."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from support.canvas import (
    BORDER,
    CAPTION_H,
    GAP,
    MAX_WIDTH,
    NAVY,
    Canvas,
    Colour,
    Item,
    canvas_below_header,
    font,
    framed,
    shortened,
    text_width,
)

# Sizes in pixels
TILE = 128              # approximate side of the picture of one sequence
MIN_CELL = 6            # of a token, where there is room: a frame around it leaves it visible
GLYPH_W = 10            # of a character; it is twice as high
MIN_CAPTION_W = 64      # a picture has at least this room for its caption
WORD_W = 80             # of a token of a text's tokenizer
WORD_H = 20
WORD_SIZES = (13, 11, 9)    # of its letters: the largest with which it fits
WORD_MARGIN = 2

LINE_LENGTH = 32        # characters per line of text
WORDS_PER_LINE = 8      # tokens of a text's tokenizer per line
STRIP = 16              # video frames side by side
COLUMNS = 10            # pictures side by side
BLANK = -1              # a cell that holds no token, at the end of a last line that is not full

# Colours
WRITTEN = (255, 140, 0)         # orange: tokens just written
KNOWN = (60, 160, 255)          # blue: tokens that were given
WRONG = (255, 60, 60)           # red: tokens that differ from the solution
MASK = (90, 60, 140)            # purple: the mask token
PAPER = (16, 16, 20)            # behind characters, and where there is no token
INK = (235, 235, 235)
FAINT = (120, 120, 130)         # signs for what is no character
BACKGROUNDS = np.array([NAVY, (14, 62, 52), (72, 24, 56), (70, 58, 20)])
FAR = 40                        # sum over red, green and blue
MASK_HUES = 0.25                # share of the hues that are too close to the mask's

# What a cell of text shows besides a character
MASKED = "mask"
CONTINUED = "continued"         # a further byte of the character before
INVALID = "\ufffd"              # a byte that is part of no character

Decoder = Callable[[torch.Tensor], torch.Tensor]    # tokens (n, *grid) -> (n, 3, H, W) in [-1, 1]


# Colours


def palette(meta: dict) -> np.ndarray:
    """Colour of each token id, then of the mask and of blank cells.  -> (V + 2, 3) uint8"""
    vocab = meta["vocab"]
    kind = meta["palette"]
    if kind == "grey":
        rgb = np.repeat(np.linspace(0, 255, vocab)[:, None], 3, 1)
    elif isinstance(kind, list):
        rgb = np.array(kind)
    else:
        rgb = distinct_colours(vocab) * 255
    return np.concatenate([rgb, [MASK, PAPER]]).round().astype(np.uint8)


def distinct_colours(n: int) -> np.ndarray:
    """A fixed colour for each token id, unlike those of its neighbours and that of the mask.

    ->  (n, 3) in [0, 1]
    """
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    # multiples of an irrational number spread evenly over [0, 1)
    ids = np.arange(n)
    mask_hue = rgb_to_hsv(np.array(MASK) / 255)[0]
    hue = (mask_hue + MASK_HUES / 2 + ids * 0.618034 % 1 * (1 - MASK_HUES)) % 1
    value = 0.55 + 0.4 * (ids * 0.7548777 % 1)
    return hsv_to_rgb(np.stack([hue, np.full(n, 0.65), value], -1))


def background(meta: dict) -> Colour:
    """The first of BACKGROUNDS that is far from the colours of all tokens, or else the farthest."""
    colours = palette(meta).astype(int)
    differences = np.abs(BACKGROUNDS[:, None] - colours).sum(-1)        # (4, V + 2)
    chosen = np.minimum(differences.min(1), FAR).argmax()
    return tuple(BACKGROUNDS[chosen].tolist())


def heat(p: np.ndarray) -> np.ndarray:
    """Colour of a probability, on a fixed scale from 0 to 1; black for nan.  (...) -> (..., 3)
    uint8"""
    import matplotlib

    rgba = matplotlib.colormaps["magma"](np.clip(p, 0, 1))
    return (rgba[..., :3] * 255).astype(np.uint8)


# Cells: the tokens of any grid in two dimensions


def as_rows_and_columns(y: np.ndarray) -> np.ndarray:
    """Wrap a line into lines of LINE_LENGTH, place video frames side by side in rows of STRIP.

    What is missing in the last row is blank, False or nan.  y (n, *grid)  ->  (n, h, w)
    """
    if y.ndim == 4:
        n, _, height, width = y.shape
        frames = split_rows(y, STRIP)                   # (n, rows, columns, height, width)
        rows, columns = frames.shape[1:3]
        return frames.swapaxes(2, 3).reshape(n, rows * height, columns * width)
    if y.ndim == 2 or y.shape[1] == 1:
        return split_rows(y.reshape(len(y), -1), LINE_LENGTH)
    return y


def split_rows(y: np.ndarray, length: int) -> np.ndarray:
    """(n, L, ...) -> (n, rows, at most length, ...)"""
    n, total = y.shape[:2]
    columns = min(length, total)
    rows = math.ceil(total / columns)
    blank = {"b": False, "f": np.nan}.get(y.dtype.kind, BLANK)
    padding = [(0, 0)] * y.ndim
    padding[1] = (0, rows * columns - total)
    y = np.pad(y, padding, constant_values=blank)
    return y.reshape(n, rows, columns, *y.shape[2:])


def in_lines(y: np.ndarray | None, meta: dict) -> np.ndarray | None:
    """Tokens of a text's tokenizer are words: fewer stand in a line than as_rows_and_columns()
    puts there.  (n, *grid) -> (n, lines, words), other data as they are"""
    if y is None or meta["palette"] != "text" or "tokenizer" not in meta:
        return y
    return split_rows(y.reshape(len(y), -1), WORDS_PER_LINE)


def stretch(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize to shape (H, W).  (h, w, ...) -> (H, W, ...)"""
    height, width = shape
    rows = np.arange(height) * picture.shape[0] // height
    cols = np.arange(width) * picture.shape[1] // width
    return picture[rows][:, cols]


def enlarge(cells: np.ndarray, scale: int) -> np.ndarray:
    """(n, h, w, 3) -> (n, scale * h, scale * w, 3)"""
    return cells.repeat(scale, 1).repeat(scale, 2)


def choose_scale(scale: int, meta: dict, grid: Sequence[int], n_tiles: int = 1) -> int:
    """Pixels per token of pictures, n_tiles of which stand side by side; 0: chosen by their size.

    Refuses a scale at which they are wider than MAX_WIDTH
    """
    empty = np.zeros((1, *grid), bool)
    rows, columns = as_rows_and_columns(empty).shape[1:]
    largest = max(1, (MAX_WIDTH // n_tiles - 2 * GAP) // columns)
    if scale > largest:
        side_by_side = f", {n_tiles} side by side," if n_tiles > 1 else ""
        raise SystemExit(
            f"--scale {scale}: pictures of {rows} x {columns} tokens{side_by_side} would be wider "
            f"than {MAX_WIDTH} pixels; at most --scale {largest} fits"
        )
    if scale:
        return scale
    if meta["palette"] == "text":
        return min(largest, GLYPH_W)
    is_video = len(grid) == 3
    side = 4 * TILE if is_video else TILE
    return min(largest, max(MIN_CELL, round(side / max(rows, columns))))


def pictures(
    tokens: np.ndarray,
    meta: dict,
    decoder: Decoder | None = None,
    scale: int = 0,
    n_tiles: int = 1,
) -> np.ndarray:
    """One picture per sequence: characters, cells in the data's palette, or a decoded image.

    tokens (n, *grid), scale as of choose_scale  ->  (n, H, W, 3) uint8
    """
    chosen = choose_scale(scale, meta, tokens.shape[1:], n_tiles)
    tokens = np.asarray(tokens, np.int64)       # a narrower type may not hold BLANK
    cells = as_rows_and_columns(tokens)
    if decoder is not None:
        images = decoded_pictures(tokens, meta, decoder)
        if scale:
            return enlarge_to(images, cells.shape[2] * scale)
        return fit_images(images, n_tiles)
    if meta["palette"] == "text":
        return text_pictures(cells, meta["vocab"], chosen)
    drawn = enlarge(palette(meta)[cells], chosen)
    if tokens.ndim == 4:
        separate_frames(drawn, chosen * tokens.shape[2], chosen * tokens.shape[3])
    return drawn


def separate_frames(drawn: np.ndarray, height: int, width: int) -> None:
    """Draw, in place, lines between video frames of this size.  drawn (n, H, W, 3)"""
    drawn[:, height::height] = BORDER
    drawn[:, :, width::width] = BORDER


# Bytes as characters


def characters(row: np.ndarray, mask: int) -> list[str]:
    """What each cell of a text shows: bytes of UTF-8, the id of the mask, blanks.  (N,) -> N

    A character of several bytes stands in the cell of its first.
    """
    shown = []
    while len(shown) < len(row):
        i = len(shown)
        token = int(row[i])
        if token == mask:
            shown.append(MASKED)
        elif token == BLANK:
            shown.append(" ")
        else:
            n_bytes = bytes_of_character(token)
            following = row[i:i + n_bytes]
            character = decode(following) if mask not in following else INVALID
            n_bytes = 1 if character == INVALID else n_bytes
            shown += [character] + [CONTINUED] * (n_bytes - 1)
    return shown


def bytes_of_character(first: int) -> int:
    """Length in bytes of the UTF-8 character that begins with this byte."""
    return 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)


def decode(row: np.ndarray) -> str:
    """The one character of these bytes, or INVALID."""
    if BLANK in row:
        return INVALID
    try:
        return row.astype(np.uint8).tobytes().decode()
    except UnicodeDecodeError:
        return INVALID


@functools.lru_cache(maxsize=10_000)
def glyph(character: str, width: int) -> np.ndarray:
    """The picture of a cell of text.  -> (2 * width, width, 3) uint8"""
    height = 2 * width
    right = width - 1
    middle = width // 2
    canvas = Canvas(width, height, PAPER)
    if character == MASKED:
        canvas.draw.rectangle((0, 1, right, height - 2), fill=MASK)
    elif character == CONTINUED:
        canvas.draw.line((0, height - 3, right, height - 3), fill=FAINT)
    elif character == "\n":
        corner = (middle // 2, width, right - middle // 2, width, right - middle // 2, middle)
        canvas.draw.line(corner, fill=FAINT)
    elif not character.isprintable():
        canvas.draw.rectangle((width // 4, middle, right - width // 4, height - middle),
                              outline=FAINT)
    else:
        face = font(round(width / 0.602), is_mono=True)     # its letters are .602 em wide
        colour = FAINT if character == INVALID else INK
        canvas.draw.text((width / 2, width), character, font=face, anchor="mm", fill=colour)
    return canvas.array()


def text_pictures(cells: np.ndarray, mask: int, scale: int) -> np.ndarray:
    """Bytes as characters.  cells (n, h, w) -> (n, h * 2 * scale, w * scale, 3) uint8"""
    n, h, w = cells.shape
    texts = [characters(row, mask) for row in cells.reshape(n, -1)]
    drawn = np.stack([[glyph(character, scale) for character in text] for text in texts])
    return joined(drawn.reshape(n, h, w, 2 * scale, scale, 3))


def joined(cells: np.ndarray) -> np.ndarray:
    """Put the pictures of cells together.  (n, h, w, H, W, 3) -> (n, h * H, w * W, 3)"""
    n, h, w, cell_h, cell_w, _ = cells.shape
    return cells.swapaxes(2, 3).reshape(n, h * cell_h, w * cell_w, 3)


def word_decoder(word: Callable[[int], str]) -> Decoder:
    """Draws each token's text in a cell of its own, for tokens (n, lines, words)."""

    def decode(tokens):
        ids, index = np.unique(tokens.numpy(), return_inverse=True)
        drawn = [word_picture("" if token == BLANK else word(int(token))) for token in ids]
        pixels = joined(np.stack(drawn)[index.reshape(tokens.shape)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1

    return decode


def word_picture(word: str) -> np.ndarray:
    """A word, in smaller letters if it is long, or as many as fit before an ellipsis.

    ->  (WORD_H, WORD_W, 3) uint8
    """
    canvas = Canvas(WORD_W, WORD_H, PAPER)
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in word)
    colour = FAINT if word.isspace() else INK
    room = WORD_W - 2 * WORD_MARGIN
    faces = [font(size, is_mono=True) for size in WORD_SIZES]
    face = next((face for face in faces if text_width(shown, face) <= room), faces[-1])
    shown = shortened(shown, room, face, "\u2026")
    canvas.draw.text((WORD_MARGIN, WORD_H // 2), shown, font=face, anchor="lm", fill=colour)
    return canvas.array()


# Images of a decoder


def load_decoder(path: str, meta: dict, device: torch.device | str) -> Decoder:
    """Load the TorchScript decoder of an image tokenizer and try it on one sequence."""
    try:
        decoder = torch.jit.load(path, map_location=device)
        out = decoder(torch.zeros(1, *meta["grid"], dtype=torch.long, device=device))
    except Exception as error:                      # TorchScript raises many types
        shape = ", ".join(map(str, meta["grid"]))
        reason = str(error).strip().splitlines()[0]
        message = f"{path} cannot decode tokens of shape (n, {shape}): {reason}"
        raise SystemExit(message) from None
    if out.dim() != 4 or out.shape[1] != 3:
        raise SystemExit(f"{path} decodes to {tuple(out.shape)}, not to images (n, 3, H, W)")
    return lambda tokens: decoder(tokens.to(device).long())


@torch.no_grad()
def decoded_pictures(tokens: np.ndarray, meta: dict, decoder: Decoder) -> np.ndarray:
    """Images from a decoder, with masked cells painted over.  (n, *grid) -> (n, H, W, 3) uint8"""
    vocab = meta["vocab"]
    no_masks = np.minimum(tokens, vocab - 1)        # the decoder has no mask token
    images = decoder(torch.as_tensor(no_masks)).float().clamp(-1, 1)
    pixels = (images.permute(0, 2, 3, 1) + 1) * 127.5
    out = pixels.round().to(torch.uint8).cpu().numpy().copy()
    is_mask = as_rows_and_columns(tokens) == vocab
    for picture, cells in zip(out, is_mask, strict=True):
        picture[stretch(cells, picture.shape[:2])] = MASK
    return out


def enlarge_to(images: np.ndarray, width: int) -> np.ndarray:
    """Images (n, H, W, 3), enlarged by a whole number to a width."""
    own_width = images.shape[2]
    if width % own_width:
        raise SystemExit(
            f"--scale makes pictures {width} pixels wide, which is no whole multiple of the "
            f"{own_width} that the decoder gives"
        )
    return enlarge(images, width // own_width)


def fit_images(images: np.ndarray, n_tiles: int) -> np.ndarray:
    """Images (n, H, W, 3), enlarged by a whole number to about TILE, or reduced by one where
    n_tiles of them are too wide."""
    from PIL import Image

    height, width = images.shape[1:3]
    largest = MAX_WIDTH // n_tiles - 2 * GAP
    if width > largest:
        divisor = math.ceil(width / largest)
        reduced = [np.asarray(Image.fromarray(image).reduce(divisor)) for image in images]
        return np.stack(reduced)
    return enlarge(images, max(1, TILE // max(height, width)))


# Marks on pictures


def frame_cells(tiles: np.ndarray, where: np.ndarray | None, colour: Colour) -> None:
    """Frame, in place, each True cell.  tiles (n, H, W, 3), where (n, *grid) bool"""
    if where is None:
        return
    height, width = tiles.shape[1:3]
    for tile, cells in zip(tiles, as_rows_and_columns(where), strict=True):
        h, w = cells.shape
        line = line_width(tile, cells)
        for row, col in np.argwhere(cells):
            rows = slice(round(row * height / h), round((row + 1) * height / h))
            cols = slice(round(col * width / w), round((col + 1) * width / w))
            add_border(tile[rows, cols], line, colour)


def outline_region(tiles: np.ndarray, where: np.ndarray | None, colour: Colour) -> None:
    """One line, in place, along the edge of the True cells.  tiles (n, H, W, 3), where (n, *grid)
    bool"""
    if where is None:
        return
    for tile, cells in zip(tiles, as_rows_and_columns(where), strict=True):
        reach = line_width(tile, cells)
        inside = stretch(cells, tile.shape[:2])
        tile[inside & ~eroded(inside, reach)] = colour


def eroded(inside: np.ndarray, reach: int) -> np.ndarray:
    """The pixels that are further than `reach` from all that is not inside.  (H, W) bool"""
    padded = np.pad(inside, reach)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
        padded = windows.all(-1)
    return padded


def line_width(tile: np.ndarray, cells: np.ndarray) -> int:
    """An eighth of a cell.  tile (H, W, 3), cells (h, w)"""
    height = tile.shape[0] / cells.shape[0]
    width = tile.shape[1] / cells.shape[1]
    return max(1, round(min(height, width) / 8))


def add_border(picture: np.ndarray, line: int, colour: Colour) -> None:
    """Paint the outermost `line` pixels of a picture (H, W, 3), in place."""
    picture[:line] = colour
    picture[-line:] = colour
    picture[:, :line] = colour
    picture[:, -line:] = colour


# Picture files


def label_name(label: int, meta: dict) -> str:
    if not meta["n_classes"]:
        return ""
    if label >= meta["n_classes"]:
        return "no label"
    return "".join(char if char.isprintable() else " " for char in meta["class_names"][label])


def title_items(title: Sequence[str]) -> list[Item]:
    return [Item(words) for words in title]


def samples_png(
    path: str | Path,
    tokens: np.ndarray,
    labels: Sequence[int],
    meta: dict,
    title: Sequence[str] = (),
    decoder: Decoder | None = None,
    wrong: np.ndarray | None = None,
    scale: int = 0,
    known: np.ndarray | None = None,
) -> None:
    """Write a labelled grid of finished sequences, with wrong cells framed in red and the region
    that was known outlined in blue.

    tokens (n, *grid), labels (n,), wrong and known (n, *grid) bool
    """
    tiles = pictures(in_lines(tokens, meta), meta, decoder, scale)
    outline_region(tiles, in_lines(known, meta), KNOWN)
    frame_cells(tiles, in_lines(wrong, meta), WRONG)
    captions = [label_name(label, meta) for label in labels]
    captioned = list(zip(captions, tiles, strict=True))
    columns = columns_of(tiles)
    rows = [captioned[i:i + columns] for i in range(0, len(tiles), columns)]
    colour = background(meta)
    items = title_items(title)
    if known is not None:
        items.append(Item("known", framed(KNOWN, colour)))
    write_grid(path, rows, items, colour)


def pairs_png(
    path: str | Path,
    pairs: np.ndarray,
    captions: Sequence[tuple[str, str]],
    meta: dict,
    title: Sequence[str] = (),
    decoder: Decoder | None = None,
) -> None:
    """Write pairs of pictures side by side, one above the other, each under its caption.

    pairs (n, 2, *grid), captions n pairs of texts
    """
    n = len(pairs)
    tiles = pictures(pairs.reshape(2 * n, *pairs.shape[2:]), meta, decoder)     # (2n, H, W, 3)
    words = [caption for pair in captions for caption in pair]
    captioned = list(zip(words, tiles, strict=True))
    columns = columns_of(tiles[::2])
    rows = []
    for i in range(0, 2 * n, 2 * columns):
        chosen = captioned[i:i + 2 * columns]
        rows += [chosen[0::2], chosen[1::2]]
    write_grid(path, rows, title_items(title), background(meta))


def columns_of(tiles: np.ndarray) -> int:
    """How many of these pictures (n, H, W, 3) stand side by side: rows are filled evenly."""
    slot_w = max(tiles.shape[2], MIN_CAPTION_W) + GAP
    most = max(1, min(COLUMNS, (MAX_WIDTH - GAP) // slot_w))
    n_rows = math.ceil(len(tiles) / most)
    return math.ceil(len(tiles) / n_rows)


def write_grid(
    path: str | Path,
    rows: Sequence[Sequence[tuple[str, np.ndarray]]],
    title: Sequence[Item] = (),
    colour: Colour = NAVY,
) -> None:
    """Write rows of captions and pictures (H, W, 3), all of one size, below a title."""
    height, width = rows[0][0][1].shape[:2]
    slot_w = max(width, MIN_CAPTION_W)
    has_captions = any(words for row in rows for words, _ in row)
    caption_h = CAPTION_H if has_captions else 0
    cell_h = caption_h + height + GAP
    body_w = GAP + len(rows[0]) * (slot_w + GAP)
    canvas, body_y = canvas_below_header([title], body_w, len(rows) * cell_h, colour)
    for i, row in enumerate(rows):
        y = body_y + i * cell_h
        for j, (words, tile) in enumerate(row):
            x = GAP + j * (slot_w + GAP)
            canvas.title(words, x + slot_w // 2, y, slot_w, "ma")
            canvas.paste_framed(tile, x + (slot_w - width) // 2, y + caption_h)
    canvas.image.save(path)
