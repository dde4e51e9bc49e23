"""A canvas for tiles and words, and a header whose words never overlap; x and y in pixels.

Pillow and matplotlib, whose fonts are used, are imported where they are needed: training alone
needs neither.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_WIDTH = 1600        # of a picture, where its parts can be put below each other

# Sizes in pixels
GAP = 10                # between pictures
TEXT_SIZE = 13
LINE_H = 22             # of a header
CAPTION_H = 20          # line above a picture
ITEM_GAP = 20           # between the items of a header
SWATCH = 13             # side of the square before an item

# Colours of what is no token
Colour = tuple[int, int, int]
NAVY = (22, 36, 72)
TEXT = (235, 235, 235)
BORDER = (120, 132, 160)        # around tiles


@functools.cache
def font(size: int, is_mono: bool = False):
    """DejaVu, which comes with matplotlib and has most alphabets."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    name = "DejaVuSansMono.ttf" if is_mono else "DejaVuSans.ttf"
    return ImageFont.truetype(folder / name, size)


def text_width(words: str, face=None) -> int:
    """face: a font(), of which that of headers is the default"""
    return int(np.ceil((face or font(TEXT_SIZE)).getlength(words)))


def shortened(words: str, width: int, face=None, dots: str = "...") -> str:
    """The words, or as many of their letters as fit before the dots; "" where none does."""
    if text_width(words, face) <= width:
        return words
    for n in range(len(words) - 1, 0, -1):
        shown = words[:n].rstrip() + dots
        if text_width(shown, face) <= width:
            return shown
    return ""


class Canvas:
    """An RGB picture on which tiles are pasted and words are written."""

    def __init__(self, width: int, height: int, background: Colour = NAVY):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), background)
        self.draw = ImageDraw.Draw(self.image)

    def paste(self, tile: np.ndarray, x: int, y: int) -> None:
        """tile (H, W, 3) uint8"""
        from PIL import Image

        self.image.paste(Image.fromarray(tile), (x, y))

    def paste_framed(self, tile: np.ndarray, x: int, y: int) -> None:
        """A tile within a border of one pixel, which lies outside of it."""
        height, width = tile.shape[:2]
        self.draw.rectangle((x - 1, y - 1, x + width, y + height), outline=BORDER)
        self.paste(tile, x, y)

    def text(self, words: str, x: float, y: float, anchor: str = "la") -> None:
        """anchor: Pillow's, horizontal and vertical"""
        self.draw.text((x, y), words, font=font(TEXT_SIZE), anchor=anchor, fill=TEXT)

    def title(self, words: str, x: float, y: float, width: int, anchor: str = "la") -> None:
        """Text that is cut short where it is wider than its picture."""
        self.text(shortened(words, width), x, y, anchor)

    def array(self) -> np.ndarray:
        return np.asarray(self.image)


# Headers


class Item(NamedTuple):
    """Words in a header, behind a sample of the colour that they explain, if any."""
    words: str
    swatch: np.ndarray | None = None    # (SWATCH, W, 3) uint8
    longest: str = ""                   # place is kept for these words, which a video comes to

    @property
    def words_x(self) -> int:
        """Where the words begin, behind the swatch."""
        return 0 if self.swatch is None else self.swatch.shape[1] + 6

    @property
    def width(self) -> int:
        return self.words_x + max(text_width(self.words), text_width(self.longest))


def filled(colour: Colour) -> np.ndarray:
    """A square of one colour."""
    return np.full((SWATCH, SWATCH, 3), colour, np.uint8)


def framed(colour: Colour, background: Colour) -> np.ndarray:
    """A square with a frame of one colour."""
    square = filled(colour)
    square[2:-2, 2:-2] = background
    return square


def place_items(
    lines: Sequence[Sequence[Item]], width: int
) -> tuple[list[tuple[Item, int, int]], int]:
    """Items from left to right; a line that is full goes on below.

    ->  [(item, x, y)], height
    """
    placed = []
    y = GAP // 2
    for items in lines:
        x = GAP
        for item in items:
            is_full = x + item.width > width - GAP
            if is_full and x > GAP:
                x = GAP
                y += LINE_H
            placed.append((item, x, y))
            x += item.width + ITEM_GAP
        y += LINE_H if items else 0
    return placed, y + GAP // 2


def canvas_below_header(
    lines: Sequence[Sequence[Item]], width: int, height: int, background: Colour = NAVY
) -> tuple[Canvas, int]:
    """A canvas for a body of this size below a header; wider where an item is wider.

    ->  canvas, y where the body begins
    """
    widest = max((item.width for items in lines for item in items), default=0)
    width = max(width, widest + 2 * GAP)
    placed, header_h = place_items(lines, width)
    canvas = Canvas(width, header_h + height, background)
    for item, x, y in placed:
        middle = y + LINE_H // 2
        if item.swatch is not None:
            canvas.paste(item.swatch, x, middle - SWATCH // 2)
        canvas.text(item.words, x + item.words_x, middle, "lm")
    return canvas, header_h
