"""Text: through a tokenizer and back, prompts, and what is said of samples."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, meta_of, refusal, samples_of, save_run
from safetensors.numpy import save_file
from test_data import made

import config
import data
import evaluate
import methods
import sample
from formats import meta_file
from sources import _tokenizer, text, tokens
from support import metrics, pictures, runtime, starts, training, validate, videos
from support.checkpoint import load_run
from support.text import Text, load_text, place_prompt

LINES = [
    "The moon is a harsh mistress: früh am Morgen.",
    "  indented, with\ttabs  and   spaces",
    "",
    "月が綺麗ですね 🌙",
    "\r",
    "the moon, the moon, the moon and the mistress of the moon",
]
BOOK = "\n".join(LINES * 40)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(BOOK.encode())
    return Path("book.txt")


def make_words(**options):
    """data/words, through a tokenizer trained on the book.  ->  meta, {split: (tokens, labels)}"""
    defaults = dict(file="book.txt", name="words", length=4)
    return made(text, **(defaults | options))


def write_tokenizer():
    """words.json, with an added token that the text does not know."""
    tokenizer = _tokenizer.train([BOOK], 300)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save("words.json")
    return tokenizer


# Through a tokenizer and back


def test_the_round_trip_is_exact(book, capsys):
    """The windows of both splits, decoded, are the file without the tokens that fill no window."""
    meta, splits = make_words(train_tokenizer=300)
    said = re.search(r"([.\d]+) bytes per token", capsys.readouterr().out)
    assert meta["vocab"] == 300
    assert meta["grid"] == [1, 4]
    words = load_text(data.ROOT / "words", meta)
    middle = text.char_start(book, int(len(BOOK.encode()) * 0.9))
    parts = {"train": BOOK.encode()[:middle], "val": BOOK.encode()[middle:]}
    for split, raw in parts.items():
        sequences = splits[split][0]
        decoded = words.to_bytes(sequences.ravel())
        assert raw.startswith(decoded)
        assert len(words.encode(raw[len(decoded):].decode())) < 4
        assert words.to_str(sequences.ravel()) == decoded.decode()
    n_tokens = sum(len(words.encode(raw.decode())) for raw in parts.values())
    assert float(said[1]) == pytest.approx(len(BOOK.encode()) / n_tokens, abs=0.01)


@pytest.mark.parametrize("sizes", [(7, 2**18), (7, 5), (64, 20)])
def test_pieces_of_any_size_hold_the_same_text(book, monkeypatch, sizes):
    """Blocks may end inside of a character; a long line is cut before its last word."""
    monkeypatch.setattr(text, "BLOCK", sizes[0])
    monkeypatch.setattr(text, "MAX_PARAGRAPH", sizes[1])
    size = len(BOOK.encode())
    pieces = [piece for some in text.paragraphs(book, 0, size) for piece in some]
    assert "".join(pieces) == BOOK
    assert len(pieces) > 100
    if sizes[1] < 100:
        assert max(map(len, pieces)) <= sum(sizes)


def test_the_held_out_part_begins_with_a_character(book):
    """Nine tenths of 100 characters of three bytes and two of one are no whole characters."""
    book.write_text("月" * 100 + "ab")
    raw = book.read_bytes()
    assert raw[int(len(raw) * 0.9)] >= 0b1000_0000
    meta, splits = make_words(train_tokenizer=257, length=2)
    words = load_text(data.ROOT / "words", meta)
    assert words.to_str(splits["val"][0].ravel()).startswith("月月月")
    assert words.to_str(splits["train"][0].ravel()).startswith("月" * 80)


def test_tokens_do_not_depend_on_the_pieces(book, monkeypatch):
    """No token reaches over a cut: they are those of the whole text."""
    tokenizer = write_tokenizer()
    whole = tokenizer.encode(BOOK).ids
    for block in (7, 1000, 2**20):
        monkeypatch.setattr(text, "BLOCK", block)
        stream = text.read_tokens(book, 0, len(BOOK.encode()), tokenizer)
        assert np.concatenate(list(stream)).tolist() == whole


def test_a_tokenizer_file_is_taken_as_it_is(book):
    """Its added tokens count, and are found in the text."""
    write_tokenizer()
    book.write_text(f"<|endoftext|>{BOOK}")
    meta, splits = make_words(tokenizer="words.json")
    assert meta["vocab"] == 301
    assert splits["train"][0][0, 0] == 300
    assert load_text(data.ROOT / "words", meta).word(300) == "<|endoftext|>"


def test_bytes_are_the_default(book):
    same = [make_words(name=f"b{i}", tokenizer=word) for i, word in enumerate(["", "bytes"])]
    for meta, splits in same:
        assert meta["vocab"] == 256
        assert "tokenizer" not in meta
        train = splits["train"][0].astype(np.uint8).tobytes()
        assert len(train) == 4 * int(len(BOOK.encode()) * 0.9 / 4)
        assert BOOK.encode().startswith(train)


def test_what_a_tokenizer_changes_is_said(book, capsys):
    """One that makes all letters small."""
    tokenizer = write_tokenizer()
    tokenizer.normalizer = _tokenizer.library().normalizers.Lowercase()
    tokenizer.save("lower.json")
    make_words(tokenizer="lower.json")
    assert "lower.json does not keep the text of book.txt exactly" in capsys.readouterr().out


@pytest.mark.parametrize("options, said", [
    (dict(tokenizer="none.json"), "no file 'none.json'"),
    (dict(tokenizer="book.txt"), "book.txt is no tokenizer of the tokenizers library"),
    (dict(tokenizer="words.json", train_tokenizer=300), "exclude each other"),
    (dict(train_tokenizer=256), "--train-tokenizer 256"),
    (dict(train_tokenizer=300, file="latin.txt"), "latin.txt is not UTF-8 text"),
    (dict(tokenizer="words.json", length=400), "too few for sequences of 400"),
])
def test_text_that_cannot_be_made_is_refused(book, options, said):
    write_tokenizer()
    Path("latin.txt").write_bytes("früh am Morgen ".encode("latin-1") * 99)
    assert said in refusal(make_words, **options)
    assert not (data.ROOT / "words").exists()


def test_a_missing_library_is_named(book, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refusal(make_words, train_tokenizer=300)
    make_words()                            # bytes need none


PEAK_MB = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import data
from sources import text


def peak_mb():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in status if row.startswith("VmHWM")).split()[1]) / 1024


text.BLOCK = 2**16
peaks = []
for name in ("short", "long"):
    options = data.Make("text", file=f"{name}.txt", name=name, tokenizer=sys.argv[2])
    data.make(text, data.ROOT / name, options)
    peaks.append(peak_mb())
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tokenizer, sizes", [("bytes", (4, 128)), ("words.json", (1, 4))])
def test_memory_does_not_grow_with_the_file(book, tokenizer, sizes):
    """From a short file to one that is longer by 124, or 3, MB."""
    write_tokenizer()
    n_bytes = len(BOOK.encode())
    for name, mb in zip(("short", "long"), sizes, strict=True):
        Path(f"{name}.txt").write_bytes(BOOK.encode() * (mb * 2**20 // n_bytes))
    command = [sys.executable, "-c", PEAK_MB, ROOT, tokenizer]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 4, done.stdout


def test_finished_tokens_of_text(book):
    """Flat, without labels, with the file of their tokenizer."""
    tokenizer = write_tokenizer()
    ids = np.array(tokenizer.encode(BOOK).ids)
    ids = ids[:len(ids) // 8 * 8].reshape(-1, 8)
    save_file({"indices": ids}, "t.safetensors")
    meta, splits = made(tokens, file="t.safetensors", name="t", tokenizer="words.json")
    assert (meta["vocab"], meta["grid"], meta["n_classes"]) == (301, [1, 8], 0)
    first = load_text(data.ROOT / "t", meta).to_str(splits["train"][0][0])
    assert first in BOOK
    assert (splits["train"][1] == 0).all()


# A run on text


def save_text_run(name, meta):
    """An untrained run on data/words in out/<name>."""
    save_run(f"out/{name}", meta, "--data", "words")
    meta_file.copy_kept_files(data.ROOT / "words", Path("out") / name, meta)


def draw(run, *flags):
    """sample.py with these flags.  ->  tokens (n, N)"""
    argv = [f"out/{run}", "--n-steps", 3, "--n-video", 0, *flags]
    sample.main(config.load(sample.Flags, list(map(str, argv))))
    saved = np.load(samples_of(f"out/{run}") / "samples.npz")["tokens"]
    return saved.reshape(len(saved), -1)


def test_the_tokenizer_travels_with_the_run(book, capsys):
    """Training copies it; samples are text without the data; a changed one is refused."""
    meta, _ = make_words(train_tokenizer=300, length=16)
    cfg = config.load(argv=["--data", "words", "--out-dir", "out/opened"])
    spec = methods.spec_of(asdict(cfg), meta)
    Path("out/opened").mkdir(parents=True)
    training.open_run(cfg, spec, runtime.World(0, 1, torch.device("cpu")))
    kept = Path("out/opened/tokenizer.json")
    assert kept.read_bytes() == (data.ROOT / "words" / "tokenizer.json").read_bytes()

    save_text_run("words", meta)
    data.ROOT.rename("elsewhere")
    drawn = draw("words", "--n", 2, "--prompt", "the moon")
    printed = capsys.readouterr().out
    words = load_text(Path("out/words"), meta)
    for sequence in drawn:
        assert words.to_str(sequence).startswith("the moon")
        assert words.to_str(sequence) in printed
    assert re.findall(r"^--- sample (\d+)$", printed, re.M) == ["0", "1"]
    with open("out/words/tokenizer.json", "a") as file:
        file.write(" ")
    assert "tokenizer.json has changed" in refusal(draw, "words")


def test_a_run_on_tokens_is_judged_by_bytes(book, capsys):
    meta, _ = make_words(train_tokenizer=300, length=16)
    save_text_run("words", meta)
    argv = ["out/words", "--n", "4", "--nfe", "2"]
    evaluate.main(config.load(evaluate.Flags, argv))
    assert " n-gram bits/byte " in capsys.readouterr().out
    header, row = Path("out/words/evaluate.csv").read_text().splitlines()
    column = header.split(",").index("ngram_bits")
    assert 1 < float(row.split(",")[column]) < 12


def test_bits_are_of_bytes_however_tokens_cut_them():
    """Two bytes in a token, or one in a token: the same text has the same bits."""
    raw = np.frombuffer((BOOK * 2).encode()[:8000], np.uint8).reshape(-1, 40).astype(np.int64)
    pairs = raw[:, ::2] * 256 + raw[:, 1::2]

    def to_bytes(row):
        return row.astype(">u2").tobytes()

    single = metrics.TextMetrics({"train": Split(raw), "val": Split(raw[:9])})
    double = metrics.TextMetrics({"train": Split(pairs), "val": Split(pairs[:9])}, to_bytes)
    for name in ("ngram_bits", "words", "distinct"):
        assert single.val[0][name] == double.val[0][name]
    assert single.val[0]["ngram_bits"] < 1.5


class Split:
    def __init__(self, rows):
        self.all = rows

    def __len__(self):
        return len(self.all)

    def rows(self, index):
        return self.all[index], np.zeros(len(index), np.int64)

    def spread_subset(self, n):
        return self.rows(np.arange(n))


def test_tokens_are_drawn_as_words_in_lines(book):
    """Eight cells in a line; masks are painted over their cells, and each word has a picture."""
    meta, splits = make_words(train_tokenizer=300, length=16)
    decoder = validate.find_decoder("", data.ROOT / "words", meta, "cpu")
    x = splits["train"][0][:2].reshape(2, 1, 16)
    x[0, 0, 9] = meta["vocab"]              # a mask
    lines = pictures.in_lines(x, meta)
    assert lines.shape == (2, 2, 8)
    tiles = pictures.pictures(lines, meta, decoder)
    height, width = pictures.WORD_H, pictures.WORD_W
    assert tiles.shape == (2, 2 * height, 8 * width, 3)
    assert (tiles[0, height:, width:2 * width] == pictures.MASK).all()
    word = load_text(data.ROOT / "words", meta).word(int(x[1, 0, 9]))
    assert (tiles[1, height:, width:2 * width] == pictures.word_picture(word)).all()


def test_long_words_end_in_an_ellipsis():
    """In smaller letters at first; no letter is cut."""
    def letters(word):
        return (pictures.word_picture(word) != pictures.PAPER).any(-1)

    room = pictures.WORD_W - pictures.WORD_MARGIN
    for n in range(1, 40):
        assert not letters("m" * n)[:, room:].any()
    rows = [np.flatnonzero(letters(word).any(1)) for word in ("m" * 8, "m" * 12)]
    assert len(rows[0]) > len(rows[1])
    fits = max(n for n in range(1, 40) if not np.array_equal(letters("m" * n), letters("m" * 40)))
    cut = "m" * (fits - 1) + "\u2026"
    assert np.array_equal(letters(cut), letters("m" * 40))


@pytest.mark.parametrize("length, n_shown", [(16, 8), (128, 4), (512, 1)])
def test_tall_texts_are_fewer_in_a_video(book, length, n_shown):
    """Unless a flag says how many."""
    meta, _ = make_words(train_tokenizer=300, length=2)
    decoder = validate.find_decoder("", data.ROOT / "words", meta, "cpu")
    grid = [1, length]
    cfg = config.load(argv=["--data", "words"])
    spec = methods.spec_of(asdict(cfg), meta | dict(grid=grid))
    start = starts.Start([0] * 8, grid)
    for flag, expected in [(None, n_shown), (8, 8), (20, 8), (0, 0)]:
        flags = sample.Flags("x", n_video=flag)
        assert sample.n_in_video(flags, spec, start, decoder) == expected
    moment = videos.Moment(*[np.zeros((n_shown, *grid), kind) for kind in (int, float, bool)],
                           np.zeros(n_shown))
    labels = [0] * n_shown
    [frame] = videos.planner_frames([moment], labels, spec.meta, ["ddpd"], decoder)
    assert frame.shape[0] < videos.MAX_HEIGHT + 100     # the header


# Prompts


TEXT_META = meta_of(256, [1, 24], 0, palette="text")
METHODS = {
    "ddpd": [],
    "masked": ["--nets", "denoiser"],
    "uniform": ["--denoiser-process", "uniform"],
    "single": ["--nets", "single", "--denoiser-process", "uniform"],
    "gidd": ["--method", "gidd"],
    "forcing": ["--method", "forcing", "--noise-granularity", "token"],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_sampler_keeps_the_prompt(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _, spec = save_run(f"out/{name}", TEXT_META, *METHODS[name])
    for sampler in spec.method.samplers:
        if sampler == "self_correct":
            continue
        flags = ["--correct", 2] if name == "gidd" else []
        drawn = draw(name, "--sampler", sampler, "--n", 3, "--prompt", "ab[...]yz", *flags)
        assert drawn.shape == (3, 24)
        assert (drawn[:, :2] == list(b"ab")).all()
        assert (drawn[:, -2:] == list(b"yz")).all()
        assert len(np.unique(drawn[:, 2:-2])) > 5


@pytest.mark.parametrize("prompt, gap, placed", [
    ("abc", 0, {0: b"abc"}),
    ("ab[...]c", 0, {0: b"ab", 9: b"c"}),
    ("ab[...]c", 3, {0: b"ab", 5: b"c"}),
    ("[...]c", 0, {0: b"", 9: b"c"}),
    ("[...]c", 4, {0: b"", 4: b"c"}),
    ("ab [...] c\n", 4, {0: b"ab ", 7: b" c\n"}),
    ("abcdefghi", 0, {0: b"abcdefghi"}),
    ("abcd[...]efgh", 2, {0: b"abcd", 6: b"efgh"}),
])
def test_where_a_prompt_stands(prompt, gap, placed):
    found = place_prompt(prompt, gap, 10, Text())
    assert found == {start: list(part) for start, part in placed.items()}


@pytest.mark.parametrize("prompt, gap, said", [
    ("abcdefghij", 0, "at least 11 tokens; a sequence of this run has 10"),
    ("abcd[...]efgh", 3, "at least 11 tokens"),
    ("a[...]b[...]c", 0, "--prompt has 2 gaps"),
    ("abc", 2, "--gap 2"),
    ("[...]", 0, "--prompt holds no text"),
    ("\udcff", 0, "--prompt is not UTF-8"),
])
def test_prompts_that_do_not_fit_are_refused(prompt, gap, said):
    with pytest.raises(ValueError, match=said):
        place_prompt(prompt, gap, 10, Text())


def test_prompts_are_for_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run("out/grey", meta_of(9, [4, 4], 3))
    save_run("out/text", TEXT_META)
    assert "--prompt is for text" in refusal(draw, "grey", "--prompt", "a")
    assert "exclude" in refusal(draw, "text", "--prompt", "a", "--known", "k.npz")
    assert "--gap is the length" in refusal(draw, "text", "--gap", 3)
    assert "at least 2001 tokens" in refusal(draw, "text", "--prompt", "a\n" * 1000)


# How many samples, and of what


@pytest.mark.parametrize("flags, labels", [
    ([], [0, 1, 2]),
    (["--n", 5], [0, 1, 2, 0, 1]),
    (["--labels", "dog", 3, "cat"], [1, 3, 0]),
    (["--labels", "dog", "cat", "--n", 3], [1, 0, 1]),
    (["--labels", 2, "--n", 2], [2, 2]),
])
def test_numbers_and_names_of_labels(tmp_path, monkeypatch, flags, labels):
    monkeypatch.chdir(tmp_path)
    save_run("out/pets", meta_of(9, [4, 4], 3, class_names=["cat", "dog", "axolotl"]))
    draw("pets", *flags)
    assert np.load(samples_of("out/pets") / "samples.npz")["labels"].tolist() == labels
    assert "did you mean dog?" in refusal(draw, "pets", "--labels", "dogs")
    assert "knows 0 to 2" in refusal(draw, "pets", "--labels", 4)


def test_known_tokens_serve_as_many_samples_as_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run("out/grey", meta_of(9, [4, 4], 3))
    np.savez("known.npz", tokens=np.full((4, 4), 5), mask=np.eye(4, dtype=bool))
    drawn = draw("grey", "--known", "known.npz", "--n", 4)
    assert (drawn.reshape(4, 4, 4)[:, np.eye(4, dtype=bool)] == 5).all()
    run = load_run("out/grey")
    flags = config.load(sample.Flags, ["out/grey", "--known", "known.npz", "--n", "2"])
    assert sample.starting_point(flags, run).labels == [3, 3]


# meta.json of text


def test_a_large_vocabulary_of_text_needs_its_tokenizer():
    meta = meta_of(300, [1, 8], 0, palette="text")
    assert "needs a tokenizer" in meta_file.meta_error(meta)
    meta["tokenizer"] = {"file": "tokenizer.json", "sha256": "0" * 64}
    assert meta_file.meta_error(meta) == ""
    meta["tokenizer"]["file"] = "../tokenizer.json"
    message = meta_file.meta_error(meta)
    assert message.startswith("tokenizer '../tokenizer.json' is not a plain file")


def test_the_config_of_openwebtext_states_what_the_command_makes(book):
    """But for the vocabulary, which is that of GPT-2."""
    cfg = config.load(argv=["owt_gidd_small"])
    write_tokenizer()
    book.write_text(BOOK * 30)
    meta, _ = make_words(tokenizer="words.json", length=512, name="owt")
    assert json.loads(Path("data/owt/meta.json").read_text())["grid"] == list(cfg.grid)
    assert meta["n_classes"] == cfg.n_classes
    argv = ["owt_gidd_small", "--vocab", "301", "--n-layer", "1", "--p-uniform", "0.1"]
    assert training.open_data(config.load(argv=argv))[0].meta == meta
