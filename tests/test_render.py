import imageio.v2 as imageio
import numpy as np
from PIL import Image

import render

META = dict(vocab=4, palette="grey", n_classes=2, class_names=["zero", "one"], grid=[3, 5])


def test_tokens_are_shown_in_the_palette_of_the_data():
    """Grey by level, any other tokens in a colour each, masks in one that no token has."""
    assert render.palette(META)[:4].tolist() == [[v] * 3 for v in (0, 85, 170, 255)]
    assert render.palette(META | {"palette": [[1, 2, 3]] * 4}).tolist()[0] == [1, 2, 3]
    many = render.palette(META | {"palette": "tokens", "vocab": 500})
    assert len({tuple(c) for c in many.tolist()}) > 490 and len(many) == 501
    picture = render.pictures(np.array([[[0, 1, 2, 3, 4]] * 3]), META)[0]
    cell = picture.shape[1] // 5
    assert [picture[5, i * cell + 3].tolist() for i in range(4)] == [[v] * 3 for v in (0, 85, 170, 255)]


def test_a_decoder_never_sees_a_mask():
    """Tokens are decoded, masks are painted over in their colour."""
    import torch

    def decoder(tokens):
        assert tokens.max() < 4
        return torch.ones(len(tokens), 3, 6, 10)

    picture = render.pictures(np.array([[[0, 1, 2, 3, 4]] * 3]), META, decoder)[0]
    assert (picture[:, 8:] == render.MASK).all() and (picture[:, :8] == 255).all()


def test_text_is_shown_as_characters():
    """A line is folded; each byte has a picture of its own, and a mask one that no byte has."""
    meta = META | dict(palette="text", vocab=256, grid=[1, 64])
    picture = render.pictures(np.full((2, 1, 64), ord("A")), meta)
    assert picture.shape == (2, 2 * render.GLYPH_H, 32 * render.GLYPH_W, 3)
    shown = render.glyphs()
    assert len({shown[i].tobytes() for i in [*range(33, 127), 10, 256]}) == 96


def test_heat_is_on_a_fixed_scale():
    """The colour of a probability does not depend on what else is shown; bright is noise."""
    assert np.array_equal(render.heat(np.array([0.2]))[0], render.heat(np.array([0.2, 0.9]))[0])
    brightness = render.heat(np.linspace(0, 1, 11)).sum(-1).astype(int)
    assert (np.diff(brightness) > 0).all()


def test_frames_show_state_map_and_sites(tmp_path):
    """A written site is framed, the map is dark where the planner is sure; both videos play as many frames."""
    rng = np.random.default_rng(0)
    states = [
        [rng.integers(4, size=(2, 3, 5)), np.full((2, 3, 5), 1 - i / 5), np.zeros((2, 3, 5), bool), np.array([2, 2])]
        for i in range(6)
    ]
    states[2][2][0, 1, 1] = True
    frames = list(render.planner_frames(states, [0, 2], META))
    assert len(frames) == 6 and frames[0].shape == frames[5].shape
    orange = [(f[60:] == render.WRITTEN).all(-1).sum() for f in frames]
    assert orange[2] > 50 and orange[0] == 0
    assert frames[0][70:120].mean() > frames[5][70:120].mean()
    render.write_video(tmp_path / "planner", frames, fps=6, hold_s=0.5)
    with imageio.get_reader(tmp_path / "planner.mp4") as reader:
        assert reader.count_frames() == 6 + 3
    gif = Image.open(tmp_path / "planner.gif")
    assert gif.n_frames == 6 and gif.size == (frames[0].shape[1], frames[0].shape[0])


def test_known_tokens_are_framed_in_every_frame():
    known = np.zeros((1, 3, 5), bool)
    known[0, 0, :2] = True
    one = [np.zeros((1, 3, 5), int), np.zeros((1, 3, 5)), np.zeros((1, 3, 5), bool), np.array([2])]
    blue = [(f[60:] == render.KNOWN).all(-1).sum() for f in render.planner_frames([one] * 3, [0], META, known=known)]
    assert min(blue) > 50
    assert not any((f == render.KNOWN).all(-1).any() for f in render.planner_frames([one], [0], META))


def test_a_long_run_is_thinned():
    """At most MAX_FRAMES, the last always among them."""
    one = [np.zeros((1, 3, 5), int), np.zeros((1, 3, 5)), np.zeros((1, 3, 5), bool), np.array([2])]
    frames = list(render.planner_frames([one] * 1000, [0], META))
    assert 200 <= len(frames) <= render.MAX_FRAMES + 1
