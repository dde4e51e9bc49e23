"""Pictures and videos: what they show, and that their words never overlap."""

from dataclasses import asdict
from itertools import combinations, pairwise

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import meta_of, refusal, tiny_config
from PIL import Image

import methods
import sample
from sources import bounce, maze
from support import canvas, pictures, videos
from support.videos import Moment

META = dict(vocab=4, palette="grey", n_classes=2, class_names=["zero", "one"], grid=[3, 5])
SQUARE = META | dict(palette="any", grid=[4, 4])
TEXT = META | dict(palette="text", vocab=256, grid=[1, 64])
GREYS = [[v] * 3 for v in (0, 85, 170, 255)]
GREYS_AND_MASK = np.array([[[0, 1, 2, 3, 4]] * 3])      # (1, 3, 5), the mask in the last column


def blank_moment(n=1, grid=(3, 5)):
    """Nothing is noise and nothing was written."""
    shape = (n, *grid)
    return Moment(
        np.zeros(shape, int), np.zeros(shape), np.zeros(shape, bool), np.full(n, 2)
    )


def n_pixels(frame, colour):
    """Pixels of a colour below the header and its legend."""
    return (frame[100:] == colour).all(-1).sum()


def blow_up(tokens):
    """A decoder: each token a grey square of 2x2 pixels."""
    grey = tokens.float()[:, None] / 3 * 2 - 1
    return grey.repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


# Words and tiles have places of their own


@pytest.fixture
def boxes(monkeypatch):
    """(left, top, right, bottom) of each text and tile on the last canvas, and the canvas."""
    seen = {"boxes": []}
    plain_init = canvas.Canvas.__init__
    plain_text = canvas.Canvas.text
    plain_paste = canvas.Canvas.paste

    def init(self, *args):
        plain_init(self, *args)
        self.boxes = []

    def text(self, words, x, y, anchor="la"):
        plain_text(self, words, x, y, anchor)
        if words:
            face = canvas.font(canvas.TEXT_SIZE)
            self.boxes.append(self.draw.textbbox((x, y), words, font=face, anchor=anchor))
            seen.update(canvas=self)

    def paste(self, tile, x, y):
        plain_paste(self, tile, x, y)
        self.boxes.append((x, y, x + tile.shape[1], y + tile.shape[0]))
        seen.update(canvas=self)

    for name, function in (("__init__", init), ("text", text), ("paste", paste)):
        monkeypatch.setattr(canvas.Canvas, name, function)
    return seen


def assert_apart(seen):
    """No two boxes meet, and all lie within a canvas of at most MAX_WIDTH."""
    drawn = seen["canvas"]
    width, height = drawn.image.size
    assert width <= canvas.MAX_WIDTH
    for left, top, right, bottom in drawn.boxes:
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
    for a, b in combinations(drawn.boxes, 2):
        is_beside = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert is_beside, (a, b)


LONG = dict(n_classes=2, class_names=["smileys and emotion of all kinds, " * 3, "Wörter"])


@pytest.mark.parametrize("meta, scale", [
    (META | LONG | dict(grid=[8, 8]), 0),
    (META | LONG | dict(grid=[2, 2]), 3),
    (META | LONG | dict(grid=[32, 32]), 0),
    (TEXT | LONG, 0),
    (TEXT | LONG | dict(grid=[1, 127]), 4),
])
@pytest.mark.parametrize("n", range(1, 11))
def test_words_and_tiles_do_not_overlap(meta, scale, n, boxes, tmp_path):
    """For any number of samples, long names, small and large grids; with and without more tiles."""
    assert_all_apart(meta, scale, n, boxes, tmp_path)


@pytest.mark.parametrize("n", [1, 6])
def test_large_grids_are_put_below_each_other(n, boxes, tmp_path):
    assert_all_apart(META | LONG | dict(grid=[300, 300]), 0, n, boxes, tmp_path)


def assert_all_apart(meta, scale, n, boxes, tmp_path):
    """In videos with two and three tiles, in samples.png, and in pairs."""
    moment = blank_moment(n, meta["grid"])
    first = moment._replace(x=moment.x + meta["vocab"], p_noise=moment.p_noise + 1)
    last = moment._replace(nfe=np.full(n, 1024))
    labels = np.arange(n) % 3
    title = ["confidence", "1000 steps", "guidance 2.5", "temperature 0.75"]
    plain, marked = {}, dict(known=moment.written, real=moment.x, wrong=moment.written)
    for more in (plain, marked):
        shown = [first, last]
        frames = list(videos.planner_frames(shown, labels, meta, title, scale=scale, **more))
        assert frames[0].shape == frames[1].shape
        assert_apart(boxes)
    pictures.samples_png(tmp_path / "samples.png", moment.x, labels, meta, title, scale=scale)
    assert_apart(boxes)
    pairs = np.stack([moment.x] * 2, 1)
    pictures.pairs_png(tmp_path / "pairs.png", pairs, [("a " * 60, "b")] * n, meta, title)
    assert_apart(boxes)


@pytest.mark.parametrize("n_frames, side", [(8, 8), (33, 8), (8, 64)])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_words_and_frames_of_rollouts_do_not_overlap(n_frames, side, n, boxes):
    moment = blank_moment(n, (n_frames, side, side))
    levels = np.linspace([1] * n_frames, [0] * n_frames, 2)
    for real in (None, moment.x):
        list(videos.rollout_frames([moment] * 2, levels, real, moment.written, META, ["rollout"]))
        assert_apart(boxes)


@pytest.mark.parametrize("width", [0, 30, 60])
def test_a_title_is_no_wider_than_its_picture(width):
    drawn = canvas.Canvas(300, 20)
    drawn.title("smileys_and_emotion", 0, 0, width)
    is_text = (drawn.array() != canvas.NAVY).any((0, 2))
    assert not is_text[width:].any()
    assert is_text.any() == (width > 0)
    assert canvas.shortened("smileys", 300) == "smileys"


def test_a_legend_names_the_marks_that_there_are():
    """The mask only where a state has one."""
    moment = blank_moment()
    masked = moment._replace(x=moment.x + 4)
    frames = videos.marks_of(moment.written, None)
    assert frames == {"known": pictures.KNOWN}
    with_mask = videos.mark_items([masked, moment], META, frames, canvas.NAVY)
    without = videos.mark_items([moment], META, frames, canvas.NAVY)
    assert [item.words for item in with_mask] == ["known", "mask"]
    assert [item.words for item in without] == ["known"]


def test_a_title_says_how_was_sampled():
    stage = sample.Stage("rollout", {"n_steps": 4, "guidance": 2.0, "top_k": 5})
    assert stage.title(is_video=True) == ["rollout", "4 steps a frame", "guidance 2.0", "top k 5"]
    assert stage.title(is_video=False)[1] == "4 steps"


# Colours


def test_tokens_are_shown_in_the_palette_of_the_data():
    """Grey by level, other tokens each in a colour of their own, masks in one that no token has."""
    assert pictures.palette(META)[:4].tolist() == GREYS
    named = pictures.palette(META | {"palette": [[1, 2, 3]] * 4})
    assert named.tolist()[0] == [1, 2, 3]
    many = pictures.palette(META | {"palette": "tokens", "vocab": 500})
    assert len(many) == 502
    assert len({tuple(colour) for colour in many.tolist()}) > 490

    picture = pictures.pictures(GREYS_AND_MASK, META)[0]
    cell = picture.shape[1] // 5
    assert [picture[5, i * cell + 3].tolist() for i in range(4)] == GREYS


def nearest(colours, others):
    """The smallest sum of differences in red, green and blue."""
    return np.abs(np.array(colours)[:, None] - np.array(others)).sum(-1).min()


@pytest.mark.parametrize("kind", ["grey", "any", [list(canvas.NAVY), [0, 0, 0], [255] * 3]])
def test_the_background_is_the_colour_of_no_token(kind):
    meta = META | dict(palette=kind, vocab=3 if isinstance(kind, list) else 300)
    assert nearest([pictures.background(meta)], pictures.palette(meta).astype(int)) >= pictures.FAR


@pytest.mark.parametrize("vocab", [2, 64, 4096, 2**17])
def test_no_token_looks_like_the_mask(vocab):
    """In the colours of data without any; a smaller vocabulary has the first of them."""
    colours = pictures.palette(META | dict(palette="any", vocab=vocab)).astype(int)
    assert nearest(colours[:vocab], [pictures.MASK]) >= 60
    steps = np.abs(np.diff(colours[:vocab], axis=0)).sum(-1)
    assert steps.min() >= 120                       # of neighbouring ids


@pytest.mark.parametrize("source", [maze, bounce])
def test_marks_are_seen_on_mazes_and_videos(source):
    marks = [pictures.WRITTEN, pictures.KNOWN, pictures.WRONG, pictures.MASK]
    assert nearest(source.PALETTE, marks) >= 120


def test_heat_is_on_a_fixed_scale():
    """The colour of a probability does not depend on the others in the picture; bright is noise."""
    alone = pictures.heat(np.array([0.2]))
    beside = pictures.heat(np.array([0.2, 0.9]))
    assert np.array_equal(alone[0], beside[0])
    brightness = pictures.heat(np.linspace(0, 1, 11)).sum(-1).astype(int)
    assert (np.diff(brightness) > 0).all()


# Cells and their size


def test_lines_and_videos_are_wrapped():
    """Nothing is lost, and what is missing in the last row is blank."""
    line = pictures.as_rows_and_columns(np.arange(37)[None])
    assert line.shape == (1, 2, 32)
    assert (line[0].flatten()[:37] == np.arange(37)).all()
    assert (line[0, 1, 5:] == pictures.BLANK).all()
    video = np.arange(17)[None, :, None, None] + np.zeros((1, 17, 2, 3), int)
    wrapped = pictures.as_rows_and_columns(video)
    assert wrapped.shape == (1, 4, 48)
    assert (wrapped[0, :2, 45:] == 15).all() and (wrapped[0, 2:, :3] == 16).all()
    assert not pictures.as_rows_and_columns(np.ones((1, 33), bool))[0, 1, 1:].any()


def test_a_scale_is_pixels_per_token():
    tokens = np.zeros((2, 3, 5), int)
    assert pictures.pictures(tokens, META, scale=7).shape == (2, 21, 35, 3)
    assert pictures.pictures(tokens, META).shape == (2, 78, 130, 3)
    text = pictures.pictures(np.full((2, 1, 64), 65), TEXT, scale=8)
    assert text.shape == (2, 2 * 16, 32 * 8, 3)
    decoded = pictures.pictures(np.zeros((1, 4, 4), int), SQUARE, blow_up, scale=6)
    assert decoded.shape == (1, 24, 24, 3)


def test_scales_that_do_not_fit_are_refused(tmp_path):
    spec = methods.spec_of(asdict(tiny_config("a")), meta_of(4, [8, 8], 2))
    start = sample.Start([0], [8, 8])
    sample.check_scale(sample.Flags(run="a", scale=97), spec, start, None)
    said = refusal(sample.check_scale, sample.Flags(run="a", scale=98), spec, start, None)
    assert "at most --scale 97 fits" in said
    square = np.zeros((1, 4, 4), int)
    said = refusal(pictures.pictures, square, SQUARE, blow_up, scale=3)
    assert "no whole multiple of the 8" in said


# Text


def test_bytes_are_shown_as_utf8():
    """A character in the cell of its first byte; signs for masks and for bytes of no character."""
    invalid, more, mask = pictures.INVALID, pictures.CONTINUED, pictures.MASKED
    text = np.array([*"aé€😀".encode(), 0xE2, 0x82, 65, 256, 0x80, 0xC3, 256, pictures.BLANK])
    assert pictures.characters(text, 256) == [
        "a", "é", more, "€", more, more, "😀", more, more, more,
        invalid, invalid, "A", mask, invalid, invalid, mask, " ",
    ]
    assert pictures.characters(np.array([0xC3]), 256) == [invalid]


def test_text_is_shown_as_characters():
    """A line is wrapped; each character, the newline and the mask have pictures of their own."""
    width = pictures.GLYPH_W
    picture = pictures.pictures(np.full((2, 1, 64), ord("A")), TEXT)
    assert picture.shape == (2, 2 * 2 * width, 32 * width, 3)
    signs = [pictures.MASKED, pictures.CONTINUED, pictures.INVALID, "\n", "\t"]
    shown = [chr(i) for i in range(32, 127)] + [*"éüßΩЖ€"] + signs
    assert len({pictures.glyph(sign, width).tobytes() for sign in shown}) == len(shown)


def test_characters_cross_the_ends_of_lines():
    across = np.full((1, 1, 64), ord("a"))
    across[0, 0, 31:33] = list("é".encode())
    at_start = np.full((1, 1, 64), ord("a"))
    at_start[0, 0, :2] = list("é".encode())
    first, second = pictures.pictures(np.concatenate([across, at_start]), TEXT)
    width = pictures.GLYPH_W
    assert np.array_equal(first[:2 * width, -width:], second[:2 * width, :width])


# Marks


def test_a_known_region_has_one_outline():
    """Along its edge, also where it is concave; not around each of its tokens."""
    where = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    tiles = np.zeros((1, 64, 64, 3), np.uint8)
    pictures.outline_region(tiles, where[None], pictures.KNOWN)
    is_blue = (tiles[0] == pictures.KNOWN).all(-1)
    inside = is_blue & where.repeat(16, 0).repeat(16, 1)
    assert (is_blue == inside).all()
    assert is_blue[0, :32].all() and is_blue[:32, 0].all() and is_blue[31, :48].all()
    assert is_blue[16, 33:47].all() and is_blue[:16, 31].all()
    assert is_blue[17, 31] and is_blue[17, 30]          # the inner corner is closed
    assert not is_blue[3:29, 14:18].any() and not is_blue[14:18, 3:29].any()
    assert is_blue[48, 48:].all() and not is_blue[52:60, 52:60].any()


@pytest.mark.parametrize("kind", [{}, dict(palette="text", grid=[1, 64], tokenizer={})])
def test_a_grid_of_samples_outlines_what_was_known(tmp_path, kind):
    """Along the edge of its region, and in a legend."""
    meta = META | dict(grid=[4, 4]) | kind
    known = np.zeros((2, *meta["grid"]), bool)
    known.reshape(2, -1)[0, :8] = True
    tokens = np.zeros(known.shape, int)
    decoder = pictures.word_decoder(lambda token: "a") if "tokenizer" in meta else None
    for shown in (known, None):
        path = tmp_path / "samples.png"
        pictures.samples_png(path, tokens, [0, 1], meta, ["x"], decoder, known=shown)
        is_blue = (np.asarray(Image.open(path)) == pictures.KNOWN).all(-1)
        assert is_blue[32:].any() == (shown is not None)    # below the header
        assert is_blue[:32].any() == (shown is not None)
        assert not is_blue[:, is_blue.shape[1] // 2 + 20:].any() or meta["palette"] == "text"


def test_known_tokens_are_outlined_in_every_frame():
    known = np.zeros((1, 3, 5), bool)
    known[0, 2, :2] = True
    moments = [blank_moment() for _ in range(3)]
    for frame in videos.planner_frames(moments, [0], META, known=known):
        assert n_pixels(frame, pictures.KNOWN) > 50
    for frame in videos.planner_frames(moments[:1], [0], META):
        assert not (frame == pictures.KNOWN).all(-1).any()


def test_frames_show_state_map_and_sites(tmp_path):
    """A written site is framed, the map is dark where the planner is sure, no frame is lost."""
    rng = np.random.default_rng(0)
    moments = []
    for i in range(6):
        moment = blank_moment(n=2)
        x = rng.integers(4, size=(2, 3, 5))
        moments.append(moment._replace(x=x, p_noise=moment.p_noise + 1 - i / 5))
    moments[2].written[0, 2, 1] = True
    frames = list(videos.planner_frames(moments, [0, 2], META))
    assert len(frames) == 6 and frames[0].shape == frames[5].shape
    assert n_pixels(frames[2], pictures.WRITTEN) > 50
    assert n_pixels(frames[0], pictures.WRITTEN) == 0
    assert frames[0][90:140].mean() > frames[5][90:140].mean()

    videos.write_video(tmp_path / "planner", frames, fps=6, hold_s=0.5)
    with imageio.get_reader(tmp_path / "planner.mp4") as reader:
        assert reader.count_frames() == 6 + 3
    gif = Image.open(tmp_path / "planner.gif")
    height, width = frames[0].shape[:2]
    assert gif.n_frames == 6 and gif.size == (width, height)


# From a sampler's states to moments


def test_a_long_run_is_thinned():
    """At most one frame more than MAX_FRAMES."""
    frames = list(videos.planner_frames([blank_moment()] * 1000, [0], META))
    assert 200 <= len(frames) <= videos.MAX_FRAMES + 1


def test_the_last_moment_is_always_shown():
    for n in (1, 240, 241, 1000):
        assert videos.shown_moments(n)[-1] == n - 1


class Opinionated:
    """A network whose logits depend on the tokens, the level and the label, and nothing else."""

    def __init__(self, vocab):
        rng = torch.Generator().manual_seed(1)
        self.table = 3 * torch.randn(vocab + 1, vocab, generator=rng)

    def __call__(self, x, t, label, sites=None):
        if sites is not None:
            x = x.gather(1, sites)
        return self.table[x] * (1 + t)[..., None] + label[:, None, None]


NETS = {
    "planner": lambda x, t, label, sites=None: 1.5 - x.float() + 0.1 * label[:, None],
    "denoiser": Opinionated(4),
}


@pytest.mark.parametrize("flags, sampler, options", [
    ("--nets pair --denoiser-process mask", "ddpd", dict(schedule="one", planner_guidance=2.0)),
    ("--nets pair --denoiser-process uniform", "ddpd", dict(schedule="one")),
    ("--nets single --denoiser-process uniform", "ddpd", dict(schedule="one", guidance=2.0)),
    ("--method gidd", "self_correct", dict(guidance=2.0, temperature=0.7)),
])
def test_the_last_map_is_what_a_further_step_would_say(flags, sampler, options, rng):
    """And each map of a video is of the tokens beside it; network calls are not counted twice."""
    cfg = tiny_config("a", *flags.split())
    spec = methods.spec_of(asdict(cfg), meta_of(4, [3, 5], 2))
    nets = {name: NETS[name] for name in spec.method.networks}
    label = torch.tensor([0, 1, 1])
    tokens = torch.randint(4, (3, 15), generator=rng)
    known = torch.arange(15) < 4
    known = known.expand(3, -1)
    x = methods.starting_tokens(spec, label, rng, sampler, known, tokens)
    states = list(methods.sample(
        spec, nets, label, sampler=sampler, n_steps=5, generator=rng, known=known, x=x, **options
    ))
    assert len(states) == 5
    maps = [
        methods.p_noise_after(spec, nets, state, label, sampler=sampler, known=known, **options)
        for state in states
    ]
    for after, following in zip(maps, states[1:], strict=False):
        assert torch.allclose(after, following.p_noise, atol=1e-6)

    recording = videos.Recording(x, [3, 5], 2)
    for state in states:
        recording.add(state)
    moments = recording.finish(maps[-1])
    assert len(moments) == 6
    assert (moments[0].x == x[:2].view(2, 3, 5).numpy()).all() and not moments[0].nfe.any()
    assert (moments[5].x == states[-1].x[:2].view(2, 3, 5).numpy()).all()
    assert (moments[5].nfe == states[-1].nfe[:2].numpy()).all()
    for before, after in pairwise(moments):
        assert not ((before.x != after.x) & ~after.written).any()
    if sampler == "ddpd" and "planner" in nets and "planner_guidance" not in options:
        for moment in moments:
            logits = 1.5 - moment.x + 0.1 * label[:2, None, None].numpy()
            of_these = 1 / (1 + np.exp(-logits)) * ~known[:2].view(2, 3, 5).numpy()
            assert np.allclose(moment.p_noise, of_these, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "remdm"])
def test_other_samplers_end_without_noise(sampler, rng):
    spec = methods.spec_of(asdict(tiny_config("a")), meta_of(4, [3, 5], 2))
    label = torch.tensor([0, 1])
    *_, last = methods.sample(spec, NETS, label, sampler=sampler, n_steps=3, generator=rng)
    assert not methods.p_noise_after(spec, NETS, last, label, sampler=sampler).any()


def test_sampling_from_given_noise_is_sampling():
    """The first draws of the generator are the noise."""
    spec = methods.spec_of(asdict(tiny_config("a")), meta_of(4, [3, 5], 2))
    label = torch.tensor([0, 1])
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    *_, plain = methods.sample(spec, NETS, label, n_steps=4, generator=one)
    x = methods.starting_tokens(spec, label, other, "ddpd")
    *_, from_x = methods.sample(spec, NETS, label, n_steps=4, generator=other, x=x)
    assert torch.equal(plain.x, from_x.x)


@pytest.mark.parametrize("known_frames", [[], [0], [0, 2], [0, 1, 2, 3]])
def test_a_rollout_has_levels_for_each_moment(known_frames, rng):
    """Also where frames in the middle are known, at which no step is spent."""
    flags = "--method forcing --process uniform --noise-granularity frame".split()
    spec = methods.spec_of(asdict(tiny_config("a", *flags)), meta_of(4, [4, 2, 2], 0))
    label = torch.zeros(2, dtype=torch.long)
    known = torch.zeros(2, 4, 4, dtype=torch.bool)
    known[:, known_frames] = True
    known = known.flatten(1)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    states = list(methods.sample(
        spec, NETS, label, n_steps=3, generator=rng, known=known, known_tokens=tokens
    ))
    levels = methods.rollout_levels(spec, known, 3)
    assert len(levels) == len(states) + 1
    assert not levels[-1].any()


# Pictures through a decoder


def test_a_decoder_never_sees_a_mask():
    """Tokens are decoded, masks are painted over in their colour."""

    def decoder(tokens):
        assert tokens.max() < 4
        return torch.ones(len(tokens), 3, 6, 10)

    picture = pictures.decoded_pictures(GREYS_AND_MASK, META, decoder)[0]
    assert (picture[:, :8] == 255).all()
    assert (picture[:, 8:] == pictures.MASK).all()


def test_decoded_pictures_are_enlarged_by_whole_numbers():
    tokens = np.arange(16).reshape(1, 4, 4) % 4
    small = pictures.decoded_pictures(tokens, SQUARE, blow_up)
    large = pictures.pictures(tokens, SQUARE, blow_up)
    assert small.shape == (1, 8, 8, 3)
    assert large.shape == (1, pictures.TILE, pictures.TILE, 3)
    assert (large[:, ::16, ::16] == small).all()


def test_large_decoded_pictures_are_reduced_where_they_do_not_fit():
    images = np.zeros((2, 1000, 1000, 3), np.uint8)
    assert pictures.fit_images(images, 1).shape == (2, 1000, 1000, 3)
    assert pictures.fit_images(images, 3).shape == (2, 500, 500, 3)


def test_a_video_with_a_decoder_shows_picture_map_and_tokens():
    """What was just written is framed among the tokens, where it hides no picture."""
    moment = blank_moment(grid=(4, 4))
    moment.written[0, 1, 2] = True
    [frame] = videos.planner_frames([moment], [0], SQUARE, decoder=blow_up)
    tiles = frame[-canvas.GAP - pictures.TILE:-canvas.GAP]
    is_orange = (tiles == pictures.WRITTEN).all(2).any(0)
    tokens_x = 2 * canvas.GAP + 2 * pictures.TILE + videos.TILE_GAP
    assert is_orange.any()
    assert np.flatnonzero(is_orange).min() >= tokens_x
    picture = tiles[:, canvas.GAP:canvas.GAP + pictures.TILE]
    assert (picture == 0).all()
