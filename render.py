"""States -> PNG, GIF, MP4.   Pictures are composed as arrays; Pillow, matplotlib and imageio are imported when used."""

import math

import numpy as np

TILE = 128              # pixels per side of a picture of one sequence, about
GAP = 8
MAX_FRAMES = 240        # a longer run is shown every few steps
WRITTEN, KNOWN, MASK, WRONG = (255, 140, 0), (60, 160, 255), (90, 60, 140), (255, 60, 60)
STRIP, CELL = 16, 5     # frames of a video side by side, pixels per token of them
LINE, GLYPH_W, GLYPH_H = 32, 10, 20     # characters per line of text, pixels of each
BACKGROUND, TEXT = (24, 24, 28), (235, 235, 235)


def palette(meta):
    """Colour of each token id, the mask last.  -> (V + 1, 3) uint8"""
    vocab, kind = meta["vocab"], meta["palette"]
    if kind == "grey":
        rgb = np.repeat(np.linspace(0, 255, vocab)[:, None], 3, 1)
    elif isinstance(kind, list):
        rgb = np.array(kind)
    else:                                                               # any tokens: a fixed colour for each
        import colorsys

        rgb = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.55 + 0.4 * (i * 0.7548777 % 1)) for i in range(vocab)]
        rgb = np.array(rgb) * 255
    return np.concatenate([rgb, [MASK]]).round().astype(np.uint8)


def flat(y):
    """Any grid as rows and columns: a line is folded, frames stand side by side.  (n, *grid) -> (n, h, w)"""
    if y.ndim == 4:
        return np.concatenate(list(y.swapaxes(0, 1)), -1)
    if y.ndim == 2 or y.shape[1] == 1:
        width = max(w for w in range(1, LINE + 1) if y[0].size % w == 0)
        return y.reshape(len(y), -1, width)
    return y


def glyphs():
    """A picture of each byte, the mask last.  -> (257, GLYPH_H, GLYPH_W, 3) uint8"""
    out = []
    for byte in range(257):
        canvas = Canvas(GLYPH_W, GLYPH_H)
        if byte == 256:
            canvas.draw.rectangle((1, 3, GLYPH_W - 2, GLYPH_H - 4), fill=MASK)
        elif byte == 10:                                                # end of a line: a corner
            canvas.draw.line((2, 6, GLYPH_W - 3, 6, GLYPH_W - 3, GLYPH_H - 6), fill=(110, 110, 120))
        elif 32 <= byte < 127:
            canvas.text(chr(byte), GLYPH_W // 2, GLYPH_H // 2, 14, "mm")
        else:
            canvas.draw.rectangle((3, 6, GLYPH_W - 4, GLYPH_H - 7), outline=(110, 110, 120))
        out.append(canvas.array())
    return np.stack(out)


def pictures(tokens, meta, decoder=None):
    """One picture per sequence.  tokens (n, *grid) -> (n, H, W, 3) uint8; decoder: tokens -> (n, 3, H, W) in [-1, 1]"""
    if decoder is None:
        wide, tokens = tokens.ndim == 4, flat(tokens)
        if meta["palette"] == "text":
            cells = glyphs()[tokens]                                    # (n, h, w, GLYPH_H, GLYPH_W, 3)
            n, h, w = tokens.shape
            return cells.transpose(0, 1, 3, 2, 4, 5).reshape(n, h * GLYPH_H, w * GLYPH_W, 3)
        scale = max(1, round((4 * TILE if wide else TILE) / max(tokens.shape[1:])))
        return palette(meta)[tokens].repeat(scale, 1).repeat(scale, 2)
    import torch

    with torch.no_grad():                                               # a decoder knows no mask
        images = decoder(torch.as_tensor(np.minimum(tokens, meta["vocab"] - 1))).float().clamp(-1, 1)
    out = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy().copy()
    for picture, masked in zip(out, flat(tokens) == meta["vocab"], strict=True):
        if masked.any():
            picture[stretch(masked[..., None], picture.shape[:2])[..., 0]] = MASK
    return out


def load_decoder(path, meta, device):
    """A TorchScript image tokenizer's decoder, tried on one sequence."""
    import torch

    try:
        decoder = torch.jit.load(path, map_location=device)
        out = decoder(torch.zeros(1, *meta["grid"], dtype=torch.long, device=device))
    except Exception as error:                                          # TorchScript raises many kinds
        raise SystemExit(f"{path} cannot decode tokens of shape (n, {', '.join(map(str, meta['grid']))}): "
                         f"{str(error).strip().splitlines()[0]}") from None
    if out.dim() != 4 or out.shape[1] != 3:
        raise SystemExit(f"{path} decodes to {tuple(out.shape)}, not to images (n, 3, H, W)")
    return lambda tokens: decoder(tokens.to(device).long())


def heat(p):
    """Probability -> colour, on a scale that is always 0 to 1.  (...) -> (..., 3) uint8"""
    import matplotlib

    return (matplotlib.colormaps["magma"](np.clip(p, 0, 1))[..., :3] * 255).astype(np.uint8)


def outline(picture, where, colour):
    """Frame the cells of a (h, w) grid that are True, in place.  picture (H, W, 3)"""
    height, width = picture.shape[0] / where.shape[0], picture.shape[1] / where.shape[1]
    line = max(1, round(min(height, width) / 8))
    for row, col in np.argwhere(where):
        y0, y1, x0, x1 = round(row * height), round((row + 1) * height), round(col * width), round((col + 1) * width)
        cell = picture[y0:y1, x0:x1]
        cell[:line], cell[-line:], cell[:, :line], cell[:, -line:] = (colour,) * 4


def stretch(picture, shape):
    """Nearest-neighbour resize.  (h, w, 3) -> (H, W, 3)"""
    rows, cols = (np.arange(n) * m // n for n, m in zip(shape, picture.shape, strict=False))
    return picture[rows][:, cols]


class Canvas:
    """An RGB picture to paste tiles and write text on."""

    def __init__(self, width, height):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def paste(self, tile, x, y):
        from PIL import Image

        self.image.paste(Image.fromarray(tile), (x, y))

    def text(self, words, x, y, size=14, anchor="la", colour=TEXT):
        from PIL import ImageFont

        self.draw.text((x, y), words, font=ImageFont.load_default(size), anchor=anchor, fill=colour)

    def array(self):
        return np.asarray(self.image)


def name_of(label, meta):
    if not meta["n_classes"]:
        return ""
    return meta["class_names"][label] if label < meta["n_classes"] else "no label"


def samples_png(path, tokens, labels, meta, decoder=None, wrong=None):
    """A labelled grid of finished sequences, wrong cells framed.  tokens (n, *grid), labels (n,), wrong as tokens"""
    tiles = pictures(tokens, meta, decoder)
    for tile, where in zip(tiles, flat(wrong), strict=True) if wrong is not None else ():
        outline(tile, where, WRONG)
    n, height, width = tiles.shape[:3]
    columns = min(n, 10 if width < 200 else 3)
    canvas = Canvas(GAP + columns * (width + GAP), GAP + math.ceil(n / columns) * (height + 20 + GAP))
    for i, tile in enumerate(tiles):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + 20 + GAP)
        canvas.text(name_of(labels[i], meta), x + width // 2, y, 15, "ma")
        canvas.paste(tile, x, y + 20)
    canvas.image.save(path)


def rollout_frames(states, levels, real, known, meta):
    """Frames of a video's rollout: what is made over what is real, context framed in blue, finished frames that are
    wrong in red, and under each frame its noise level as a bar.

    states: as of planner_frames, levels (steps, F) after each, real (n, F, h, w) or None, known (n, F, h, w) bool
    """
    colours, n, n_frames = palette(meta), len(states[0][0]), states[0][0].shape[1]
    h, w = (CELL * y for y in states[0][0].shape[2:])
    lines, across = math.ceil(n_frames / STRIP), min(n_frames, STRIP)
    tall = (h + 10) + (h + 4) * (real is not None)
    columns = 1 if across > STRIP // 2 else 2
    wide, high = 50 + across * (w + 4) + GAP, lines * tall + 14
    stride = math.ceil(len(states) / MAX_FRAMES)
    for step in sorted({*range(0, len(states), stride), len(states) - 1}):
        x, nfe, level = states[step][0], states[step][3], levels[step]
        canvas = Canvas(GAP + min(n, columns) * wide, 40 + math.ceil(n / columns) * high)
        canvas.text(f"step {step + 1} of {len(states)}", GAP, 10, 18)
        canvas.text(f"NFE {nfe.mean():.0f}", GAP + 180, 10, 18)
        for k, (word, colour) in enumerate([("context", KNOWN), ("wrong", WRONG)]):
            canvas.draw.rectangle((GAP + 290 + 90 * k, 14, GAP + 302 + 90 * k, 26), outline=colour, width=2)
            canvas.text(word, GAP + 308 + 90 * k, 11, 15)
        for i, f in ((i, f) for i in range(n) for f in range(n_frames)):
            left = GAP + i % columns * wide + 50 + f % STRIP * (w + 4)
            top = 40 + i // columns * high + f // STRIP * tall
            if f % STRIP == 0:
                canvas.text("made", left - 46, top + h // 2, 14, "lm")
                if real is not None:
                    canvas.text("real", left - 46, top + h + 10 + h // 2, 14, "lm")
            tile = colours[x[i, f]].repeat(CELL, 0).repeat(CELL, 1)
            is_wrong = real is not None and level[f] == 0 and (x[i, f] != real[i, f]).any()
            if known[i, f].all() or is_wrong:
                tile[:2], tile[-2:], tile[:, :2], tile[:, -2:] = (KNOWN if known[i, f].all() else WRONG,) * 4
            canvas.paste(tile, left, top)
            canvas.draw.rectangle((left, top + h + 2, left + w - 1, top + h + 6), fill=(60, 60, 66))
            if level[f] > 0:
                right = left + round((w - 1) * float(level[f]))
                canvas.draw.rectangle((left, top + h + 2, right, top + h + 6), fill=WRITTEN)
            if real is not None:
                canvas.paste(colours[real[i, f]].repeat(CELL, 0).repeat(CELL, 1), left, top + h + 10)
        yield canvas.array()


def planner_frames(states, labels, meta, decoder=None, known=None, real=None, wrong=None):
    """Frames of a run: per sequence the state, sites just written in orange, known ones in blue, and the planner's map;
    where there is one, the real sequence, and cells that are wrong in the end in red.

    states: a list of (x, p_noise, written (n, h, w) arrays, nfe) per step  ->  yields (H, W, 3) uint8
    """
    n, wide = len(labels), 2 + (real is not None)
    columns = min(n, 3 if n in (3, 6, 9) else 4 if n in (7, 8) else 5)
    truth = None if real is None else pictures(real, meta, decoder)
    columns = min(columns, 2 if meta["palette"] == "text" else 5 if real is None else 4)
    stride = math.ceil(len(states) / MAX_FRAMES)
    for step in sorted({*range(0, len(states), stride), len(states) - 1}):
        x, p_noise, written, nfe = states[step]
        tiles = pictures(x, meta, decoder)
        height, width = tiles.shape[1:3]
        cell_w, cell_h = wide * (width + 2) + (wide + (real is None)) * GAP - 2, height + 22 + GAP
        bar_x = GAP + columns * cell_w
        canvas = Canvas(bar_x + 84, 40 + math.ceil(n / columns) * cell_h + 2)
        canvas.text(f"step {step + 1} of {len(states)}", GAP, 10, 18)
        canvas.text(f"NFE {nfe.mean():.0f}", GAP + 190, 10, 18)
        canvas.text(f"expected noise left {p_noise.sum() / n:5.1f} of {x[0].size}", GAP + 290, 10, 18)
        canvas.draw.rectangle((bar_x - 156, 14, bar_x - 144, 26), outline=WRITTEN, width=2)
        canvas.text("just written", bar_x - 138, 11, 15)
        for other, word, colour in [(known, "known", KNOWN), (wrong, "wrong", WRONG)]:
            if other is not None:
                canvas.draw.rectangle((bar_x - 36, 14, bar_x - 24, 26), outline=colour, width=2)
                canvas.text(word, bar_x - 18, 11, 15)
        for i in range(n):
            left, top = GAP + i % columns * cell_w, 40 + i // columns * cell_h
            canvas.text(name_of(labels[i], meta), left, top, 15)
            canvas.text(f"noise {p_noise[i].sum():.1f}", left + 2 * width + 2, top, 15, "ra")
            if real is not None:
                canvas.text("real", left + 2 * width + 2 + GAP, top, 15)
                canvas.paste(truth[i], left + 2 * width + 2 + GAP, top + 20)
            if known is not None:
                outline(tiles[i], flat(known)[i], KNOWN)
            outline(tiles[i], flat(written)[i], WRITTEN)
            if wrong is not None and step == len(states) - 1:
                outline(tiles[i], flat(wrong)[i], WRONG)
            canvas.paste(tiles[i], left, top + 20)
            canvas.paste(stretch(heat(flat(p_noise)[i]), (height, width)), left + width + 2, top + 20)
        bar_h = math.ceil(n / columns) * cell_h - 22 - GAP
        canvas.paste(np.repeat(heat(np.linspace(1, 0, bar_h))[:, None], 16, 1), bar_x, 60)
        for value in (0.0, 0.5, 1.0):
            canvas.text(f"{value:.1f}", bar_x + 22, 60 + (1 - value) * bar_h, 14, "lm")
        canvas.text("P(noise)", bar_x, 40, 14)
        yield canvas.array()


def write_video(stem, frames, fps=12, hold_s=1.5):
    """stem.mp4 (H.264) and stem.gif; the last frame stays for a while.  frames: (H, W, 3) uint8 of one size"""
    import imageio.v2 as imageio
    from PIL import Image

    frames = list(frames)
    height, width = (n - n % 2 for n in frames[0].shape[:2])            # H.264 wants even sizes
    with imageio.get_writer(f"{stem}.mp4", fps=fps, codec="libx264", quality=7, macro_block_size=2) as writer:
        for frame in frames + frames[-1:] * round(hold_s * fps):
            writer.append_data(frame[:height, :width])
    shown = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])
    colours = Image.fromarray(shown).quantize(128, dither=Image.Dither.NONE)
    flat = [Image.fromarray(f).quantize(palette=colours, dither=Image.Dither.NONE) for f in frames]
    durations = [round(1000 / fps)] * (len(flat) - 1) + [round(1000 * hold_s)]
    flat[0].save(f"{stem}.gif", save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=True)
