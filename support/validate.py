"""Validation: losses of the averaged networks on fixed noise, bits per token, and a few samples."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import config
import data
import methods
from diffusion import objectives
from formats import meta_file
from support import hub, logs, pictures, runtime, videos
from support.chunked_head import hidden_at_sites, map_logits
from support.text import is_text, load_text

N_BINS = 10                 # of noise level
BATCH = 64                  # sequences at once
SIZES = (512, 256, 128, 64, 32, 16, 8)      # sequences of a validation, by what it may cost
PROBES = (8, 64)            # sequences of what is measured for it
BUDGET = 0.1                # of the training since the validation before
N_STEPS = 32                # of the pictures' sampler
N_STEPS_PER_FRAME = 8       # for videos

# What a loss is called in the log, and the second number beside it
METRIC_NAMES = {
    objectives.planner_loss: ("bce", "auroc"),
    objectives.denoiser_loss: ("ce", "accuracy"),
}


class Size(NamedTuple):
    """How much a validation looks at."""
    n_sequences: int
    n_pictures: int


def size_within(
    seconds: float, cfg: config.Config, spec: methods.Spec, nets: dict[str, Callable],
    split: data.Split, device: torch.device,
) -> Size:
    """What fits into so many seconds, half of them for pictures.

    Measured by validations of a few sequences, the second of more if it may, since the first also
    loads and compiles. A sequence costs about two passes of each network, a picture one in each
    step of its sampler.
    """
    if cfg.eval_sequences:
        return Size(cfg.eval_sequences, cfg.eval_samples)
    for n in PROBES:
        began = time.perf_counter()
        validate(cfg, spec, nets, split, device, n)
        taken = time.perf_counter() - began
        per_sequence = taken / n
        if taken > seconds * PROBES[0] / PROBES[1]:
            break
    n_steps = N_STEPS_PER_FRAME * spec.n_frames if spec.is_video else N_STEPS
    n_sequences = next((n for n in SIZES if n * per_sequence <= seconds / 2), SIZES[-1])
    left = seconds - n_sequences * per_sequence
    n_pictures = max(1, int(left / (per_sequence * n_steps / 2)))
    return Size(n_sequences, min(cfg.eval_samples, n_pictures))


@torch.no_grad()
def validate(cfg: config.Config, spec: methods.Spec, nets: dict[str, Callable], split: data.Split,
             device: torch.device, n_sequences: int) -> dict[str, Any]:
    """Losses over all noise levels and per bin of level, and bits per token.  -> {metric: value or
    list}"""
    n = split.whole_repeats(n_sequences)
    n_distinct = min(n, len(split))
    rng = runtime.generator("validation")  # the same draws for every seed
    x0, label = (torch.from_numpy(y) for y in split.spread_subset(n))
    t = (torch.randperm(n, generator=rng)[:, None] + 0.5) / n
    fill_rng = runtime.generator("validation fills")
    rows = {}
    metrics = {}
    for i in torch.arange(n).split(BATCH):
        known = data.known_mask(spec.meta, x0[i])
        tasks = methods.make_tasks(spec, x0[i], label[i], known, rng, t[i])
        if methods.learns_on_fills(spec):
            with runtime.autocast(device, cfg.dtype):
                on_fills = methods.with_planner_on_fills(
                    spec, tasks, nets["denoiser"], x0[i], t[i], label[i], known, fill_rng,
                    runtime.device_of_doubles(device),
                )
            name = "planner" if spec.method.has_trunk else "planner_fill"
            tasks[name] = on_fills["planner"]
        for name, task in tasks.items():
            metrics[name] = METRIC_NAMES.get(task.loss, ("loss", "accuracy"))
            net = nets[name.removesuffix("_fill")]
            with runtime.autocast(device, cfg.dtype):
                rows.setdefault(name, []).append(measure(net, task, device))
    scores = {}
    for name, parts in rows.items():
        scores |= summarise(torch.cat(parts).double(), name, metrics[name])
    x0, label = (y.to(runtime.device_of_doubles(device)) for y in (x0, label))
    known = data.context_mask(spec.meta, x0, cfg.context_frames)
    with runtime.autocast(device, cfg.dtype):
        bounds = methods.bits_per_token(
            spec, nets, x0, label, known, rng, n_distinct=n_distinct
        )
    for name, (bits, error) in bounds.items():
        scores[f"val_bits_{name}"] = round(bits, 5)
        scores[f"val_bits_{name}_se"] = round(error, 5)
    return scores


def measure(net: Callable, task: objectives.Task, device: torch.device) -> Tensor:
    """Of each token in the loss: level, target, loss, and logit (planner) or is_right
    (denoiser).  -> (n, 4)"""
    level = task.t.expand(task.xt.shape).flatten()[task.sites]
    task = task.to(device)

    def loss_and_prediction(logits, target, *loss_args):
        prediction = logits if logits.dim() == 1 else (logits.argmax(-1) == target).float()
        return torch.stack([task.loss(logits, target, *loss_args), prediction], -1)

    hidden = hidden_at_sites(net, task)
    measured = map_logits(net, hidden, loss_and_prediction, task.target, *task.loss_args)
    columns = [level[:, None], task.target.float().cpu()[:, None], measured.float().cpu()]
    return torch.cat(columns, -1)


def summarise(rows: Tensor, name: str, metrics: tuple[str, str]) -> dict[str, Any]:
    """Means of measure()'s rows (n, 4), over all and per bin of level; None for an empty bin."""
    level, target, loss, prediction = rows.unbind(-1)
    bins = (level * N_BINS).long().clamp_max(N_BINS - 1)
    groups = [torch.ones_like(bins, dtype=torch.bool), *(bins == b for b in range(N_BINS))]
    losses = [round(loss[g].mean().item(), 5) if g.any() else None for g in groups]
    if metrics[1] == "auroc":
        others = [auroc(target[g], prediction[g]) for g in groups]
    else:
        others = [round(prediction[g].mean().item(), 5) if g.any() else None for g in groups]
    out = {}
    for metric, values in zip(metrics, (losses, others), strict=True):
        out[f"val_{name}_{metric}"] = values[0]
        out[f"val_{name}_{metric}_bins"] = values[1:]
    return out


def auroc(is_noise: Tensor, score: Tensor) -> float | None:
    """None where only one class occurs."""
    from sklearn.metrics import roc_auc_score

    if not 0 < is_noise.sum() < len(is_noise):
        return None
    return round(float(roc_auc_score(is_noise, score)), 5)


def validate_and_log(
    cfg: config.Config, spec: methods.Spec, nets: dict[str, Callable], split: data.Split, it: int,
    log: logs.Log, device: torch.device, train_s: float,
) -> str:
    """Within BUDGET of train_s, the seconds of training before it.  -> the scores in one line"""
    began = time.perf_counter()
    size = size_within(BUDGET * train_s, cfg, spec, nets, split, device)
    scores = validate(cfg, spec, nets, split, device, size.n_sequences)
    seconds = round(time.perf_counter() - began, 2)
    log.write(it, **scores, val_sequences=size.n_sequences, val_s=seconds)
    if size.n_pictures:
        with log.never_fatal("samples.png"):
            draw_samples(cfg, spec, nets, split, it, log, device, size.n_pictures)
    words = [
        f"{key.removeprefix('val_')} {value and round(value, 4)}"
        for key, value in scores.items()
        if not key.endswith(("_bins", "_se"))
    ]
    return f"{it:>6}: " + ", ".join([*words, f"{size.n_sequences} sequences, {seconds} s"])


def find_decoder(
    path: str, folder: Path, meta: dict, device: torch.device | str
) -> pictures.Decoder | None:
    """The decoder that a flag names, or else the one kept in the run's folder, if any. That of text
    with a tokenizer draws the tokens as words."""
    if is_text(meta) and "tokenizer" in meta and not path:
        return pictures.word_decoder(load_text(folder, meta).word)
    kept = None if path else meta_file.kept_file(folder, meta, "decoder")
    hub.refuse_decoder(folder, kept)
    chosen = path or kept
    return pictures.load_decoder(str(chosen), meta, device) if chosen else None


def labels_in_turn(n: int, n_classes: int, number: int) -> Tensor:
    """n labels. If there are more classes they are spread over them, and move on by one with each
    validation.  -> (n,)"""
    i = torch.arange(n)
    if n >= n_classes:
        return i % n_classes
    return (i * n_classes // n + number) % n_classes


@torch.no_grad()
def draw_samples(
    cfg: config.Config, spec: methods.Spec, nets: dict[str, Callable], split: data.Split, it: int,
    log: logs.Log, device: torch.device, n: int,
) -> None:
    """samples.png of n samples, classes in turn, by the method's first sampler; with its video
    for wandb."""
    home = runtime.device_of_doubles(device)
    number = math.ceil(it / cfg.eval_interval) if cfg.eval_interval else 0
    label = labels_in_turn(n, max(1, spec.n_classes), number).to(home)
    real, real_label = (torch.from_numpy(y).to(home) for y in split.spread_subset(n))
    known = data.context_mask(spec.meta, real, cfg.context_frames)
    if known is not None:
        label = real_label
    rng = runtime.generator("pictures", device=home)
    sampler = next(iter(spec.method.samplers))
    n_steps = N_STEPS_PER_FRAME if spec.is_video else N_STEPS
    with runtime.autocast(device, cfg.dtype):
        x = methods.starting_tokens(spec, label, rng, sampler, known, real)
        recording = videos.Recording(x, spec.grid, n)
        states = methods.sample(
            spec, nets, label, n_steps=n_steps, generator=rng, known=known, x=x
        )
        for state in states:
            if log.wandb:
                recording.add(state)
        if log.wandb:
            after = methods.p_noise_after(
                spec, nets, state, label, sampler=sampler, known=known
            )
    folder = Path(cfg.out_dir)
    tokens = state.x.view(-1, *spec.grid).cpu().numpy()
    decoder = None
    try:
        decoder = find_decoder("", folder, spec.meta, device)
    except SystemExit as error:     # pictures never end a training
        print(f"tokens are shown without their decoder: {error}")
    title = [sampler, f"{n_steps} steps", f"iteration {it}"]
    pictures.samples_png(
        folder / "samples.png", tokens, label.tolist(), spec.meta, title, decoder
    )
    if log.wandb:
        frames = videos.planner_frames(
            recording.finish(after), label.tolist(), spec.meta, title, decoder
        )
        videos.write_video(folder / "planner", frames)
        caption = f"iteration {it}, {state.nfe.float().mean():.0f} network calls"
        if spec.n_classes:
            names = [pictures.label_name(i, spec.meta) for i in label.tolist()]
            caption += f": {', '.join(names)}"
        log.media(it, caption, samples=folder / "samples.png", planner=folder / "planner.mp4")
