"""Exported runs: read as they were written, refused where they were changed, and the hub."""

import csv
import inspect
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import meta_of, refusal, samples_of, save_run, tiny_config

import config
import evaluate
import export
import sample
import train_ddpd
from formats import meta_file
from support import checkpoint, exports, hub
from support.checkpoint import digest, load_checkpoint, load_run

FILES = {"model.safetensors", "config.json", "README.md", "samples.png"}


@pytest.fixture(scope="module", autouse=True)
def run(tmp_path_factory):
    """A run of 8x8 digits, exported to ex/digits.  -> its folder"""
    folder = tmp_path_factory.getbasetemp() / "test_export"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_ddpd.main(tiny_config(
            "digits", "--max-iters", 3, "--wandb-name", "secret", "--image-size", 8,
        ))
        export.main(export.Flags("out/digits", "ex/digits"))
    return Path("out/digits")


@pytest.fixture
def spoiled():
    """A copy of the export, to be changed."""
    folder = Path("ex/spoiled")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("ex/digits", folder)
    return folder


def weights_of(run):
    return {name: net.state_dict() for name, net in run.nets.items()}


# What is exported


def test_an_export_is_the_runs_averages(run):
    """Its networks, its data and its iteration; training's and the owner's files stay behind."""
    exported = load_run("ex/digits")
    assert {path.name for path in Path("ex/digits").iterdir()} == FILES
    assert digest(weights_of(exported)) == digest(load_checkpoint(run)["ema"])
    assert digest(weights_of(exported)) != digest(load_checkpoint(run)["nets"])
    original = load_run(run)
    assert (exported.it, exported.spec.meta) == (3, original.spec.meta)
    public = original.spec.config | {"out_dir": "", "wandb_name": ""}
    assert exported.spec.config == public
    written = "".join(Path("ex/digits", name).read_text() for name in ("config.json", "README.md"))
    assert "secret" not in written and "out/digits" not in written


def test_the_same_export_twice_has_the_same_bytes(run):
    """In a new folder, and over an old export."""
    before = {name: Path("ex/digits", name).read_bytes() for name in FILES}
    for folder in ("ex/again", "ex/digits"):
        export.main(export.Flags(str(run), folder))
        for name in FILES - {"README.md"}:
            assert Path(folder, name).read_bytes() == before[name], name


def test_weights_are_read_without_this_program():
    flat = safetensors.torch.load_file("ex/digits/model.safetensors")
    planner = load_run("ex/digits").nets["planner"]
    assert torch.equal(flat["planner.head.weight"], planner.head.weight)


# In place of a run


def test_an_export_is_sampled_as_its_run_is(run):
    """The same tokens; its picture is what `python sample.py DIR` draws."""
    picture = Path("ex/digits/samples.png").read_bytes()
    tokens = []
    for folder in (str(run), "ex/digits"):
        sample.main(sample.Flags(folder, n_video=0))
        with np.load(samples_of(folder) / "samples.npz") as file:
            tokens.append(file["tokens"])
    assert np.array_equal(*tokens)
    assert (samples_of("ex/digits") / "samples.png").read_bytes() == picture


def test_an_export_is_judged_as_its_run_is(run):
    """The same row; the card shows it, and none that judged other weights."""
    rows = []
    for folder in (str(run), "ex/digits"):
        evaluate.main(evaluate.Flags((folder,), nfe=(4,), n=20, temperature=0.5))
        with open(Path(folder) / "evaluate.csv") as file:
            rows.append(list(csv.DictReader(file))[-1])
    assert (Path("ex/digits") / "evaluate.png").exists()
    for column in ("judge_acc", "frechet", "bits_per_token", "nfe"):
        assert rows[0][column] == rows[1][column] != ""
    with open(run / "evaluate.csv", "a") as file:
        other = rows[0] | {"it": "2", "judge_acc": "0.1234"}
        csv.DictWriter(file, list(other)).writerow(other)
    export.main(export.Flags(str(run), "ex/judged"))
    card = Path("ex/judged/README.md").read_text()
    assert f"| {rows[0]['judge_acc']} |" in card and "| temperature 0.5 |" in card
    assert "0.1234" not in card


def test_rows_of_other_weights_are_not_taken_for_these(run, capsys):
    """An export of other weights into the same folder, at the same iteration, is judged anew."""
    flags = evaluate.Flags(("ex/again",), nfe=(4,), n=20, bits=False)
    export.main(export.Flags(str(run), "ex/again"))
    evaluate.main(flags)
    evaluate.main(flags)
    assert capsys.readouterr().out.count("from evaluate.csv") == 1
    train_ddpd.main(tiny_config("other", "--max-iters", load_run(run).it, "--seed", 5))
    export.main(export.Flags("out/other", "ex/again"))
    evaluate.main(flags)
    printed = capsys.readouterr().out
    assert "held other weights, which are replaced" in printed
    assert "from evaluate.csv" not in printed


def test_training_starts_from_an_export(run):
    flags = ["--init-from", "ex/digits", "--planner-lr", 0, "--denoiser-lr", 0]
    train_ddpd.main(tiny_config("continued", "--max-iters", 1, *flags))
    assert digest(load_checkpoint("out/continued")["nets"]) == digest(load_checkpoint(run)["ema"])
    assert "n_layer 1, not 2: --n-layer 1" in refusal(
        train_ddpd.main, tiny_config("deeper", "--n-layer", 2, "--init-from", "ex/digits")
    )


def test_no_run_is_trained_in_an_export():
    cfg = tiny_config("x", "--out-dir", "ex/digits")
    assert "ex/digits holds files, but no run" in refusal(train_ddpd.main, cfg)


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "ex/digits is not writable" in refusal(sample.main, sample.Flags("ex/digits"))
    assert "ex/digits is not writable" in refusal(evaluate.main, evaluate.Flags(("ex/digits",)))


# What is refused


def rewrite(folder, change):
    """As whoever forges an export would: with a digest that fits."""
    values, weights = exports.read(folder)
    change(values, weights)
    state = {key: values[key] for key in ("it", "config", "meta")} | {"ema": weights}
    exports.write(folder, values | {"digest": digest(state)}, weights)


def edit(key, value):
    """Changes config.json alone, as by hand."""
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values["config"][key] = value
        (folder / "config.json").write_text(json.dumps(values))
    return change


def forge(change):
    return lambda folder: rewrite(folder, change)


def put_nan(values, weights):
    weights["denoiser"]["head.weight"][0, 0] = torch.nan


def put_foreign(folder):
    safetensors.torch.save_file({"encoder.weight": torch.zeros(3)}, folder / "model.safetensors")


def another_run(folder):
    """The weights of a run of the same shape."""
    safetensors.torch.save_file(
        {key: value + 1 for key, value in
         safetensors.torch.load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize("change, said", [
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda folder: (folder / "config.json").write_text('{"config": 3}'), "holds no config"),
    (lambda folder: (folder / "config.json").write_text('{"config": {}}'), "has no it"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "cannot be read"),
    (put_foreign, "model.safetensors must be of planner, denoiser"),
    (another_run, "config.json or model.safetensors has changed"),
    (edit("n_head", 2), "config.json or model.safetensors has changed"),
    (edit("n_layer", 9), "planner has 1 blocks, n_layer is 9"),
    (edit("n_layer", "a"), "n_layer is 'a', not int"),
    (edit("colour", 3), "config has an unknown key 'colour'"),
    (edit("nets", "single"), "nets = single needs denoiser_process = uniform"),
    (forge(put_nan), "denoiser.head.weight is not finite"),
    (forge(lambda values, weights: weights.pop("planner")), "must be of planner, denoiser"),
    (forge(lambda values, weights: weights["planner"].update({"head.weight": torch.zeros(2, 16)})),
     "planner.head.weight is not of (1, 16)"),
    (forge(lambda values, weights: weights["planner"].update({"more": torch.zeros(2)})),
     "planner must hold"),
    (forge(lambda values, weights: values["meta"].update(vocab=18)),
     "planner.tok_emb.weight is not of (19, 16)"),
    (forge(lambda values, weights: values.update(it=-1)), "it is -1"),
])
def test_what_is_wrong_with_an_export_is_said(spoiled, change, said):
    change(spoiled)
    line = refusal(load_run, spoiled)
    assert line.startswith("ex/spoiled is no exported run: ") and said in line, line


def test_missing_weights_are_named(spoiled):
    (spoiled / "model.safetensors").unlink()
    line = refusal(load_run, spoiled)
    assert line == "no run in ex/spoiled: there is no ckpt.pt and no model.safetensors"


@pytest.mark.parametrize("flags, said", [
    (["out/none", "ex/new"], "no run in out/none"),
    (["out/digits", "out/digits"], "out/digits holds files, but no export"),
    (["ex/digits", "ex/new"], "ex/digits is exported already"),
    (["hf://a/b", "ex/new"], "hf://a/b is exported already"),
    (["out/digits", "ex/new", "--license", "a: b"], "--license a: b is no name"),
    (["out/digits", "ex/new", "--push", "a"], "a is not OWNER/NAME"),
])
def test_what_cannot_be_exported_is_refused(flags, said):
    """Before anything is written."""
    assert said in refusal(export.main, config.load(export.Flags, flags))
    assert not Path("ex/new").exists()


# The decoder


class Decoder(torch.nn.Module):
    def forward(self, tokens):
        return (tokens[:, None].float() / 4 - 1).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A run whose pictures a decoder makes.  -> its folder"""
    folder = tmp_path_factory.mktemp("decoded") / "run"
    scratch = folder.parent / "decoder.jit"
    torch.jit.script(Decoder()).save(scratch)
    entry = {"file": "decoder.jit", "sha256": meta_file.file_sha256(scratch)}
    save_run(folder, meta_of(9, [4, 4], 3, decoder=entry))
    shutil.copy(scratch, folder)
    return folder


def test_the_decoder_travels(decoded):
    export.main(export.Flags(str(decoded), "ex/decoded"))
    assert {path.name for path in Path("ex/decoded").iterdir()} == FILES | {"decoder.jit"}
    sample.main(sample.Flags("ex/decoded", n_steps=1, n_video=0))
    with open("ex/decoded/decoder.jit", "ab") as file:
        file.write(b"more")
    flags = sample.Flags("ex/decoded", n_steps=1, n_video=0)
    assert "decoder.jit has changed" in refusal(sample.main, flags)


def test_a_changed_decoder_is_not_exported(decoded, tmp_path):
    changed = shutil.copytree(decoded, tmp_path / "changed")
    (changed / "decoder.jit").write_bytes(b"another")
    flags = export.Flags(str(changed), str(tmp_path / "ex"))
    assert "decoder.jit has changed" in refusal(export.main, flags)
    assert not (tmp_path / "ex").exists()


# The model card


def front_matter(folder):
    return yaml.safe_load(Path(folder, "README.md").read_text().split("---\n")[1])


def test_the_card_has_the_hubs_front_matter(run):
    export.main(export.Flags(str(run), "ex/licensed", license="mit"))
    tags = ["discrete-diffusion", "ddpd-mask"]
    assert front_matter("ex/digits") == {"library_name": "nanoDDPD", "tags": tags}
    assert front_matter("ex/licensed")["license"] == "mit"


def test_the_card_says_what_was_trained(run):
    card = Path("ex/digits/README.md").read_text()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_sequences" in row][-1]
    assert f"| denoiser_ce | {last['val_denoiser_ce']} |" in card
    assert f"{last['val_bits_masked']} ± {last['val_bits_masked_se']}" in card
    n_params = sum(p.numel() for p in load_run(run).nets["planner"].parameters())
    assert f"planner {n_params / 1e6:.2f} M" in card
    assert "8 x 8 tokens of 17 ids, 10 classes" in card


@pytest.mark.parametrize("flags", [
    [], ["--compile", "--grid", 8, 8, "--vocab", 17, "--n-classes", 10],
    ["--method", "gidd", "--p-uniform", 0.2],
])
def test_the_cards_command_trains_with_the_same_config(flags, tmp_path):
    """Every flag that is not private."""
    folder = tmp_path / "run"
    cfg, _ = save_run(folder, meta_of(17, [8, 8], 10), *flags)
    export.main(export.Flags(str(folder), str(tmp_path / "my export")))
    card = (tmp_path / "my export" / "README.md").read_text()
    words = shlex.split(re.search(r"^python train_ddpd.py (.*)$", card, re.MULTILINE)[1])
    read = config.load(argv=words)
    assert (read.init_from, read.out_dir) == ("PATH/my export", "out/continued")
    for name, value in vars(cfg).items():
        if name not in checkpoint.PRIVATE:
            assert getattr(read, name) == value, name


def test_words_of_the_data_break_no_table(tmp_path):
    meta = meta_of(9, [4, 4], 2, class_names=["a|b", "c\nd"])
    save_run(tmp_path / "run", meta)
    export.main(export.Flags(str(tmp_path / "run"), str(tmp_path / "ex")))
    assert "2 classes (a/b, c d) |\n" in (tmp_path / "ex" / "README.md").read_text()


def test_a_video_is_exported():
    """Its picture goes on from held-out frames."""
    flags = ["--method", "forcing", "--data", "bounce", "--max-iters", 1, "--eval-samples", 0]
    train_ddpd.main(tiny_config("video", *flags))
    export.main(export.Flags("out/video", "ex/video"))
    assert load_run("ex/video").spec.is_video
    assert "arXiv:2407.01392" in Path("ex/video/README.md").read_text()


# The hub: a folder of the machine stands for it


class FakeHub:
    """huggingface_hub as far as it is used, with its signatures; models are folders in hub/."""

    class HfApi:
        def create_repo(self, repo_id, *, exist_ok=False):
            folder = Path("hub") / repo_id
            assert exist_ok or not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            return f"https://hub.invalid/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns=None, commit_message=None):
            copy(folder_path, Path("hub") / repo_id, allow_patterns)

    @staticmethod
    def snapshot_download(repo_id, *, local_dir=None, allow_patterns=None):
        if not (Path("hub") / repo_id).is_dir():
            raise ValueError(f"Repository Not Found: {repo_id}\nand more")
        copy(Path("hub") / repo_id, local_dir, allow_patterns)


def copy(source, target, patterns):
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in patterns:
        if (Path(source) / name).exists():
            shutil.copy(Path(source) / name, target)


@pytest.fixture
def fake_hub(monkeypatch):
    shutil.rmtree("hub", ignore_errors=True)
    shutil.rmtree(hub.FOLDER, ignore_errors=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub)


def push(run, folder, name="me/model"):
    export.main(export.Flags(str(run), folder, push=name))


def test_a_pushed_run_is_sampled_and_trained_on(run, fake_hub, capsys):
    """What is pushed is the export alone, and what is sampled stays where it was downloaded."""
    (Path("ex/digits") / "mine.txt").write_text("not to be shared")
    push(run, "ex/digits")
    assert "uploaded to https://hub.invalid/me/model" in capsys.readouterr().out
    assert {path.name for path in Path("hub/me/model").iterdir()} == FILES
    assert "python sample.py hf://me/model\n" in Path("hub/me/model/README.md").read_text()
    pulled = load_run("hf://me/model")
    assert pulled.folder == Path("out/hub/me/model")
    assert digest(weights_of(pulled)) == digest(load_checkpoint(run)["ema"])

    sample.main(sample.Flags("hf://me/model", n_steps=1, n_video=1))
    files = {path.name for path in samples_of(pulled.folder).iterdir()}
    assert files >= {"samples.png", "samples.npz", "planner.gif"}
    evaluate.main(evaluate.Flags(("hf://me/model",), nfe=(2,), n=10))
    assert (pulled.folder / "evaluate.png").exists()

    flags = ["--init-from", "hf://me/model", "--planner-lr", 0, "--denoiser-lr", 0]
    train_ddpd.main(tiny_config("pulled", "--max-iters", 1, *flags))
    assert digest(load_checkpoint("out/pulled")["nets"]) == digest(load_checkpoint(run)["ema"])


def test_a_strangers_decoder_runs_only_when_named(decoded, fake_hub):
    """It is downloaded; a local copy of the folder is the user's own."""
    push(decoded, "ex/pushed")
    flags = sample.Flags("hf://me/model", n_steps=1, n_video=0)
    path = "out/hub/me/model/decoder.jit"
    assert f"add --decoder {path}" in refusal(sample.main, flags)
    sample.main(sample.Flags("hf://me/model", n_steps=1, n_video=0, decoder=path))


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/..", "a/", "/a", "a/b c"])
def test_names_that_are_none_are_refused(name, fake_hub):
    assert "is not OWNER/NAME" in refusal(load_run, f"hf://{name}")
    assert not hub.FOLDER.exists()


def test_what_the_hub_refuses_is_said_in_one_line(run, fake_hub, monkeypatch):
    line = refusal(load_run, "hf://me/none")
    assert line == "hf://me/none cannot be downloaded: Repository Not Found: me/none"

    def refuse(*args, **kwargs):
        raise OSError("401 Unauthorized\nlog in")

    monkeypatch.setattr(FakeHub.HfApi, "create_repo", refuse)
    assert refusal(push, run, "ex/new") == "me/model cannot be uploaded: 401 Unauthorized"


def test_the_client_is_asked_for_where_it_is_missing(run, monkeypatch):
    """Before anything is exported."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal(load_run, "hf://me/model")
    assert "pip install huggingface_hub" in refusal(push, run, "ex/unpushed")
    assert not Path("ex/unpushed").exists()


def test_the_fake_hub_has_the_real_signatures():
    """Each parameter is one of the client's, and taken in the same way."""
    real = pytest.importorskip("huggingface_hub")
    pairs = [
        (FakeHub.HfApi.create_repo, real.HfApi.create_repo),
        (FakeHub.HfApi.upload_folder, real.HfApi.upload_folder),
        (FakeHub.snapshot_download, real.snapshot_download),
    ]
    for fake, original in pairs:
        known = inspect.signature(original).parameters
        for name, parameter in inspect.signature(fake).parameters.items():
            assert parameter.kind == known[name].kind, f"{original.__name__}: {name}"
