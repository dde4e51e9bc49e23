"""Pictures and videos of token sequences (PNG, GIF, MP4), composed as uint8 arrays.

Pillow, matplotlib and imageio are imported where they are used: training alone needs none of them.
"""

import colorsys
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

MAX_FRAMES = 240        # longer runs are thinned to about this many frames

# Sizes in pixels
TILE = 128              # approximate side of the picture of one sequence
MIN_CELL = 6            # pixels of a token, so that a frame around it leaves it visible
GAP = 8                 # between pictures
TILE_GAP = 2            # between a state and its map
HEADER_H = 40           # line with the step and the legend
CAPTION_H = 20          # line above a picture
NAME_OVER_MAP = 40      # pixels by which a name may reach over the map
BAR_W = 16              # width of the colour bar
BAR_SPACE = 84          # width of the colour bar and its numbers
NAMES_W = 50            # "made" and "real" on the left of a strip of video frames
GLYPH_W = 10            # one character
GLYPH_H = 20
WORD_W = 64             # one token of a tokenizer
CELL = 5                # one token of a video rollout

LINE_LENGTH = 32        # characters per line of text
WORDS_PER_LINE = 8      # tokens of a tokenizer per line
STRIP = 16              # video frames side by side

# Colours
WRITTEN = (255, 140, 0)         # orange: tokens just written
KNOWN = (60, 160, 255)          # blue: tokens that were given
MASK = (90, 60, 140)            # purple: the mask token
WRONG = (255, 60, 60)           # red: tokens that differ from the solution
BACKGROUND = (24, 24, 28)
TEXT = (235, 235, 235)
UNPRINTABLE = (110, 110, 120)
EMPTY_BAR = (60, 60, 66)

Decoder = Callable[[torch.Tensor], torch.Tensor]    # tokens (n, *grid) -> (n, 3, H, W) in [-1, 1]
Colour = tuple[int, int, int]


def palette(meta: dict) -> np.ndarray:
    """Colour of each token id, with the mask last.  -> (V + 1, 3) uint8"""
    vocab = meta["vocab"]
    kind = meta["palette"]
    if kind == "grey":
        rgb = np.repeat(np.linspace(0, 255, vocab)[:, None], 3, 1)
    elif isinstance(kind, list):
        rgb = np.array(kind)
    else:
        rgb = np.array([distinct_colour(i) for i in range(vocab)]) * 255
    return np.concatenate([rgb, [MASK]]).round().astype(np.uint8)


def distinct_colour(i: int) -> tuple[float, float, float]:
    """A fixed colour for token id i, unlike those of its neighbours.  -> RGB in [0, 1]"""
    # multiples of an irrational number spread evenly over [0, 1)
    hue = i * 0.618034 % 1
    value = 0.55 + 0.4 * (i * 0.7548777 % 1)
    return colorsys.hsv_to_rgb(hue, 0.65, value)


def as_rows_and_columns(y: np.ndarray) -> np.ndarray:
    """Lay out any grid in two dimensions: wrap a line, place video frames side by side.

    y (n, *grid)  ->  (n, h, w)
    """
    if y.ndim == 4:
        frames = list(y.swapaxes(0, 1))
        return np.concatenate(frames, -1)
    if y.ndim == 2 or y.shape[1] == 1:
        return wrapped(y, LINE_LENGTH)
    return y


def wrapped(y: np.ndarray, length: int) -> np.ndarray:
    """Sequences in equal lines, none longer than that.  (n, ...) -> (n, lines, tokens)"""
    widths = [w for w in range(1, length + 1) if y[0].size % w == 0]
    return y.reshape(len(y), -1, max(widths))


def in_lines(y: np.ndarray | None, meta: dict) -> np.ndarray | None:
    """Tokens of a text's tokenizer are words: fewer stand in a line than as_rows_and_columns()
    puts there.  (n, *grid) -> (n, lines, words), other data as they are"""
    if y is None or meta["palette"] != "text" or "tokenizer" not in meta:
        return y
    return wrapped(y, WORDS_PER_LINE)


def glyphs() -> np.ndarray:
    """A picture of each byte, with the mask last.  -> (257, GLYPH_H, GLYPH_W, 3) uint8"""
    return np.stack([glyph(byte) for byte in range(257)])


def glyph(byte: int) -> np.ndarray:
    """The picture of one byte, or of the mask (256).  -> (GLYPH_H, GLYPH_W, 3) uint8"""
    canvas = Canvas(GLYPH_W, GLYPH_H)
    if byte == 256:
        canvas.draw.rectangle((1, 3, GLYPH_W - 2, GLYPH_H - 4), fill=MASK)
    elif byte == ord("\n"):
        corner = (2, 6, GLYPH_W - 3, 6, GLYPH_W - 3, GLYPH_H - 6)
        canvas.draw.line(corner, fill=UNPRINTABLE)
    elif 32 <= byte < 127:
        canvas.text(chr(byte), GLYPH_W // 2, GLYPH_H // 2, 14, "mm")
    else:
        canvas.draw.rectangle((3, 6, GLYPH_W - 4, GLYPH_H - 7), outline=UNPRINTABLE)
    return canvas.array()


def pictures(tokens: np.ndarray, meta: dict, decoder: Decoder | None = None) -> np.ndarray:
    """One picture per sequence: characters, cells in the data's palette, or a decoded image.

    tokens (n, *grid)  ->  (n, H, W, 3) uint8
    """
    if decoder is not None:
        images = decoded_pictures(tokens, meta, decoder)
        scale = max(1, TILE // max(images.shape[1:3]))
        return images.repeat(scale, 1).repeat(scale, 2)
    cells = as_rows_and_columns(tokens)
    if meta["palette"] == "text":
        return text_pictures(cells)
    is_video = tokens.ndim == 4
    side = 4 * TILE if is_video else TILE
    scale = max(MIN_CELL, round(side / max(cells.shape[1:])))
    return palette(meta)[cells].repeat(scale, 1).repeat(scale, 2)


def text_pictures(cells: np.ndarray) -> np.ndarray:
    """Bytes as characters.  cells (n, h, w) -> (n, h * GLYPH_H, w * GLYPH_W, 3) uint8"""
    return joined(glyphs()[cells])


def joined(cells: np.ndarray) -> np.ndarray:
    """Put the pictures of cells together.  (n, h, w, H, W, 3) -> (n, h * H, w * W, 3)"""
    n, h, w, cell_h, cell_w, _ = cells.shape
    lines = cells.transpose(0, 1, 3, 2, 4, 5)       # (n, h, H, w, W, 3)
    return lines.reshape(n, h * cell_h, w * cell_w, 3)


def word_decoder(word: Callable[[int], str]) -> Decoder:
    """Draws each token's text in a cell of its own, for tokens (n, lines, words)."""

    def decode(tokens):
        ids, index = np.unique(tokens.numpy(), return_inverse=True)
        drawn = np.stack([word_picture(word(int(token))) for token in ids])
        pixels = joined(drawn[index.reshape(tokens.shape)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1

    return decode


def word_picture(word: str) -> np.ndarray:
    """The beginning of a word, as much as fits.  -> (GLYPH_H, WORD_W, 3) uint8"""
    canvas = Canvas(WORD_W, GLYPH_H)
    shown = word.replace("\n", "\\n").replace("\t", "\\t")
    colour = UNPRINTABLE if word.isspace() else TEXT
    canvas.text(shown, 2, GLYPH_H // 2, 13, "lm", colour)
    margin = (WORD_W - 4, 0, WORD_W, GLYPH_H)           # between it and the next word
    canvas.draw.rectangle(margin, fill=BACKGROUND)
    return canvas.array()


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
        if cells.any():
            painted = stretch(cells[..., None], picture.shape[:2])[..., 0]
            picture[painted] = MASK
    return out


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


def heat(p: np.ndarray) -> np.ndarray:
    """Colour of a probability, on a fixed scale from 0 to 1.  (...) -> (..., 3) uint8"""
    import matplotlib

    rgba = matplotlib.colormaps["magma"](np.clip(p, 0, 1))
    return (rgba[..., :3] * 255).astype(np.uint8)


def outline(picture: np.ndarray, where: np.ndarray, colour: Colour) -> None:
    """Frame, in place, the cells that are True.  picture (H, W, 3), where (h, w) bool"""
    height = picture.shape[0] / where.shape[0]
    width = picture.shape[1] / where.shape[1]
    line = max(1, round(min(height, width) / 8))
    for row, col in np.argwhere(where):
        top = round(row * height)
        bottom = round((row + 1) * height)
        left = round(col * width)
        right = round((col + 1) * width)
        add_border(picture[top:bottom, left:right], line, colour)


def outline_each(tiles: np.ndarray, where: np.ndarray | None, colour: Colour) -> None:
    """Frame, in place, the True cells of each picture.  tiles (n, H, W, 3), where (n, *grid)"""
    if where is None:
        return
    for tile, cells in zip(tiles, as_rows_and_columns(where), strict=True):
        outline(tile, cells, colour)


def add_border(picture: np.ndarray, line: int, colour: Colour) -> None:
    """Paint the outermost `line` pixels of a picture (H, W, 3), in place."""
    picture[:line] = colour
    picture[-line:] = colour
    picture[:, :line] = colour
    picture[:, -line:] = colour


def stretch(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize to shape (H, W).  (h, w, C) -> (H, W, C)"""
    height, width = shape
    rows = np.arange(height) * picture.shape[0] // height
    cols = np.arange(width) * picture.shape[1] // width
    return picture[rows][:, cols]


class Canvas:
    """An RGB picture on which tiles are pasted and text is written; x and y in pixels."""

    def __init__(self, width: int, height: int):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def paste(self, tile: np.ndarray, x: int, y: int) -> None:
        from PIL import Image

        self.image.paste(Image.fromarray(tile), (x, y))

    def text(
        self,
        words: str,
        x: float,
        y: float,
        size: int = 14,
        anchor: str = "la",     # Pillow's anchors: horizontal, vertical
        colour: Colour = TEXT,
    ) -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size)
        self.draw.text((x, y), words, font=font, anchor=anchor, fill=colour)

    def title(self, words: str, x: float, y: float, width: int, anchor: str = "la") -> None:
        """Text that is cut short where it is wider than its picture."""
        from PIL import ImageFont

        font = ImageFont.load_default(15)
        shown = words
        while words and font.getlength(shown) > width:
            words = words[:-1]
            shown = words + "..."
        self.text(shown, x, y, 15, anchor)

    def legend(self, words: str, x: int, colour: Colour) -> None:
        """A framed square and its meaning, in the header."""
        self.draw.rectangle((x, 14, x + 12, 26), outline=colour, width=2)
        self.text(words, x + 18, 11, 15)

    def array(self) -> np.ndarray:
        return np.asarray(self.image)


def label_name(label: int, meta: dict) -> str:
    if not meta["n_classes"]:
        return ""
    if label >= meta["n_classes"]:
        return "no label"
    return meta["class_names"][label]


def samples_png(
    path: str | Path,
    tokens: np.ndarray,
    labels: Sequence[int],
    meta: dict,
    decoder: Decoder | None = None,
    wrong: np.ndarray | None = None,
) -> None:
    """Write a labelled grid of finished sequences, with wrong cells framed in red.

    tokens (n, *grid), labels (n,), wrong (n, *grid) bool
    """
    tiles = pictures(in_lines(tokens, meta), meta, decoder)
    outline_each(tiles, in_lines(wrong, meta), WRONG)
    n, height, width = tiles.shape[:3]
    max_columns = 10 if width < 200 else 3
    columns = min(n, max_columns)
    rows = math.ceil(n / columns)
    cell_w = width + (4 * GAP if meta["palette"] == "text" else GAP)
    cell_h = height + CAPTION_H + GAP
    canvas = Canvas(GAP + columns * cell_w, GAP + rows * cell_h)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x = GAP + column * cell_w
        y = GAP + row * cell_h
        canvas.title(label_name(labels[i], meta), x + width // 2, y, width, "ma")
        canvas.paste(tile, x, y + CAPTION_H)
    canvas.image.save(path)


def shown_steps(n_steps: int) -> list[int]:
    """Indices of the steps to show: evenly spaced in a long run, and always the last."""
    stride = math.ceil(n_steps / MAX_FRAMES)
    steps = set(range(0, n_steps, stride))
    return sorted(steps | {n_steps - 1})


def draw_progress(canvas: Canvas, step: int, n_steps: int, nfe: np.ndarray, nfe_x: int) -> None:
    """The step and the mean number of network calls so far, in the header."""
    canvas.text(f"step {step + 1} of {n_steps}", GAP, 10, 18)
    canvas.text(f"NFE {nfe.mean():.0f}", nfe_x, 10, 18)


# Videos of a planner: for each sequence its state, its map and, if given, the real sequence


class PlannerLayout(NamedTuple):
    """Sizes and positions in a frame of planner_frames, in pixels."""

    n: int              # sequences
    columns: int        # sequences side by side
    tile_h: int         # height of the picture of a state
    tile_w: int
    has_real: bool      # is the real sequence shown beside the map?

    @property
    def cell_w(self) -> int:
        """Width of the tiles of one sequence and the margin to the next."""
        n_tiles = 3 if self.has_real else 2
        return n_tiles * (self.tile_w + TILE_GAP) + 3 * GAP - TILE_GAP

    @property
    def cell_h(self) -> int:
        return CAPTION_H + self.tile_h + 2 + GAP

    @property
    def grid_h(self) -> int:
        """Height of all rows of sequences."""
        return math.ceil(self.n / self.columns) * self.cell_h

    @property
    def bar_x(self) -> int:
        """Left edge of the colour bar, right of all sequences."""
        return GAP + self.columns * self.cell_w

    @property
    def canvas_size(self) -> tuple[int, int]:
        return self.bar_x + BAR_SPACE, HEADER_H + self.grid_h + 2

    def corner(self, i: int) -> tuple[int, int]:
        """Left and top of sequence i."""
        row, column = divmod(i, self.columns)
        return GAP + column * self.cell_w, HEADER_H + row * self.cell_h


def planner_columns(n: int, is_text: bool, has_real: bool) -> int:
    """Number of sequences side by side; n up to 9 fills its rows as evenly as possible."""
    if n in (3, 6, 9):
        columns = 3
    elif n in (7, 8):
        columns = 4
    else:
        columns = min(n, 5)
    if is_text:
        return min(columns, 2)
    return min(columns, 4) if has_real else columns


def planner_frames(
    states: Sequence[Sequence[np.ndarray]],
    labels: Sequence[int],
    meta: dict,
    decoder: Decoder | None = None,
    known: np.ndarray | None = None,
    real: np.ndarray | None = None,
    wrong: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Video frames of a run: the state of each sequence beside the planner's noise probabilities.

    Tokens just written are framed in orange, known ones in blue and, in the last frame, wrong ones
    in red. The real sequence, if given, is shown on the right.

    states: per step (x, p_noise, written), each (n, *grid), and nfe (n,).  labels (n,),
    known, real and wrong (n, *grid)  ->  yields (H, W, 3) uint8
    """
    n = len(labels)
    is_text = meta["palette"] == "text"
    has_tokens = decoder is not None and not is_text
    third = "real" if real is not None else "tokens" if has_tokens else ""
    columns = planner_columns(n, is_text, bool(third))
    known, real, wrong = (in_lines(y, meta) for y in (known, real, wrong))
    third_tiles = pictures(real, meta, decoder) if real is not None else [None] * n
    for step in shown_steps(len(states)):
        *grids, nfe = states[step]
        x, p_noise, written = (in_lines(y, meta) for y in grids)
        tiles = pictures(x, meta, decoder)
        tile_h, tile_w = tiles.shape[1:3]
        framed = tiles
        if third == "tokens":       # frames would hide the picture
            third_tiles = token_tiles(x, meta, (tile_h, tile_w))
            framed = third_tiles
        outline_each(framed, known, KNOWN)
        outline_each(framed, written, WRITTEN)
        if step == len(states) - 1:
            outline_each(framed, wrong, WRONG)

        layout = PlannerLayout(n, columns, tile_h, tile_w, bool(third))
        canvas = Canvas(*layout.canvas_size)
        draw_progress(canvas, step, len(states), nfe, nfe_x=GAP + 190)
        noise_left = f"expected noise left {p_noise.sum() / n:5.1f} of {x[0].size}"
        canvas.text(noise_left, GAP + 290, 10, 18)
        draw_planner_legend(canvas, layout, known is not None, wrong is not None)
        for i in range(n):
            name = label_name(labels[i], meta)
            draw_sequence(canvas, layout, i, name, tiles[i], p_noise[i], third, third_tiles[i])
        draw_colour_bar(canvas, layout)
        yield canvas.array()


def token_tiles(x: np.ndarray, meta: dict, shape: tuple[int, int]) -> np.ndarray:
    """Tokens in distinct colours, as large as their pictures.  (n, *grid) -> (n, H, W, 3) uint8"""
    cells = palette(meta)[as_rows_and_columns(x)]
    return np.stack([stretch(picture, shape) for picture in cells])


def draw_planner_legend(
    canvas: Canvas, layout: PlannerLayout, has_known: bool, has_wrong: bool
) -> None:
    canvas.legend("just written", layout.bar_x - 156, WRITTEN)
    if has_known:
        canvas.legend("known", layout.bar_x - 36, KNOWN)
    if has_wrong:
        canvas.legend("wrong", layout.bar_x - 36, WRONG)


def draw_sequence(
    canvas: Canvas,
    layout: PlannerLayout,
    i: int,
    name: str,
    tile: np.ndarray,
    p_noise: np.ndarray,
    third: str,
    third_tile: np.ndarray | None,
) -> None:
    """Sequence i with captions: its state, its map, and what else there is.  p_noise (*grid)"""
    left, top = layout.corner(i)
    tile_y = top + CAPTION_H
    map_x = left + layout.tile_w + TILE_GAP
    map_end = map_x + layout.tile_w
    canvas.title(name, left, top, layout.tile_w + NAME_OVER_MAP)
    canvas.text(f"noise {p_noise.sum():.1f}", map_end, top, 15, "ra")
    if third_tile is not None:
        canvas.text(third, map_end + GAP, top, 15)
        canvas.paste(third_tile, map_end + GAP, tile_y)
    cells = heat(as_rows_and_columns(p_noise[None])[0])
    canvas.paste(tile, left, tile_y)
    canvas.paste(stretch(cells, (layout.tile_h, layout.tile_w)), map_x, tile_y)


def draw_colour_bar(canvas: Canvas, layout: PlannerLayout) -> None:
    """The colour scale of P(noise), with 1 at the top, as tall as the sequences together."""
    top = HEADER_H + CAPTION_H
    height = layout.grid_h - CAPTION_H - 2 - GAP
    colours = heat(np.linspace(1, 0, height))
    canvas.paste(np.repeat(colours[:, None], BAR_W, 1), layout.bar_x, top)
    for value in (0.0, 0.5, 1.0):
        y = top + (1 - value) * height
        canvas.text(f"{value:.1f}", layout.bar_x + 22, y, 14, "lm")
    canvas.text("P(noise)", layout.bar_x, HEADER_H, 14)


# Videos of a rollout: for each sequence a strip of frames above the real ones


class RolloutLayout(NamedTuple):
    """Sizes and positions in a frame of rollout_frames, in pixels."""

    n: int              # sequences
    n_frames: int       # video frames of each
    frame_h: int        # height of a video frame
    frame_w: int
    has_real: bool      # are the real frames shown below?

    @property
    def columns(self) -> int:
        """Maximum number of sequences side by side: a long strip takes the whole width."""
        return 1 if self.n_frames > STRIP // 2 else 2

    @property
    def strip_h(self) -> int:
        """Height of a strip of frames, their bars and the real frames below."""
        made = self.frame_h + 10
        real = self.frame_h + 4 if self.has_real else 0
        return made + real

    @property
    def cell_w(self) -> int:
        """Width of one sequence and the words on its left."""
        return NAMES_W + min(self.n_frames, STRIP) * (self.frame_w + 4) + GAP

    @property
    def cell_h(self) -> int:
        return math.ceil(self.n_frames / STRIP) * self.strip_h + 14

    @property
    def canvas_size(self) -> tuple[int, int]:
        rows = math.ceil(self.n / self.columns)
        width = GAP + min(self.n, self.columns) * self.cell_w
        return width, HEADER_H + rows * self.cell_h

    def corner(self, i: int, f: int) -> tuple[int, int]:
        """Left and top of video frame f of sequence i."""
        row, column = divmod(i, self.columns)
        strip, place = divmod(f, STRIP)
        left = GAP + column * self.cell_w + NAMES_W + place * (self.frame_w + 4)
        top = HEADER_H + row * self.cell_h + strip * self.strip_h
        return left, top


def rollout_frames(
    states: Sequence[Sequence[np.ndarray]],
    levels: np.ndarray,
    real: np.ndarray | None,
    known: np.ndarray,
    meta: dict,
) -> Iterator[np.ndarray]:
    """Frames of the video of a rollout: generated video frames, with the real ones below.

    Context is framed in blue, a finished frame that is wrong in red. A bar under each frame shows
    its noise level.

    states: as in planner_frames, levels (steps, F): noise levels after each step,
    real (n, F, h, w), known (n, F, h, w) bool  ->  yields (H, W, 3) uint8
    """
    colours = palette(meta)
    n, n_frames, h, w = states[0][0].shape
    layout = RolloutLayout(n, n_frames, CELL * h, CELL * w, real is not None)
    for step in shown_steps(len(states)):
        x, _, _, nfe = states[step]
        canvas = Canvas(*layout.canvas_size)
        draw_progress(canvas, step, len(states), nfe, nfe_x=GAP + 180)
        canvas.legend("context", GAP + 290, KNOWN)
        canvas.legend("wrong", GAP + 380, WRONG)
        for i, f in np.ndindex(n, n_frames):
            if f % STRIP == 0:
                draw_strip_names(canvas, layout, i, f)
            level = levels[step][f]
            real_frame = None if real is None else real[i, f]
            tile = enlarge(colours[x[i, f]])
            border = border_colour(x[i, f], real_frame, known[i, f], level)
            if border is not None:
                add_border(tile, 2, border)
            left, top = layout.corner(i, f)
            canvas.paste(tile, left, top)
            draw_level_bar(canvas, left, top + layout.frame_h + 2, layout.frame_w, level)
            if real is not None:
                canvas.paste(enlarge(colours[real_frame]), left, top + layout.frame_h + 10)
        yield canvas.array()


def enlarge(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (CELL * h, CELL * w, 3)"""
    return picture.repeat(CELL, 0).repeat(CELL, 1)


def border_colour(
    x: np.ndarray, real: np.ndarray | None, known: np.ndarray, level: float
) -> Colour | None:
    """Blue for context, red for a finished frame that is wrong.  x, real and known (h, w)"""
    if known.all():
        return KNOWN
    is_finished = level == 0
    if real is not None and is_finished and (x != real).any():
        return WRONG
    return None


def draw_strip_names(canvas: Canvas, layout: RolloutLayout, i: int, f: int) -> None:
    """The words on the left of the strip that begins with frame f of sequence i."""
    left, top = layout.corner(i, f)
    middle = top + layout.frame_h // 2
    canvas.text("made", left - 46, middle, 14, "lm")
    if layout.has_real:
        canvas.text("real", left - 46, middle + layout.frame_h + 10, 14, "lm")


def draw_level_bar(canvas: Canvas, left: int, top: int, width: int, level: float) -> None:
    """A horizontal bar filled to the noise level, which is in [0, 1]."""
    bottom = top + 4
    canvas.draw.rectangle((left, top, left + width - 1, bottom), fill=EMPTY_BAR)
    if level > 0:
        right = left + round((width - 1) * float(level))
        canvas.draw.rectangle((left, top, right, bottom), fill=WRITTEN)


# Video files


def write_video(
    stem: str | Path, frames: Iterable[np.ndarray], fps: int = 12, hold_s: float = 1.5
) -> None:
    """Write stem.mp4 and stem.gif; the last frame is held for hold_s seconds.

    frames: (H, W, 3) uint8, all of one size
    """
    frames = list(frames)
    write_mp4(f"{stem}.mp4", frames, fps, hold_s)
    write_gif(f"{stem}.gif", frames, fps, hold_s)


def write_mp4(path: str, frames: list[np.ndarray], fps: int, hold_s: float) -> None:
    """H.264, which needs even sizes: an odd row or column is cut off."""
    import imageio.v2 as imageio

    height, width = frames[0].shape[:2]
    even_h = height - height % 2
    even_w = width - width % 2
    held = frames[-1:] * round(hold_s * fps)
    options = dict(codec="libx264", quality=7, macro_block_size=2)
    with imageio.get_writer(path, fps=fps, **options) as writer:
        for frame in frames + held:
            writer.append_data(frame[:even_h, :even_w])


def write_gif(path: str, frames: list[np.ndarray], fps: int, hold_s: float) -> None:
    """All frames share 128 colours, chosen from the first, the middle and the last one."""
    from PIL import Image

    no_dither = Image.Dither.NONE
    typical = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])
    colours = Image.fromarray(typical).quantize(128, dither=no_dither)
    images = []
    for frame in frames:
        images.append(Image.fromarray(frame).quantize(palette=colours, dither=no_dither))
    frame_ms = round(1000 / fps)
    hold_ms = round(1000 * hold_s)
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=[frame_ms] * (len(images) - 1) + [hold_ms],
        loop=0,
        optimize=True,
    )


def pairs_png(
    path: str | Path,
    pairs: np.ndarray,
    captions: Sequence[tuple[str, str]],
    meta: dict,
    decoder: Decoder | None = None,
) -> None:
    """Write pairs of pictures in a row, one above the other, each under its caption.

    pairs (n, 2, *grid), captions n pairs of texts
    """
    n = len(pairs)
    tiles = pictures(pairs.reshape(-1, *meta["grid"]), meta, decoder)       # (2n, H, W, 3)
    height, width = tiles.shape[1:3]
    cell_w = width + GAP
    cell_h = height + CAPTION_H + GAP
    canvas = Canvas(GAP + n * cell_w, GAP + 2 * cell_h)
    for i in range(n):
        x = GAP + i * cell_w
        for row in range(2):
            y = GAP + row * cell_h
            canvas.title(captions[i][row], x + width // 2, y, width, "ma")
            canvas.paste(tiles[2 * i + row], x, y + CAPTION_H)
    canvas.image.save(path)
