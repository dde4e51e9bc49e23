"""Folders of pictures as tokens: exact where they can be, refused in one line where they cannot."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

import data
from formats import meta_file
from sources import _palette, _pictures, avatars, images
from sources._pictures import Picture

BLACK = (0, 0, 0)
RED = (255, 0, 0)
WHITE = (255, 255, 255)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of pictures, F, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("F").mkdir()
    return Path("F")


def made(name="made", **options):
    """Run the source on F and read what it wrote.  ->  meta, {split: (tokens (n, S, S), labels)}"""
    options = data.Make("images", **(dict(folder="F", name=name, image_size=4) | options))
    data.make(images, data.ROOT / name, options)
    meta = meta_file.read_meta(data.ROOT / name)
    rows = {}
    for split_name in data.SPLITS:
        split = data.Split(data.ROOT / name, split_name, meta)
        tokens, labels = split.rows(np.arange(len(split)))
        rows[split_name] = tokens.reshape(-1, *meta["grid"]), labels
    return meta, rows


def decoded(meta, rows):
    """The pictures that tokens stand for, of both splits.  ->  (n, S, S, 3) uint8"""
    tokens = np.concatenate([rows["train"][0], rows["val"][0]])
    return np.array(meta["palette"], np.uint8)[tokens]


def save(array, name, **options):
    """Write an array as a picture in F, in a folder of its own if the name says so."""
    path = Path("F", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def save_pixel_art(n, size=4, n_colours=5, name="{}.png"):
    """n random pictures of few colours.  ->  (n, size, size, 3) uint8"""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (n_colours, 3))
    pictures = colours[rng.integers(0, n_colours, (n, size, size))].astype(np.uint8)
    for i, picture in enumerate(pictures):
        save(picture, name.format(i))
    return pictures


def as_set(pictures):
    return {picture.tobytes() for picture in pictures}


def fill(colour, size=4):
    """A picture of one colour.  ->  (size, size, 3) uint8"""
    return np.full((size, size, 3), colour, np.uint8)


def one_picture(array=None, path=None, size=4):
    """What a picture is read as.  ->  (size, size, 3) uint8, or None"""
    if path is None:
        path = "picture.png"
        Image.fromarray(array).save(path)
    return _pictures.load(Picture(Path(path)), size)


# What comes out


def test_pixel_art_stays_exact():
    """Few colours: every pixel is kept, a tenth is held out, and nothing is there twice."""
    pictures = save_pixel_art(30)
    meta, rows = made()
    assert meta["vocab"] == len(meta["palette"]) == 5
    assert meta["grid"] == [4, 4]
    assert [len(rows[split][0]) for split in data.SPLITS] == [27, 3]
    assert len(as_set(pictures)) == 30
    assert as_set(decoded(meta, rows)) == as_set(pictures)


def test_class_folders_are_the_classes():
    """Labels count the folders in order of their names; hidden and other files play no part."""
    for i in range(10):
        save(fill((i, 0, 0)), f"zebra/{i}.png")
        save(fill((i, 99, 0)), f"חתול/{i}.png")
        save(fill((i, 0, 99)), f"ant/{i}.PNG")
        save(fill((i, 7, 7)), f".hidden/{i}.png")
        save(fill((i, 7, 7)), f"ant/._{i}.png")
    Path("F/notes.txt").write_text("no picture")
    Path("F/empty").mkdir()
    meta, rows = made()
    assert meta["n_classes"] == 3
    assert meta["class_names"] == ["ant", "zebra", "חתול"]
    labels = np.concatenate([rows["train"][1], rows["val"][1]])
    kinds = decoded(meta, rows)[:, 0, 0, 1:].tolist()
    assert len(labels) == 30
    expected = {0: [0, 99], 1: [0, 0], 2: [99, 0]}
    assert kinds == [expected[label] for label in labels]


def test_a_flat_folder_has_no_classes():
    """Without --name the data are called like the folder."""
    for folder, name in (("F", "F"), ("F/", "F"), ("F/..", Path.cwd().name), ("", "images")):
        assert images.folder_name(data.Make("images", folder=folder)) == name
    save_pixel_art(10)
    meta, rows = made()
    assert meta["n_classes"] == 0
    assert meta["class_names"] == []
    assert not rows["train"][1].any()


def test_a_group_is_never_split():
    """Files of one group agree up to the separator, also across folders."""
    for i in range(5):
        for j, place in enumerate(("a", "b", "b")):
            save(fill((i, 0, j)), f"{place}/{i}_{j}.png")
    pictures = images.find_pictures(Path("F"))
    splits = images.split_pictures(Path("F"), pictures, ["a", "b"], "_")
    groups = {split: {group(picture) for picture in splits[split]} for split in splits}
    assert groups["train"] | groups["val"] == set("01234")
    assert not groups["train"] & groups["val"]
    assert [len(splits[split]) for split in data.SPLITS] == [12, 3]
    assert len(made("groups", group_by="_")[1]["val"][0]) == 3
    assert len(made("alone")[1]["val"][0]) == 1


def group(picture):
    return picture.path.name.split("_")[0]


def test_the_same_command_makes_the_same_tokens(monkeypatch):
    """Also where the colours are chosen from a sample of the pixels of some pictures."""
    monkeypatch.setattr(_palette, "N_SAMPLE_PICTURES", 10)
    monkeypatch.setattr(_palette, "N_SAMPLE_PIXELS", 50)
    rng = np.random.default_rng(0)
    for i in range(20):
        save(rng.integers(0, 256, (9, 7, 3)), f"{i}.png")
    meta, rows = made("one", palette=16)
    again, same_rows = made("two", palette=16)
    assert meta["palette"] == again["palette"]
    assert meta["vocab"] == 16
    for split in data.SPLITS:
        assert np.array_equal(rows[split][0], same_rows[split][0])


def test_colours_are_chosen_from_a_sample(monkeypatch):
    """No more pictures and pixels are read for the colours than the constants say."""
    pictures = [Picture(Path("F", f"{i}.png")) for i in range(20)]
    rng = np.random.default_rng(0)
    for picture in pictures:
        save(rng.integers(0, 256, (4, 4, 3)), picture.path.name)
    every = _palette.sample_pixels(pictures, 4)
    assert len(np.unique(every, axis=0)) == len(every) == 20 * 16
    monkeypatch.setattr(_palette, "N_SAMPLE_PICTURES", 10)
    monkeypatch.setattr(_palette, "N_SAMPLE_PIXELS", 50)
    some = _palette.sample_pixels(pictures, 4)
    assert len(some) == len(as_set(some)) == 50
    assert as_set(some) < as_set(every)


def test_the_split_depends_on_names_alone():
    """The folder may move, and its pictures may change."""
    paths = [Path("F", f"{i}.png") for i in range(50)]
    moved = [Path("elsewhere", path.name) for path in paths]
    names = []
    for folder, some_paths in ((Path("F"), paths), (Path("elsewhere"), moved)):
        splits = images.split_pictures(folder, [Picture(path) for path in some_paths], [], "")
        names.append([picture.path.name for picture in splits["val"]])
    assert names[0] == names[1]
    assert len(names[0]) == 5
    assert names[0] != [path.name for path in paths[:5]]


def test_colours_are_the_means_of_what_is_near():
    """Two clouds of colours and a palette of two: each pixel gets the mean of its cloud."""
    rng = np.random.default_rng(0)
    for i in range(20):
        centre = np.array([40, 60, 80]) if i % 2 else np.array([200, 180, 160])
        save(centre + rng.integers(-9, 10, (4, 4, 3)), f"{i}.png")
    meta, rows = made(palette=2)
    assert np.abs(np.array(meta["palette"]) - [[40, 60, 80], [200, 180, 160]]).max() <= 2
    for tokens in rows["train"][0]:
        assert len(np.unique(tokens)) == 1


def test_frequent_colours_weigh_more():
    """The mean of 15 black pixels and one of value 96 is 6."""
    for i in range(20):
        picture = fill(BLACK)
        picture[0, 0] = 96
        save(fill(WHITE) if i % 2 else picture, f"{i}.png")
    meta, _ = made(palette=2)
    assert meta["palette"] == [[6, 6, 6], [255, 255, 255]]


def test_the_nearest_colour_is_the_nearest():
    """Against all distances, one by one."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (9, 3)).astype(np.uint8)
    pixels = rng.integers(0, 256, (3, 5, 5, 3)).astype(np.uint8)
    distances = np.square(pixels[..., None, :].astype(int) - palette).sum(-1)
    chosen = _palette.nearest(pixels, palette)
    assert chosen.shape == (3, 5, 5)
    picked = np.take_along_axis(distances, chosen[..., None], -1)
    assert (picked[..., 0] == distances.min(-1)).all()


def test_pictures_are_read_in_chunks(monkeypatch):
    """Chunks are no larger than asked for, and the tokens are those of one chunk."""
    save_pixel_art(30)
    _, whole = made("whole")
    monkeypatch.setattr(_pictures, "CHUNK", 4 * 16)
    _, rows = made("chunks")
    assert np.array_equal(rows["train"][0], whole["train"][0])
    _, chunks = images.make(data.Make("images", folder="F", image_size=4))
    sizes = [(split, len(tokens)) for split, tokens, _ in chunks]
    assert sizes == [("train", 4)] * 6 + [("train", 3), ("val", 3)]


# Sizes


def test_larger_pictures_keep_their_mean_colour():
    """Smooth pictures of sides 8 to 100, shrunk to 4 x 4."""
    for side in (8, 13, 16, 100):
        ramp = np.linspace(0, 255, side)
        picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 99), -1).astype(np.uint8)
        small = one_picture(picture)
        assert small.shape == (4, 4, 3)
        assert np.abs(small.mean((0, 1)) - picture.mean((0, 1))).max() < 2
        assert small[0, 0, 0] < small[3, 0, 0] and small[0, 0, 1] < small[0, 3, 1]


def test_a_fine_chequerboard_becomes_grey():
    """Averaging, not picking: no pixel of 64 x 64 stays black or white at 4 x 4."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(one_picture(board).astype(int) - 127).max() <= 1


def test_pictures_of_twice_the_size_are_averaged():
    """Each pixel is the mean of 2 x 2, as on any power of two."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    means = picture.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(one_picture(picture) - means).max() <= 1


@pytest.mark.parametrize("height, width", [(4, 10), (10, 4), (8, 20), (21, 9)])
def test_the_centre_is_kept(height, width):
    """A red square in the middle of white fills the tokens."""
    picture = np.full((height, width, 3), 255, np.uint8)
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    picture[top:top + side, left:left + side] = RED
    small = one_picture(picture)
    assert np.abs(small.astype(int) - RED).mean() < 12
    assert one_picture(picture.swapaxes(0, 1)).shape == (4, 4, 3)


def test_resizing_is_that_of_guided_diffusion():
    """Against its function, written down again for one size: 37 x 50 to 8 x 8."""
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3)).astype(np.uint8)
    image = Image.fromarray(picture)
    image = image.resize((25, 18), Image.Resampling.BOX)
    image = image.resize((12, 9), Image.Resampling.BOX)
    image = image.resize((11, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(one_picture(picture, size=8), np.asarray(image)[:, 1:9])


# Kinds of pictures


def test_transparency_is_white(capsys):
    """Clear pixels are white, half clear ones half white; this is said once."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, :, 3] = 255
    rgba[1, :, 3] = 128
    for i in range(5):
        save(rgba, f"{i}.png")
    meta, rows = made()
    picture = decoded(meta, rows)[0]
    assert (picture[0] == 0).all()
    assert (picture[1] == 127).all()
    assert (picture[2:] == 255).all()
    assert capsys.readouterr().out.count("5 pictures have an alpha channel") == 1


def test_palettes_with_a_clear_colour_are_put_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((0, 0), 1)
    for name in ("clear.png", "clear.gif"):
        image.save(name, transparency=0)
        picture = one_picture(path=name)
        assert picture[0, 0].tolist() == list(RED)
        assert picture[3, 3].tolist() == list(WHITE)


def test_16_bits_become_8():
    """Values are divided by 257, not clipped."""
    values = np.array([0, 257, 30_000, 65_535] * 4, np.uint16).reshape(4, 4)
    picture = one_picture(values)
    assert picture[0, :, 0].tolist() == [0, 1, 117, 255]


def test_other_kinds_of_pictures_are_read():
    """Grey, black and white, CMYK, the first frame of an animation, photographs on their side."""
    assert one_picture(np.full((4, 4), 77, np.uint8))[0, 0].tolist() == [77] * 3
    assert one_picture(np.eye(4) > 0)[0].tolist() == [[255] * 3] + [[0] * 3] * 3
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save("cmyk.tif")
    assert one_picture(path="cmyk.tif")[0, 0].tolist() == list(RED)
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLACK, WHITE)]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    assert one_picture(path="moving.gif")[0, 0].tolist() == list(RED)
    picture = fill(BLACK, 32)
    picture[:16] = WHITE
    exif = Image.Exif()
    exif[0x0112] = 6                    # the camera was held on its side
    Image.fromarray(picture).save("turned.jpg", exif=exif)
    turned = one_picture(path="turned.jpg")
    assert turned[:, 0].max() < 9 and turned[:, 3].min() > 246


def test_names_in_any_script():
    """Also spaces, quotes, line breaks, and bytes that are no UTF-8; of files and of classes."""
    no_unicode = os.fsdecode(b"\xff\xfe")
    names = ["été", "猫 犬", "👩‍🚀", "a'b\"c", "line\nbreak", no_unicode]
    for i, name in enumerate(names):
        save(fill((i, 0, 0)), f"{name}/{name}.png")
        save(fill((i, 0, 1)), f"{name}/2{name}.png")
    Path("F", names[-1], f"{names[-1]}3.png").write_bytes(b"")
    meta, rows = made()
    assert meta["n_classes"] == len(names)
    assert sum(len(rows[split][0]) for split in data.SPLITS) == 2 * len(names)
    assert "".join(meta["class_names"]).encode()


# What is refused, and what is left out


def spoil_some(n_good):
    """n_good pictures in F, and files that are none.  ->  names of those that are none"""
    rng = np.random.default_rng(0)
    for i in range(n_good):
        save(rng.integers(0, 256, (40, 40, 3)), f"good{i:02}.jpg")
    jpeg = Path("F/good00.jpg").read_bytes()
    Image.open("F/good00.jpg").save("whole.png")
    png = Path("whole.png").read_bytes()
    bad = {
        "cut.jpg": jpeg[:len(jpeg) // 2],
        "cut.png": png[:len(png) // 2],
        "empty.png": b"",
        "head.png": png[:20],
        "huge.png": png[:16] + struct.pack(">II", 2**20, 2**20) + png[24:],
        "text.png": b"Once upon a time",
        "zeros.gif": bytes(100),
    }
    for name, raw in bad.items():
        Path("F", name).write_bytes(raw)
    return sorted(bad)


def test_corrupt_files_are_listed_and_left_out(capsys):
    bad = spoil_some(20)
    _, rows = made()
    assert sum(len(rows[split][0]) for split in data.SPLITS) == 20
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert len(lines) == 1
    assert f"{len(bad)} files cannot be read and are left out" in lines[0]
    assert sum(name in lines[0] for name in bad) == _pictures.N_SHOWN
    assert lines[0].endswith(", ...")


@pytest.mark.filterwarnings("ignore")       # of Pillow, about what is spoiled
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_spoiled_files_are_pictures_or_none(ending):
    """Whatever bytes are changed or missing, reading ends with a picture or without one."""
    rng = np.random.default_rng(0)
    path = Path("F", f"a.{ending}")
    save(rng.integers(0, 256, (9, 9, 3)), path.name)
    whole = path.read_bytes()
    n_none = 0
    for _ in range(60):
        raw = bytearray(whole)
        raw[rng.integers(min(len(raw), 64))] ^= 1 << rng.integers(8)
        path.write_bytes(raw[:rng.integers(len(raw) // 2, 2 * len(raw))])
        picture = _pictures.load(Picture(path), 4)
        assert picture is None or picture.shape == (4, 4, 3)
        n_none += picture is None
    assert 0 < n_none < 60


def test_too_few_pictures_are_refused():
    """None, one, one group; and none in one of the splits that can be read."""
    assert "F holds no pictures, nor do the folders in it (.bmp .gif" in refusal(made)
    Path("F/notes.txt").write_text("no picture")
    assert "holds no pictures" in refusal(made)
    Path("F/0_a.png").write_text("no picture")
    assert "no picture can be read ('0_a.png')" in refusal(made)
    save(np.eye(4) * 255, "0_a.png")
    assert "a single picture" in refusal(made)
    save(np.eye(4) * 255, "0_b.png")
    assert "a single group of 2, is too few" in refusal(made, group_by="_")
    _, rows = made()
    assert len(rows["train"][0]) == len(rows["val"][0]) == 1


@pytest.mark.parametrize("split, said", [("val", "1 val pictures"), ("train", "1 training pict")])
def test_splits_without_a_picture_are_refused(split, said):
    """A file that is cut off after its header is found late, but nothing is left behind."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for name in ("a.png", "b.png"):
        save(picture, name)
    splits = images.split_pictures(Path("F"), images.find_pictures(Path("F")), [], "")
    path = splits[split][0].path
    path.write_bytes(path.read_bytes()[:2000])
    assert f"none of {said}" in refusal(made)
    assert not Path("data/made").exists()


def test_folders_that_are_none_are_refused():
    Path("file").write_text("")
    for name in ("", "nowhere", "file"):
        assert f"no folder {name!r}: name a folder" in refusal(made, folder=name)
    save(fill(RED), "a.png")
    save(fill(RED), "class/b.png")
    assert "F holds 1 pictures and also folders of pictures" in refusal(made)


def test_small_pictures_are_refused():
    save_pixel_art(10, size=8)
    save(np.zeros((7, 30, 3)), "wide.png")
    said = refusal(made, image_size=8)
    assert "1 of 11 pictures are smaller than 8 x 8 ('wide.png', 30 x 7)" in said
    assert len(made(image_size=7)[1]["train"][0]) == 10


def test_palettes_are_checked(capsys):
    """At least 2 colours and no more than there are."""
    for i in range(10):
        save(fill(RED), f"{i}.png")
    assert "have no colour but [255, 0, 0]" in refusal(made)
    save_pixel_art(20)
    for palette in (1, -1, 5000):
        options = dict(folder="F", palette=palette)
        said = refusal(lambda options=options: made_by_command(**options))
        assert f"palette is {palette}; it must" in said
    assert "image_size is 1; it must be at least 2" in refusal(made, image_size=1)
    capsys.readouterr()
    assert made(palette=6)[0]["vocab"] == 5
    said = capsys.readouterr().out
    assert "the training pictures have 5 colours, so the palette has 5, not 6" in said
    assert made("fewer", palette=3)[0]["vocab"] == 3
    assert "so the palette" not in capsys.readouterr().out


def made_by_command(**options):
    """As data.main does it: the options are checked first."""
    options = data.check_options(data.Make("images", **options))
    data.make(images, data.ROOT / "made", options)


# Avatars


def test_avatars_are_as_promised():
    """8,000 different faces on white, every class in both splits; made on first use."""
    meta, splits = data.load("avatars")
    assert meta["grid"] == [16, 16]
    assert meta["vocab"] == len(meta["palette"]) == 96
    assert meta["class_names"] == [
        "long", "long_glasses", "long_hat", "short", "short_glasses", "short_hat"
    ]
    assert meta["n_classes"] == 6
    tokens = []
    for split, n in (("train", 7200), ("val", 800)):
        assert len(splits[split]) == n
        x, y = splits[split].rows(np.arange(n))
        assert set(y) == set(range(6))
        tokens.append(x)
    tokens = np.concatenate(tokens)
    assert len(np.unique(tokens, axis=0)) == 8000
    assert len(np.unique(tokens)) == 96
    corners = np.array(meta["palette"])[tokens[:, 0]]
    assert (corners == 255).all(1).mean() > 0.9, "the background is white"
    assert avatars.PACKED.stat().st_size < 500_000


def test_avatars_packed_from_pictures_are_those_of_the_images_source(monkeypatch):
    """pack() and `data.py images` agree, and what is packed can be unpacked."""
    for label in ("a", "b"):
        save_pixel_art(20, size=16, n_colours=120, name=f"{label}/{label}{{}}.png")
    avatars.pack("F", Path("packed.npz"))
    monkeypatch.setattr(avatars, "PACKED", Path("packed.npz"))
    meta, rows = made(image_size=16, palette=96)
    unpacked, chunks = avatars.make(None)
    assert unpacked["palette"] == meta["palette"]
    assert unpacked["class_names"] == ["a", "b"]
    for split, tokens, labels in chunks:
        assert np.array_equal(tokens, rows[split][0])
        assert np.array_equal(labels, rows[split][1])


def test_worker_processes_read_the_same_in_order(monkeypatch):
    save_pixel_art(40)
    spoil_some(20)
    pictures = images.find_pictures(Path("F"))
    alone = list(_pictures.load_all(pictures, 4))
    monkeypatch.setattr(_pictures, "PARALLEL_FROM", 1)
    monkeypatch.setattr(_pictures, "N_AHEAD", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    together = list(_pictures.load_all(pictures, 4))
    assert len(together) == len(alone) > 40
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
