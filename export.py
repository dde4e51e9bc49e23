"""Share a model: weights, config, a model card and a picture.   python export.py out/digits DIR

Writes model.safetensors (averaged weights), config.json, README.md, samples.png and the run's
decoder, if it has one. The folder serves sample.py, evaluate.py and --init-from as a run does.
"""

import typing
from dataclasses import dataclass

import config


@dataclass(frozen=True)
class ExportOptions:
    """What is shared, and where."""
    run: str                                # folder of a run
    folder: str                             # of the export: a new one, or one of this program
    license: str = ""                       # of the weights, for the model card, as mit; "": unsaid
    push: str = ""                          # OWNER/NAME on the Hugging Face hub to upload it to


@dataclass(frozen=True)
class Flags(ExportOptions):
    """Write the averaged weights of a run into a folder to share, and upload it if asked to."""

    GROUPS: typing.ClassVar = {"export": ExportOptions}


if __name__ == "__main__":
    flags = config.load(Flags)

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import data
import methods
from formats import meta_file
from formats.flags import as_flags
from support import checkpoint, exports, hub, logs, pictures, runtime, sampling
from support.checkpoint import Run, load_run
from support.validate import find_decoder

CARD = "README.md"
PICTURE = "samples.png"
# As those of sample.py: `python sample.py DIR` draws the same picture
N_STEPS = 64
N_STEPS_PER_FRAME = 4
N_SAMPLES = 8               # where there are no classes, or too many for one of each
N_NAMES = 10                # classes that the card names
PAPERS = {
    "masked": "masked diffusion ([arXiv:2406.07524](https://arxiv.org/abs/2406.07524))",
    "ddpd": "planned denoising ([arXiv:2410.06264](https://arxiv.org/abs/2410.06264))",
    "gidd": "GIDD ([arXiv:2503.04482](https://arxiv.org/abs/2503.04482))",
    "forcing": "Diffusion Forcing ([arXiv:2407.01392](https://arxiv.org/abs/2407.01392))",
}
# Columns of evaluate.csv that the card leaves out: what is the same in all rows, or is no score
NOT_SHOWN = (
    "run", "it", "train_seed", "s_per_sample", "commit", "device", "settings", "lo", "hi",
)
# Settings of a row that have a column
IN_COLUMNS = ("it", "weights", "sampler", "nfe", "seed", "n_samples", "guidance")

# The picture


class Start(NamedTuple):
    """What is known before sampling."""
    labels: Tensor                          # (n,)
    known_tokens: Tensor | None = None      # (n, N)
    known: Tensor | None = None             # (n, N) bool


def starting_point(spec: methods.Spec) -> Start:
    """Every class once, or a few samples; videos and given tokens start from held-out ones."""
    n_classes = spec.n_classes
    n = n_classes if 0 < n_classes <= N_NAMES else N_SAMPLES
    if not spec.is_video and not spec.meta["given"]:
        return Start(torch.arange(n).clamp_max(n_classes))
    options = spec.config
    _, splits = data.load(options["data"], options["image_size"], options["grey_levels"])
    real, label = (torch.from_numpy(y) for y in splits["val"].spread_subset(n))
    n_given = max(options["context_frames"], 2)
    return Start(label, real, data.context_mask(spec.meta, real, n_given))


@torch.no_grad()
def draw_picture(folder: Path, start: Start) -> None:
    """samples.png by the method's first sampler, from what was exported: it is read once."""
    device = runtime.pick_device()
    run = load_run(folder, device)
    spec = run.spec
    decoder = find_decoder("", folder, spec.meta, device)
    has_levels = spec.is_video and spec.method.has_own_levels
    n_steps = N_STEPS_PER_FRAME if has_levels else N_STEPS
    sampler = next(iter(spec.method.samplers))
    request = sampling.Request(sampler, {"n_steps": n_steps}, 0, *start)
    tokens = sampling.draw_batch(run, request, range(request.n)).tokens.reshape(-1, *spec.grid)
    title = [sampler, f"{n_steps} steps"]
    labels = start.labels.tolist()
    pictures.samples_png(folder / PICTURE, tokens, labels, spec.meta, title, decoder)


# The model card


def last_validation(run: Run) -> dict[str, Any]:
    """The line of log.jsonl, not later than the weights; {} where there is none."""
    path = run.folder / "log.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text().split("\n")[:-1]:      # a line that a kill left torn has no end
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path} cannot be read: {runtime.first_line(error)}") from None
        if "val_sequences" in row and row["it"] <= run.it:
            found = row
    return found


def evaluations(run: Run) -> list[dict[str, str]]:
    """Rows of evaluate.csv that judged these weights, with the options that have no column."""
    rows = []
    for row in logs.read_rows(run.folder / "evaluate.csv"):
        if row.get("it") != str(run.it) or not row.get("settings"):
            continue
        settings = json.loads(row["settings"])
        options = [f"{key} {value}" for key, value in settings.items()
                   if key not in IN_COLUMNS and value]
        rows.append({key: row[key] for key in row if key not in NOT_SHOWN})
        rows[-1]["options"] = ", ".join(options)
    return rows


def cell(value: Any) -> str:
    """A value in a table: on one line, without bars."""
    return " ".join(str(value).split()).replace("|", "/")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def training_flags(options: dict[str, Any]) -> str:
    """The flags of train_ddpd.py that state a run's config."""
    stated = {}
    for field in fields(config.Config):
        value = options[field.name]
        if value != field.default and field.name not in checkpoint.PRIVATE:
            stated[field.name] = value
    return as_flags(stated)


def front_matter(run: Run, license: str) -> str:
    """What the hub reads of a model card."""
    lines = ["library_name: nanoDDPD", "tags:", "- discrete-diffusion", f"- {run.spec.name}"]
    if license:
        lines.append(f"license: {license}")
    return "\n".join(["---", *lines, "---"])


def facts(run: Run) -> str:
    """A table of the data, the networks and their training."""
    spec = run.spec
    options, meta = spec.config, spec.meta
    names = meta["class_names"][:N_NAMES]
    more = ", ..." if spec.n_classes > N_NAMES else ""
    classes = f", {spec.n_classes} classes ({', '.join(names)}{more})" if names else ""
    sizes = [
        f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
        for name, net in run.nets.items()
    ]
    shape = ("n_layer", "n_embd", "n_head", "patch")
    batch = ("batch_size", "grad_accumulation_steps")
    rates = [f"{name} {options[f'{name}_lr']}" for name in run.nets]
    rows = {
        "data": f"{meta['name']}: {' x '.join(map(str, spec.grid))} tokens of {spec.vocab} ids"
                + classes,
        "method": f"{spec.name}, {PAPERS.get(spec.name) or PAPERS[options['method']]}",
        "parameters": ", ".join(sizes),
        "shape": ", ".join(f"{name} {options[name]}" for name in shape),
        "training": f"{run.it} iterations, "
                    + ", ".join(f"{name} {options[name]}" for name in batch),
        "learning rates": f"{', '.join(rates)} at width {options['base_width']}",
        "averaging": f"EMA, ema_decay {options['ema_decay']}",
        "seed": options["seed"],
    }
    if options["init_from"]:
        rows["start"] = "weights of another run"
    return table(["", ""], list(map(list, rows.items())))


def with_error(scores: dict[str, Any], key: str) -> str:
    """A score, and its standard error where it has one."""
    error = scores.get(f"{key}_se")
    return f"{scores[key]} ± {error}" if error is not None else str(scores[key])


def numbers(run: Run) -> str:
    """The last validation, and rows of evaluate.csv, as far as there are any."""
    parts = []
    if validation := last_validation(run):
        rows = [
            [key.removeprefix("val_"), with_error(validation, key)] for key in validation
            if key.startswith("val_") and not key.endswith(("_bins", "_se", "_sequences", "_s"))
        ]
        parts.append(
            f"Validation at iteration {validation['it']}, {validation['val_sequences']} held-out "
            "sequences (nats, bits per token):"
        )
        parts.append(table(["metric", "value"], rows))
    if rows := evaluations(run):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        columns = [column for column in columns if any(row.get(column) for row in rows)]
        parts.append("Samples, by `evaluate.py`:")
        parts.append(table(columns, [[row.get(key, "") for key in columns] for row in rows]))
    return "\n\n".join(parts) or "None were measured."


def card(run: Run, name: str, license: str) -> str:
    """README.md of an export that a reader calls `name`."""
    word = shlex.quote(name)
    where = ", with this folder at PATH" if name.startswith("PATH/") else ""
    decoder = ""
    if "decoder" in run.spec.meta:
        file = run.spec.meta["decoder"]["file"]
        decoder = (
            f"`{file}` turns tokens into pictures. It is TorchScript, that is code which sample.py "
            "and evaluate.py run: from the hub they ask you to name it by `--decoder`.\n\n"
        )
    return f"""{front_matter(run, license)}

# {cell(name.removeprefix(hub.PREFIX).removeprefix("PATH/"))}

A discrete diffusion model of nanoDDPD.

![Samples]({PICTURE})

{facts(run)}

All settings are in `{exports.CONFIG}`, under `config`.

## Numbers

{numbers(run)}

## Use

In the folder of nanoDDPD's code{where}:

```bash
python sample.py {word}
python evaluate.py {word}
python train_ddpd.py {training_flags(run.spec.config)} --init-from {word} --out-dir out/continued
```

The last line goes on from these weights, at iteration 0 and with new optimizers; without
`--init-from` it trains the model anew. It and `evaluate.py` need the data, `data/` in that folder.

{decoder}From Python:

```python
from support.checkpoint import load_run
run = load_run({name!r})        # run.nets are PyTorch modules
```
"""


# Files


def check_flags(flags: Flags) -> None:
    """Refuse, before anything is read or written, what ends in nothing."""
    if flags.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", flags.license):
        raise SystemExit(f"--license {flags.license} is no name of a license, as mit or cc-by-4.0")
    if flags.push:
        hub.check_name(flags.push)
        hub.client()
    if flags.run.startswith(hub.PREFIX) or exports.is_export(Path(flags.run)):
        raise SystemExit(f"{flags.run} is exported already: name the run itself")


def make_folder(folder: Path) -> None:
    """A folder that holds nothing, or an older export."""
    with runtime.one_line_errors(OSError):
        is_free = not folder.exists() or not any(folder.iterdir())
        if not is_free and not exports.is_ours(folder):
            raise SystemExit(f"{folder} holds files, but no export of this program: choose another")
        folder.mkdir(parents=True, exist_ok=True)


def main(flags: Flags) -> None:
    check_flags(flags)
    run = load_run(flags.run)
    kept = [meta_file.kept_file(run.folder, run.spec.meta, key) for key in meta_file.KEPT]
    start = starting_point(run.spec)
    folder = Path(flags.folder)
    make_folder(folder)
    before = exports.read_values(folder)["digest"] if exports.is_ours(folder) else ""
    name = hub.PREFIX + flags.push if flags.push else f"PATH/{folder.resolve().name}"
    checkpoint.write_export(folder, run)
    meta_file.copy_kept_files(run.folder, folder, run.spec.meta)
    if before and exports.read_values(folder)["digest"] != before:
        print(f"{folder} held other weights, which are replaced; files made from them stay")
    draw_picture(folder, start)
    (folder / CARD).write_text(card(run, name, flags.license))
    files = [exports.WEIGHTS, exports.CONFIG, CARD, PICTURE]
    files += [path.name for path in kept if path]
    print(f"wrote {', '.join(files)} in {folder}")
    if flags.push:
        print(f"uploaded to {hub.upload(folder, flags.push, files)}")


if __name__ == "__main__":
    with runtime.one_voice():
        main(flags)
