"""Train a planner and a denoiser.   python train_ddpd.py configs/digits.py      or any number of processes by torchrun

The same command again goes on where the run stopped; everything random is a function of (seed, iteration, micro-batch).
"""

import config

if __name__ == "__main__":
    cfg = config.load()                                                 # before torch: --help and typos answer at once

import copy
import functools
import json
import math
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import costs
import data
import model
import render
import runtime
from diffusion import objectives, processes, samplers

N_BINS = 10             # of noise level
NOISE, EVAL = range(2)  # streams of randomness


class Losses(nn.Module):
    """All networks behind one forward, so that DDP sees one module.  {name: Task} -> (n_nets,) nats"""

    def __init__(self, nets, losses):
        super().__init__()
        self.nets, self.losses = nn.ModuleDict(nets), losses

    def forward(self, tasks):
        return torch.stack([self.one(self.nets[name], self.losses[name], task) for name, task in tasks.items()])

    def one(self, net, loss, task):
        hidden = net.hidden(task.xt, task.t, task.label).flatten(0, 1).index_select(0, task.sites)      # (n, D)
        return model.sum_logits(net, hidden, loss, task.target, *task.more) / max(1, task.n or len(hidden))


def losses_of(cfg):
    """{name of a network: its loss of (logits (n, V), target (n,), ...) -> (n,)}"""
    if cfg.method == "ddpd":
        return objectives.LOSSES
    process, p_uniform = cfg.noise
    plain = {"denoiser": objectives.plain_loss}
    return plain if cfg.weight == "none" else {
        "denoiser": functools.partial(objectives.gidd_loss, p_uniform=p_uniform, process=process)}


def make_tasks(cfg, meta, x0, t, label, rng):
    """What the networks of this config learn from a batch; t (B, 1) is drawn anew by forcing.  -> {name: Task}"""
    known, vocab = data.given(meta, x0), meta["vocab"]
    if cfg.method == "ddpd":
        return objectives.ddpd(x0, t, label, vocab, rng, cfg.nets, cfg.denoiser_process, known)
    process, p_uniform = cfg.noise
    how = (label, vocab, rng, p_uniform, cfg.weight, cfg.clean_share, process)
    if cfg.method == "gidd":
        return objectives.gidd(x0, t, *how, given=known)
    frames = x0.shape[1] if cfg.level_group == "token" else meta["grid"][0]
    levels, waits = processes.draw_levels(len(x0), frames, cfg.level_group, cfg.staircase_share, rng,
                                          cfg.context)
    return objectives.forcing(x0, levels, *how, given=known, waits=waits)


def draw_tasks(cfg, meta, split, order, it, g, n_groups):
    """What the networks learn in micro-batch g of n_groups of iteration `it`.  -> {name: Task} on the host"""
    start, key = (it * n_groups + g) * cfg.batch_size, (it, g)
    if cfg.overfit and cfg.overfit_noise == "fixed":                    # the same sequences, the same noise
        start %= order.n
        key = (0, start)
    rng = runtime.generator(cfg.seed, NOISE, *key)
    x0, label = split.rows(order.take(start, cfg.batch_size))
    x0, label = torch.from_numpy(x0), torch.from_numpy(label)
    if not cfg.overfit:
        label = objectives.drop_labels(label, meta["n_classes"], cfg.label_dropout, rng)
    t = processes.stratified_t(len(x0), rng)
    return make_tasks(cfg, meta, x0, t, label, rng)


def lr_factor(it, cfg):
    """Linear warm-up, then a cosine down to a tenth."""
    if it < cfg.warmup_iters:
        return (it + 1) / cfg.warmup_iters
    done = min(1.0, (it - cfg.warmup_iters) / max(1, cfg.decay_iters - cfg.warmup_iters))
    return 0.55 + 0.45 * math.cos(math.pi * done)


@torch.no_grad()
def validate(cfg, meta, nets, split, device):
    """Losses of the averaged nets on fixed noise draws, over all and per bin of level.  -> {metric: value(s)}"""
    from sklearn.metrics import roc_auc_score

    rng, n = runtime.generator(EVAL), cfg.eval_sequences                # the same draws for every seed
    process, p_uniform = cfg.noise
    x0, label = (torch.from_numpy(y) for y in split.some(n))
    t = (torch.randperm(n, generator=rng)[:, None] + 0.5) / n
    seen = {name: [] for name in nets}                                  # rows of (t, target, loss, verdict)
    for b in torch.arange(n).split(64):
        tasks = make_tasks(cfg, meta, x0[b], t[b], label[b], rng)
        for name, task in tasks.items():
            net, loss, at = nets[name], losses_of(cfg)[name], task.t.expand(task.xt.shape).flatten()[task.sites]
            task = task.to(device)

            def measure(logits, target, *more, loss=loss, name=name):
                verdict = logits if name == "planner" else (logits.argmax(-1) == target).float()
                return torch.stack([loss(logits, target, *more), verdict], -1)

            with runtime.autocast(device, cfg.dtype):
                hidden = net.hidden(task.xt, task.t, task.label).flatten(0, 1).index_select(0, task.sites)
                rows = model.map_logits(net, hidden, measure, task.target, *task.more)
            seen[name].append(torch.cat([at[:, None], task.target.float().cpu()[:, None], rows.float().cpu()], -1))
    out = {}
    for name, rows in seen.items():
        at, target, loss, verdict = torch.cat(rows).double().unbind(-1)
        short, second = ("bce", "auroc") if name == "planner" else ("ce", "accuracy")
        short = "loss" if cfg.method != "ddpd" and cfg.weight != "none" else short
        which = (at * N_BINS).long().clamp_max(N_BINS - 1)
        groups = [torch.ones_like(which, dtype=torch.bool), *(which == i for i in range(N_BINS))]
        first, other = [], []
        for g in groups:
            first.append(round(loss[g].mean().item(), 5) if g.any() else None)
            if name == "denoiser":
                other.append(round(verdict[g].mean().item(), 5) if g.any() else None)
            else:
                has_both = 0 < target[g].sum() < g.sum()
                other.append(round(float(roc_auc_score(target[g], verdict[g])), 5) if has_both else None)
        for metric, values in [(short, first), (second, other)]:
            out[f"val_{name}_{metric}"], out[f"val_{name}_{metric}_bins"] = values[0], values[1:]
    with runtime.autocast(device, cfg.dtype):
        bounds = objectives.bits_per_token(nets, cfg.kind, x0.to(device), label.to(device), meta["vocab"], rng,
                                           p_uniform, process=process, given=data.given(meta, x0.to(device)),
                                           frames=meta["grid"][0] if len(meta["grid"]) == 3 else 1)
    for name, (bits, error) in bounds.items():                          # bits per token, standard error
        out[f"val_bits_{name}"], out[f"val_bits_{name}_se"] = round(bits, 5), round(error, 5)
    return out


@torch.no_grad()
def draw_samples(cfg, meta, nets, split, device, it, log):
    """samples.png of a few samples, classes in turn, by the run's first sampler; with its video for wandb"""
    n_steps = 8 if len(meta["grid"]) == 3 else 32                       # of each frame
    label = torch.arange(cfg.eval_samples, device=device) % max(1, meta["n_classes"])
    rng, shown = runtime.generator(EVAL, device=device), []
    real = torch.from_numpy(split.some(cfg.eval_samples)[0]).to(device)
    process, p_uniform = cfg.noise
    with runtime.autocast(device, cfg.dtype):
        for s in samplers.run(samplers.FITS[cfg.kind][0], cfg.kind, nets, label, meta=meta, generator=rng,
                              n_steps=n_steps, p_uniform=p_uniform, process=process, given=real,
                              known=data.context(meta, real), context=2):
            if log.wandb:
                shown.append([y.unflatten(1, meta["grid"]).cpu().numpy() for y in s[:3]] + [s.nfe.cpu().numpy()])
    folder = Path(cfg.out_dir)
    render.samples_png(folder / "samples.png", s.x.view(-1, *meta["grid"]).cpu().numpy(), label.tolist(), meta)
    if log.wandb:
        render.write_video(folder / "planner", render.planner_frames(shown, label.tolist(), meta))
        log.media(it, samples=folder / "samples.png", planner=folder / "planner.mp4")


def open_run(cfg, meta, world):
    """Make the run's folder, or find a run of the same shape in it.  -> checkpoint or None"""
    folder = Path(cfg.out_dir)
    with runtime.one_line_errors(OSError):
        if folder.exists() and any(folder.iterdir()) and not is_run(folder):
            raise SystemExit(f"{folder} holds files, but no run of this program: choose another --out-dir")
        folder.mkdir(parents=True, exist_ok=True)
    state = runtime.load_checkpoint(folder)
    if state:
        old, new = state["config"], asdict(cfg)
        for key in cfg.FIXED:
            if old.get(key, new[key]) != new[key]:                      # a key younger than the run is no misfit
                raise SystemExit(f"{folder} was trained with {key} = {old[key]}, not {new[key]}; "
                                 "choose another --out-dir")
        for key in ("vocab", "grid", "n_classes"):
            if state["meta"][key] != meta[key]:
                raise SystemExit(f"{folder} was trained on data with {key} = {state['meta'][key]}, not {meta[key]}")
        was, now = old["grad_accumulation_steps"] * state["world_size"], cfg.grad_accumulation_steps * world.size
        if was != now:
            raise SystemExit(f"{folder} was trained with {was} micro-batches per iteration, not {now}: "
                             f"set --grad-accumulation-steps to {was / world.size:g}, or start other processes")
        changed = {k: f"{old[k]} -> {v}" for k, v in new.items() if k in old and old[k] != v and k != "out_dir"}
        if changed and world.is_main:
            print(f"{folder} goes on with " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    if world.is_main and not (state and state["it"] >= cfg.max_iters):
        with runtime.one_line_errors(OSError):
            (folder / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    return state


def is_run(folder):
    """Is there a config.json of ours?"""
    try:
        return "denoiser_process" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def start_from(cfg, shape, nets, ema):
    """Averaged weights of the run cfg.init_from, into a run that has none of its own yet."""
    other = runtime.load_run(cfg.init_from)
    theirs, kind = model.shape_of(other["config"], other["meta"]), config.kind_of(other["config"])
    for name in (f.name for f in fields(shape)):
        if getattr(theirs, name) != getattr(shape, name):
            raise SystemExit(f"--init-from {cfg.init_from} has {name} {getattr(theirs, name)}, "
                             f"not {getattr(shape, name)}")
    if kind != cfg.kind:
        raise SystemExit(f"--init-from {cfg.init_from} is a {kind} run, not {cfg.kind}")
    for k in nets:
        nets[k].load_state_dict(other["ema"][k])
        ema[k].load_state_dict(other["ema"][k])


def stated_meta(cfg):
    """The data as the config states it, nothing read; None where it does not."""
    return dict(name=cfg.data, vocab=cfg.vocab, grid=list(cfg.grid), n_classes=cfg.n_classes) if cfg.vocab else None


def open_data(cfg):
    """The data, which must be what the config states.  -> meta, splits"""
    meta, splits = data.load(cfg.data, cfg.image_size, cfg.levels)
    for key, said in (stated_meta(cfg) or {}).items():
        if key != "name" and meta[key] != said:
            raise SystemExit(f"{key} is {meta[key]} in data {cfg.data}, but {said} in the config")
    if cfg.method == "forcing" and cfg.level_group in ("frame", "next") and len(meta["grid"]) != 3:
        raise SystemExit(f"level_group {cfg.level_group} needs frames, and {cfg.data} is no video: token or shared")
    if cfg.method == "forcing" and cfg.context >= meta["grid"][0] and cfg.context:
        raise SystemExit(f"context {cfg.context} must be fewer than the {meta['grid'][0]} frames of {cfg.data}")
    return meta, splits


def say_what(cfg, meta, train, nets, world):
    """Print what a reader needs to judge the first numbers.  -> the losses named in it, nats"""
    n_tokens = math.prod(meta["grid"])
    per_step = n_tokens * cfg.batch_size * cfg.grad_accumulation_steps * world.size
    sizes = ", ".join(f"{k} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for k, net in nets.items())
    print(f"{meta['name']}: {' x '.join(map(str, meta['grid']))} tokens, V = {meta['vocab']}, "
          f"{meta['n_classes']} classes; {sizes} parameters")
    print(f"{per_step} tokens per iteration on {world.size} x {world.device.type}, "
          f"{'bfloat16' if runtime.autocast(world.device, cfg.dtype)._enabled else 'float32'}")
    floors = {}
    if cfg.method == "ddpd":
        floors["denoiser_start"] = math.log(meta["vocab"])
        print(f"denoiser CE starts at ln V = {floors['denoiser_start']:.4f} nats")
    if "planner" in nets:
        floors |= dict(planner_blind=processes.BLIND, planner_level_only=processes.LEVEL_ONLY,
                       planner_floor=processes.planner_floor(meta["vocab"]))
        print(f"planner BCE: {processes.BLIND:.4f} nats blind, {processes.LEVEL_ONLY:.4f} reading only the level, "
              f"{floors['planner_floor']:.4f} at best (tokens redrawn as themselves)")
    if 0 < cfg.overfit <= 64 and cfg.overfit_noise == "fresh" and cfg.method == "ddpd" and not meta["given"]:
        x0, label = (torch.from_numpy(y) for y in train.rows(np.arange(min(cfg.overfit, len(train)))))
        by_heart = objectives.floors(x0, label, meta["vocab"], cfg.nets, cfg.denoiser_process, runtime.generator(EVAL))
        floors |= {f"{k}_by_heart": v for k, v in by_heart.items()}
        print(f"{len(x0)} sequences known by heart leave: " + ", ".join(f"{k} {v:.4f}" for k, v in by_heart.items()))
    if world.device.type == "cpu" and n_tokens * cfg.n_embd > 2**17:
        print("warning: this setting takes hours on a CPU; configs/digits.py takes minutes")
    return floors


def main(cfg):
    if cfg.dry_run:
        return costs.dry_run(cfg, stated_meta(cfg) or open_data(cfg)[0])
    world = runtime.start()
    stop = runtime.Stop(world)
    if not world.is_main:
        torch.distributed.barrier()                                     # rank 0 makes the data and the folder
    meta, splits = open_data(cfg)
    try:
        shape = model.shape_of(asdict(cfg), meta)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    state = open_run(cfg, meta, world)
    if world.is_main and world.size > 1:
        torch.distributed.barrier()
    it = state["it"] if state else 0
    runtime.same_everywhere(it, world, f"{cfg.out_dir} is at another iteration on another machine: all need one folder")
    if it >= cfg.max_iters:
        stop.restore()
        if world.is_main:
            print(f"{cfg.out_dir} is finished: {it} iterations. A larger --max-iters goes on.")
        return

    # networks, their averages, one optimizer each
    torch.manual_seed(cfg.seed)
    nets = {k: net.to(world.device) for k, net in model.build(shape, cfg.kind).items()}
    ema = {k: copy.deepcopy(net).requires_grad_(False) for k, net in nets.items()}
    lrs = {"planner": cfg.planner_lr, "denoiser": cfg.denoiser_lr}
    optimizers = {k: torch.optim.AdamW(model.param_groups(net, lrs[k], cfg.weight_decay), betas=(0.9, 0.95), fused=True)
                  for k, net in nets.items()}
    if state:
        for k in nets:
            nets[k].load_state_dict(state["nets"][k])
            ema[k].load_state_dict(state["ema"][k])
            decays = [g["weight_decay"] for g in optimizers[k].param_groups]
            optimizers[k].load_state_dict(state["optimizers"][k])
            for group, decay in zip(optimizers[k].param_groups, decays, strict=True):
                group["weight_decay"] = decay                           # today's flag, not the checkpoint's
    elif cfg.init_from:
        start_from(cfg, shape, nets, ema)
    learner = Losses(nets, losses_of(cfg))
    if cfg.compile:
        for net in nets.values():
            net.hidden = torch.compile(net.hidden)
    if world.size > 1:
        learner = nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False, gradient_as_bucket_view=True)

    train = splits["train"]
    n_train = min(cfg.overfit, len(train)) if cfg.overfit else len(train)
    order, n_groups = data.Order(n_train, None if cfg.overfit else cfg.seed), cfg.grad_accumulation_steps * world.size
    log = runtime.Log(cfg.out_dir, cfg, world)
    if world.is_main:
        floors = say_what(cfg, meta, train, nets, world)
        log.write(it, start=True, commit=runtime.commit(), torch=torch.__version__, device=str(world.device),
                  floors={k: round(v, 5) for k, v in floors.items()}, config=asdict(cfg))

    losses_sum, n_summed = torch.zeros(len(nets), device=world.device), 0
    first_bad = torch.full((), math.inf, device=world.device)           # iteration of the first loss that is not finite

    def refuse_nan(means=()):
        """A loss that was NaN or inf ends the run, its checkpoints untouched."""
        bad = first_bad.clone()
        if world.size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MIN)
        if bad.isfinite():
            said = ", ".join(f"{k} {v:.4g}" for k, v in zip(nets, means, strict=False))
            raise SystemExit(f"a loss of {cfg.out_dir} is not finite at iteration {int(bad)} ({said}): lower the lr; "
                             "the last checkpoint is untouched")

    def read_losses():
        """Mean losses since the last call, of all processes. Waits for the device."""
        nonlocal n_summed
        mean = losses_sum / max(1, n_summed)
        if world.size > 1:
            torch.distributed.all_reduce(mean)
            mean /= world.size
        refuse_nan(mean.tolist())
        losses_sum.zero_()
        n_summed = 0
        return dict(zip(nets, mean.tolist(), strict=True))

    def save():
        refuse_nan()
        for k, net in nets.items():                                     # a finite loss can have an infinite gradient
            if not torch.stack([p.isfinite().all() for p in net.parameters()]).all():
                raise SystemExit(f"weights of the {k} of {cfg.out_dir} are not finite at iteration {it}: lower the lr; "
                                 "the last checkpoint is untouched")
        is_saved = torch.ones((), dtype=torch.bool)
        if world.is_main:
            is_saved.fill_(runtime.save_checkpoint(cfg.out_dir, dict(
                it=it, config=asdict(cfg), meta=meta, world_size=world.size,
                nets={k: net.state_dict() for k, net in nets.items()},
                ema={k: net.state_dict() for k, net in ema.items()},
                optimizers={k: o.state_dict() for k, o in optimizers.items()})))
        if world.size > 1:
            torch.distributed.broadcast(is_saved, 0)                    # nobody leaves while rank 0 writes
        return bool(is_saved)

    bar = tqdm(total=cfg.max_iters, initial=it, disable=not world.is_main, dynamic_ncols=True, unit="it", mininterval=1)
    clock, clock_it, train_s = time.perf_counter(), it, 0.0
    while it < cfg.max_iters:
        for k, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lrs[k] * group["lr_scale"] * lr_factor(it, cfg)
        for micro in range(cfg.grad_accumulation_steps):
            tasks = draw_tasks(cfg, meta, train, order, it, micro * world.size + world.rank, n_groups)
            tasks = {k: task.to(world.device) for k, task in tasks.items()}
            if world.size > 1:
                learner.require_backward_grad_sync = micro == cfg.grad_accumulation_steps - 1
            with runtime.autocast(world.device, cfg.dtype):
                losses = learner(tasks)                                 # (n_nets,)
            (losses.sum() / cfg.grad_accumulation_steps).backward()
            losses_sum += losses.detach()
            n_summed += 1
        first_bad = torch.where(losses_sum.isfinite().all(), first_bad, first_bad.clamp_max(it))
        for k, net in nets.items():
            if cfg.grad_clip:
                nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip)
            optimizers[k].step()
            optimizers[k].zero_grad()
            decay = min(cfg.ema_decay, (1 + it) / (10 + it))            # its warm-up: early averages forget the start
            with torch.no_grad():
                torch._foreach_lerp_(list(ema[k].parameters()), list(net.parameters()), 1 - decay)
        it += 1
        bar.update()

        is_last = it == cfg.max_iters
        signal = stop.asked() * (not is_last)                           # the last iteration ends by itself
        if it % cfg.log_interval == 0 or is_last:
            means = read_losses()
            now = time.perf_counter()
            train_s += now - clock
            rate = (it - clock_it) * n_groups * cfg.batch_size * shape.n_tokens / (now - clock)
            clock, clock_it = now, it
            log.write(it, **{f"{k}_loss": round(v, 5) for k, v in means.items()},
                      lr_factor=round(lr_factor(it - 1, cfg), 5),
                      tokens_per_s=round(rate), train_s=round(train_s, 2))
            bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in means.items()) + f", {rate:.0f} tokens/s")
        if signal or is_last or (cfg.save_interval and it % cfg.save_interval == 0):
            is_saved = save()
            if (signal or is_last) and not is_saved:
                raise SystemExit(f"{cfg.out_dir}: iteration {it} could not be saved; the one before it is in place")
        if signal:
            bar.close()
            if world.is_main:
                print(f"stopped by signal {signal} at iteration {it}, saved; the same command goes on from there")
            log.close()
            sys.exit(128 + signal)
        if world.is_main and (is_last or (cfg.eval_interval and it % cfg.eval_interval == 0)):
            paused = time.perf_counter()
            scores = validate(cfg, meta, ema, splits["val"], world.device)
            log.write(it, **scores)
            if cfg.eval_samples:
                draw_samples(cfg, meta, ema, splits["val"], world.device, it, log)
            said = {k.removeprefix("val_"): v for k, v in scores.items() if not k.endswith(("_bins", "_se"))}
            bar.write(f"{it:>6}: " + ", ".join(f"{k} {v and round(v, 4)}" for k, v in said.items()))
            clock += time.perf_counter() - paused                       # tokens/s leaves validation out
    bar.close()
    log.close()
    stop.restore()
    if world.is_main:
        print(f"done: {cfg.max_iters} iterations, {train_s / 60:.1f} minutes of training in this start. "
              f"Next: python sample.py {cfg.out_dir}")


if __name__ == "__main__":
    try:
        main(cfg)
    finally:
        runtime.end()
