"""Videos of sampling: each state beside the planner's map of its noise, or strips of video frames.

Pillow and imageio are imported where they are used: training alone needs neither.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from support import pictures
from support.canvas import (
    CAPTION_H,
    GAP,
    MAX_WIDTH,
    SWATCH,
    Canvas,
    Colour,
    Item,
    canvas_below_header,
    filled,
    framed,
    text_width,
)
from support.pictures import KNOWN, MASK, STRIP, WRITTEN, WRONG, Decoder

MAX_FRAMES = 240        # longer runs are thinned to about this many frames

# Sizes in pixels
TILE_GAP = 4            # between a state and its map
FRAME_GAP = 4           # between the frames of a rollout
NAMES_W = 44            # "made" and "real" on the left of a strip of video frames
BAR_H = 5               # of a frame's noise level
COLUMNS = 5             # sequences of a planner side by side
CELL = 5                # one token of a video rollout, where no scale is given
SCALE_W = 64            # of the colour scale in the header
MAX_HEIGHT = 1600       # of the sequences of a planner, if their number is chosen by it

EMPTY_BAR = (60, 66, 84)


# What a sampler did


class Moment(NamedTuple):
    """Sequences between two steps of a sampler."""
    x: np.ndarray               # (n, *grid) tokens
    p_noise: np.ndarray         # (n, *grid) P(noise) of these tokens
    written: np.ndarray         # (n, *grid) bool: written in the step before
    nfe: np.ndarray             # (n,) network calls so far


class Recording:
    """The first n sequences of a sampler's States, from pure noise to the end.

    The p_noise of a State is what was said of the tokens before its step, so the map of each moment
    comes with the State after it, and that of the last from `finish`.
    """

    def __init__(self, x: Tensor, grid: Sequence[int], n: int):
        self.grid = tuple(grid)
        self.n = n
        self.tokens = [self.array(x)]
        self.maps = []
        self.written = [np.zeros_like(self.tokens[0], bool)]
        self.nfe = [np.zeros(len(self.tokens[0]), int)]

    def add(self, state) -> None:
        """state: a State of diffusion.decoding"""
        self.tokens.append(self.array(state.x))
        self.maps.append(self.array(state.p_noise))
        self.written.append(self.array(state.written))
        self.nfe.append(state.nfe[:self.n].cpu().numpy())

    def finish(self, p_noise: Tensor) -> list[Moment]:
        """p_noise (B, N) of the finished sequences"""
        self.maps.append(self.array(p_noise))
        columns = (self.tokens, self.maps, self.written, self.nfe)
        return [Moment(*row) for row in zip(*columns, strict=True)]

    def array(self, y: Tensor) -> np.ndarray:
        """(B, N) -> (n, *grid)"""
        return y[:self.n].unflatten(1, self.grid).cpu().numpy()


def shown_moments(n: int) -> list[int]:
    """Indices of the moments to show: evenly spaced in a long run, and always the last."""
    stride = math.ceil(n / MAX_FRAMES)
    indices = set(range(0, n, stride))
    return sorted(indices | {n - 1})


# Headers


def progress_items(step: int, moments: Sequence[Moment]) -> list[Item]:
    """The step, and the mean number of network calls so far."""
    n_steps = len(moments) - 1
    last = f"{moments[-1].nfe.mean():.0f}"
    return [
        Item(f"step {step} of {n_steps}", longest=f"step {n_steps} of {n_steps}"),
        Item(f"NFE {moments[step].nfe.mean():.0f}", longest=f"NFE {last}"),
    ]


def marks_of(known: np.ndarray | None, wrong: np.ndarray | None) -> dict[str, Colour]:
    """The marks that a video has, by what is known of its tokens."""
    marks = {}
    if known is not None:
        marks["known"] = KNOWN
    if wrong is not None:
        marks["wrong"] = WRONG
    return marks


def mark_items(
    moments: Sequence[Moment], meta: dict, frames: dict[str, Colour], background: Colour
) -> list[Item]:
    """What the frames of each colour mean, and the mask's colour if any moment has a mask."""
    items = [Item(words, framed(colour, background)) for words, colour in frames.items()]
    if any((moment.x == meta["vocab"]).any() for moment in moments):
        items.append(Item("mask", filled(MASK)))
    return items


def scale_item() -> Item:
    """The colours of P(noise), from 0 to 1."""
    colours = pictures.heat(np.linspace(0, 1, SCALE_W))
    return Item("P(noise) from 0 to 1", np.repeat(colours[None], SWATCH, 0))


# Videos of a planner: for each sequence its state, its map and, if given, the real sequence


class PlannerLayout(NamedTuple):
    """Sizes and positions in a frame of planner_frames below its header, in pixels."""
    n: int              # sequences
    tile_h: int         # height of the picture of a state
    tile_w: int
    n_tiles: int        # pictures of each sequence

    @property
    def slot_w(self) -> int:
        """Width of a picture, or of its caption."""
        return max(self.tile_w, pictures.MIN_CAPTION_W)

    @property
    def cell_w(self) -> int:
        """Width of the tiles of one sequence and the margin to the next."""
        pair_w = 2 * self.slot_w + TILE_GAP
        third_w = GAP + self.slot_w if self.n_tiles == 3 else 0
        return pair_w + third_w + 2 * GAP

    @property
    def cell_h(self) -> int:
        return CAPTION_H + self.tile_h + GAP

    @property
    def columns(self) -> int:
        """Sequences side by side, so that the rows are filled as evenly as possible."""
        most = max(1, min(COLUMNS, MAX_WIDTH // self.cell_w))
        rows = math.ceil(self.n / most)
        return math.ceil(self.n / rows)

    @property
    def body_size(self) -> tuple[int, int]:
        rows = math.ceil(self.n / self.columns)
        return self.columns * self.cell_w, rows * self.cell_h

    def corner(self, i: int) -> tuple[int, int]:
        """Left and top of sequence i."""
        row, column = divmod(i, self.columns)
        return GAP + column * self.cell_w, row * self.cell_h


def n_that_fit(n: int, tile: np.ndarray, n_tiles: int) -> int:
    """As many of n sequences as MAX_HEIGHT has room for, at least one.  tile (H, W, 3)"""
    for n_shown in range(n, 1, -1):
        layout = PlannerLayout(n_shown, *tile.shape[:2], n_tiles)
        if layout.body_size[1] <= MAX_HEIGHT:
            return n_shown
    return 1


def planner_frames(
    moments: Sequence[Moment], labels: Sequence[int], meta: dict, title: Sequence[str] = (),
    decoder: Decoder | None = None, known: np.ndarray | None = None,
    real: np.ndarray | None = None, wrong: np.ndarray | None = None, scale: int = 0,
) -> Iterator[np.ndarray]:
    """Video frames of a run: the state of each sequence beside the planner's noise probabilities.

    Tokens just written are framed in orange, in the last frame wrong ones in red; known regions
    have a blue outline. The real sequence, if given, is shown on the right.

    labels (n,), known, real and wrong (n, *grid)  ->  yields (H, W, 3) uint8
    """
    has_tokens = decoder is not None and meta["palette"] != "text"
    third = "real" if real is not None else "tokens" if has_tokens else ""
    n_tiles = 3 if third else 2
    colour = pictures.background(meta)
    frames = {"just written": WRITTEN} | marks_of(known, wrong)
    legend = [*mark_items(moments, meta, frames, colour), scale_item()]
    known, real, wrong = (pictures.in_lines(y, meta) for y in (known, real, wrong))
    third_tiles = [None] * len(labels)
    if real is not None:
        third_tiles = pictures.pictures(real, meta, decoder, scale, n_tiles)

    for step in shown_moments(len(moments)):
        *grids, _ = moments[step]
        x, p_noise, written = (pictures.in_lines(y, meta) for y in grids)
        tiles = pictures.pictures(x, meta, decoder, scale, n_tiles)
        marked = tiles
        if third == "tokens":       # marks would hide the picture
            third_tiles = token_tiles(x, meta, tiles.shape[1:3])
            marked = third_tiles
        pictures.outline_region(marked, known, KNOWN)
        pictures.frame_cells(marked, written, WRITTEN)
        if step == len(moments) - 1:
            pictures.frame_cells(marked, wrong, WRONG)

        layout = PlannerLayout(len(labels), *tiles.shape[1:3], n_tiles)
        progress = [*progress_items(step, moments), noise_item(p_noise, known)]
        lines = [pictures.title_items(title), progress + legend]
        canvas, body_y = canvas_below_header(lines, *layout.body_size, colour)
        for i, label in enumerate(labels):
            name = pictures.label_name(label, meta)
            draw_pair(canvas, body_y, layout, i, name, tiles[i], p_noise[i])
            if third:
                draw_third(canvas, body_y, layout, i, third, third_tiles[i])
        yield canvas.array()


def noise_item(p_noise: np.ndarray, known: np.ndarray | None) -> Item:
    """Expected number of noise tokens in a sequence, of those that are not known."""
    n = len(p_noise)
    is_token = ~np.isnan(p_noise)                           # not a blank
    total = (is_token if known is None else is_token & ~known).sum() / n
    return Item(
        f"noise left {np.nansum(p_noise) / n:.1f} of {total:.0f}",
        longest=f"noise left {total:.1f} of {total:.0f}",
    )


def token_tiles(x: np.ndarray, meta: dict, shape: tuple[int, int]) -> np.ndarray:
    """Tokens in distinct colours, as large as their pictures.  (n, *grid) -> (n, H, W, 3) uint8"""
    cells = pictures.palette(meta)[pictures.as_rows_and_columns(x)]
    return np.stack([pictures.stretch(picture, shape) for picture in cells])


def draw_pair(
    canvas: Canvas,
    body_y: int,
    layout: PlannerLayout,
    i: int,
    name: str,
    tile: np.ndarray,
    p_noise: np.ndarray,
) -> None:
    """State and map of sequence i, below its name and its expected noise.  p_noise (*grid)"""
    left, top = layout.corner(i)
    top += body_y
    map_x = left + layout.slot_w + TILE_GAP
    map_end = map_x + layout.slot_w
    noise = f"noise {np.nansum(p_noise):.1f}"               # blanks are nan
    name_w = map_end - left - text_width(f"noise {p_noise.size:.1f}") - GAP
    canvas.title(name, left, top, name_w)
    canvas.text(noise, map_end, top, "ra")
    cells = pictures.heat(pictures.as_rows_and_columns(p_noise[None])[0])
    heat_map = pictures.stretch(cells, (layout.tile_h, layout.tile_w))
    canvas.paste_framed(tile, left, top + CAPTION_H)
    canvas.paste_framed(heat_map, map_x, top + CAPTION_H)


def draw_third(
    canvas: Canvas, body_y: int, layout: PlannerLayout, i: int, words: str, tile: np.ndarray
) -> None:
    """What stands beside the map of sequence i."""
    left, top = layout.corner(i)
    left += 2 * layout.slot_w + TILE_GAP + GAP
    canvas.text(words, left, body_y + top)
    canvas.paste_framed(tile, left, body_y + top + CAPTION_H)


# Videos of a rollout: for each sequence a strip of frames above the real ones


class RolloutLayout(NamedTuple):
    """Sizes and positions in a frame of rollout_frames below its header, in pixels."""
    n: int              # sequences
    n_frames: int       # video frames of each
    frame_h: int        # height of a video frame
    frame_w: int
    has_real: bool      # are the real frames shown below?

    @property
    def step_x(self) -> int:
        """From one frame to the next."""
        return self.frame_w + FRAME_GAP

    @property
    def strip(self) -> int:
        """Frames side by side."""
        room = MAX_WIDTH - NAMES_W - 2 * GAP
        return max(1, min(self.n_frames, STRIP, room // self.step_x))

    @property
    def columns(self) -> int:
        """Sequences side by side: a long strip takes the whole width."""
        if self.n_frames > STRIP // 2:
            return 1
        return max(1, min(self.n, 2, (MAX_WIDTH - GAP) // self.cell_w))

    @property
    def real_y(self) -> int:
        """From a frame to the real one below it."""
        return self.frame_h + BAR_H + 2 * FRAME_GAP

    @property
    def strip_h(self) -> int:
        """Height of a strip of frames, their bars and the real frames below."""
        real_h = self.frame_h + FRAME_GAP if self.has_real else 0
        return self.real_y + real_h

    @property
    def cell_w(self) -> int:
        """Width of one sequence and the words on its left."""
        return NAMES_W + self.strip * self.step_x + GAP

    @property
    def cell_h(self) -> int:
        return math.ceil(self.n_frames / self.strip) * self.strip_h + GAP

    @property
    def body_size(self) -> tuple[int, int]:
        rows = math.ceil(self.n / self.columns)
        return GAP + self.columns * self.cell_w, rows * self.cell_h

    def corner(self, i: int, f: int) -> tuple[int, int]:
        """Left and top of video frame f of sequence i."""
        row, column = divmod(i, self.columns)
        strip, place = divmod(f, self.strip)
        left = GAP + column * self.cell_w + NAMES_W + place * self.step_x
        top = row * self.cell_h + strip * self.strip_h
        return left, top


def rollout_frames(
    moments: Sequence[Moment],
    levels: np.ndarray,
    real: np.ndarray | None,
    known: np.ndarray,
    meta: dict,
    title: Sequence[str] = (),
    scale: int = 0,
) -> Iterator[np.ndarray]:
    """Frames of the video of a rollout: generated video frames, with the real ones below.

    Known regions have a blue outline, a finished frame that is wrong a red one. A bar under each
    frame shows its noise level.

    levels (moments, F), real (n, F, h, w), known (n, F, h, w) bool  ->  yields (H, W, 3) uint8
    """
    colours = pictures.palette(meta)
    n, n_frames, h, w = moments[0].x.shape
    scale = scale or min(CELL, max(1, MAX_WIDTH // (2 * w)))
    layout = RolloutLayout(n, n_frames, scale * h, scale * w, real is not None)
    background = pictures.background(meta)
    legend = mark_items(moments, meta, marks_of(known, real), background)
    legend.append(Item("noise level", filled(WRITTEN)))
    for step in shown_moments(len(moments)):
        x = moments[step].x
        lines = [pictures.title_items(title), progress_items(step, moments) + legend]
        canvas, body_y = canvas_below_header(lines, *layout.body_size, background)
        for i, f in np.ndindex(n, n_frames):
            left, top = layout.corner(i, f)
            top += body_y
            if f % layout.strip == 0:
                draw_strip_names(canvas, layout, left, top)
            level = levels[step][f]
            tile = pictures.enlarge(colours[x[i, f]][None], scale)
            pictures.outline_region(tile, known[i, f][None], KNOWN)
            if real is not None:
                real_tile = pictures.enlarge(colours[real[i, f]][None], scale)
                canvas.paste_framed(real_tile[0], left, top + layout.real_y)
                is_finished = level == 0
                if is_finished and (x[i, f] != real[i, f]).any():
                    pictures.add_border(tile[0], 2, WRONG)
            canvas.paste_framed(tile[0], left, top)
            draw_level_bar(canvas, left, top + layout.frame_h + FRAME_GAP, layout.frame_w, level)
        yield canvas.array()


def draw_strip_names(canvas: Canvas, layout: RolloutLayout, left: int, top: int) -> None:
    """The words on the left of a strip whose first frame has this corner."""
    middle = top + layout.frame_h // 2
    canvas.text("made", left - NAMES_W, middle, "lm")
    if layout.has_real:
        canvas.text("real", left - NAMES_W, middle + layout.real_y, "lm")


def draw_level_bar(canvas: Canvas, left: int, top: int, width: int, level: float) -> None:
    """A horizontal bar filled to the noise level, which is in [0, 1]."""
    bottom = top + BAR_H - 1
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


