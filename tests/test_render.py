import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from support import render

META = dict(vocab=4, palette="grey", n_classes=2, class_names=["zero", "one"], grid=[3, 5])
SQUARE = META | dict(palette="any", grid=[4, 4])
GREYS = [[v] * 3 for v in (0, 85, 170, 255)]
GREYS_AND_MASK = np.array([[[0, 1, 2, 3, 4]] * 3])      # (1, 3, 5), the mask in the last column


def blank_state(n=1):
    """A state in which nothing is noise and nothing was written."""
    shape = (n, 3, 5)
    x = np.zeros(shape, int)
    p_noise = np.zeros(shape)
    written = np.zeros(shape, bool)
    nfe = np.full(n, 2)
    return [x, p_noise, written, nfe]


def n_pixels(frame, colour):
    """Pixels of a colour below the header and its legend."""
    return (frame[60:] == colour).all(-1).sum()


def test_tokens_are_shown_in_the_palette_of_the_data():
    """Grey by level, other tokens each in a colour of their own, masks in one that no token has."""
    assert render.palette(META)[:4].tolist() == GREYS
    named = render.palette(META | {"palette": [[1, 2, 3]] * 4})
    assert named.tolist()[0] == [1, 2, 3]
    many = render.palette(META | {"palette": "tokens", "vocab": 500})
    assert len(many) == 501
    assert len({tuple(colour) for colour in many.tolist()}) > 490

    picture = render.pictures(GREYS_AND_MASK, META)[0]
    cell = picture.shape[1] // 5
    assert [picture[5, i * cell + 3].tolist() for i in range(4)] == GREYS


def test_a_decoder_never_sees_a_mask():
    """Tokens are decoded, masks are painted over in their colour."""

    def decoder(tokens):
        assert tokens.max() < 4
        return torch.ones(len(tokens), 3, 6, 10)

    picture = render.decoded_pictures(GREYS_AND_MASK, META, decoder)[0]
    assert (picture[:, :8] == 255).all()
    assert (picture[:, 8:] == render.MASK).all()


def test_text_is_shown_as_characters():
    """A line is wrapped; each byte has a picture of its own, and the mask one that no byte has."""
    meta = META | dict(palette="text", vocab=256, grid=[1, 64])
    picture = render.pictures(np.full((2, 1, 64), ord("A")), meta)
    assert picture.shape == (2, 2 * render.GLYPH_H, 32 * render.GLYPH_W, 3)
    glyphs = render.glyphs()
    letters_newline_and_mask = [*range(33, 127), 10, 256]
    assert len({glyphs[i].tobytes() for i in letters_newline_and_mask}) == 96


def test_heat_is_on_a_fixed_scale():
    """The colour of a probability does not depend on the others in the picture; bright is noise."""
    alone = render.heat(np.array([0.2]))
    beside = render.heat(np.array([0.2, 0.9]))
    assert np.array_equal(alone[0], beside[0])
    brightness = render.heat(np.linspace(0, 1, 11)).sum(-1).astype(int)
    assert (np.diff(brightness) > 0).all()


def test_frames_show_state_map_and_sites(tmp_path):
    """A written site is framed, the map is dark where the planner is sure, no frame is lost."""
    rng = np.random.default_rng(0)
    states = [blank_state(n=2) for _ in range(6)]
    for i, state in enumerate(states):
        state[0] = rng.integers(4, size=(2, 3, 5))
        state[1] += 1 - i / 5
    written_at_2 = states[2][2]
    written_at_2[0, 1, 1] = True
    frames = list(render.planner_frames(states, [0, 2], META))
    assert len(frames) == 6 and frames[0].shape == frames[5].shape
    assert n_pixels(frames[2], render.WRITTEN) > 50
    assert n_pixels(frames[0], render.WRITTEN) == 0
    assert frames[0][70:120].mean() > frames[5][70:120].mean()

    render.write_video(tmp_path / "planner", frames, fps=6, hold_s=0.5)
    with imageio.get_reader(tmp_path / "planner.mp4") as reader:
        assert reader.count_frames() == 6 + 3
    gif = Image.open(tmp_path / "planner.gif")
    height, width = frames[0].shape[:2]
    assert gif.n_frames == 6 and gif.size == (width, height)


def test_known_tokens_are_framed_in_every_frame():
    known = np.zeros((1, 3, 5), bool)
    known[0, 0, :2] = True
    states = [blank_state() for _ in range(3)]
    for frame in render.planner_frames(states, [0], META, known=known):
        assert n_pixels(frame, render.KNOWN) > 50
    for frame in render.planner_frames(states[:1], [0], META):
        assert not (frame == render.KNOWN).all(-1).any()


def test_a_long_run_is_thinned():
    """At most one frame more than MAX_FRAMES."""
    frames = list(render.planner_frames([blank_state()] * 1000, [0], META))
    assert 200 <= len(frames) <= render.MAX_FRAMES + 1


def test_the_last_step_is_always_shown():
    for n_steps in (1, 240, 241, 1000):
        assert render.shown_steps(n_steps)[-1] == n_steps - 1


# Pictures through a decoder


def blow_up(tokens):
    """A decoder: each token a grey square of 2x2 pixels."""
    grey = tokens.float()[:, None] / 3 * 2 - 1
    return grey.repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_decoded_pictures_are_enlarged_by_whole_numbers():
    tokens = np.arange(16).reshape(1, 4, 4) % 4
    small = render.decoded_pictures(tokens, SQUARE, blow_up)
    large = render.pictures(tokens, SQUARE, blow_up)
    assert small.shape == (1, 8, 8, 3)
    assert large.shape == (1, render.TILE, render.TILE, 3)
    assert (large[:, ::16, ::16] == small).all()


def test_a_video_with_a_decoder_shows_picture_map_and_tokens():
    """What was just written is framed among the tokens, where it hides no picture."""
    x = np.zeros((1, 4, 4), int)
    written = np.zeros((1, 4, 4), bool)
    written[0, 1, 2] = True
    state = (x, np.full((1, 4, 4), 0.5), written, np.array([2]))
    [frame] = render.planner_frames([state], [0], SQUARE, blow_up)
    top = render.HEADER_H + render.CAPTION_H
    tiles = frame[top:top + render.TILE]
    is_orange = (tiles == render.WRITTEN).all(2).any(0)
    tokens_x = 2 * render.GAP + 2 * render.TILE + render.TILE_GAP
    assert is_orange.any()
    assert np.flatnonzero(is_orange).min() >= tokens_x
    picture = tiles[:, render.GAP:render.GAP + render.TILE]
    assert (picture == 0).all()


@pytest.mark.parametrize("width", [0, 30, 60])
def test_a_title_is_no_wider_than_its_picture(width):
    canvas = render.Canvas(300, 20)
    canvas.title("smileys_and_emotion", 0, 0, width)
    is_text = (canvas.array() != render.BACKGROUND).any((0, 2))
    dots = 20
    assert not is_text[max(width, dots):].any()
    whole = render.Canvas(300, 20)
    whole.title("smileys", 0, 0, 300)
    assert (whole.array() != render.BACKGROUND).any((0, 2))[:60].any()
