"""A run in training: its data, its folder, its networks, averages and optimizers."""

import copy
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import config
import data
import methods
import model
from diffusion import objectives
from formats import meta_file
from formats.flags import as_flags
from support import checkpoint, hub, runtime
from support.chunked_head import task_loss

OF_DATA = ("vocab", "grid", "n_classes")    # what the shape of a network takes from the data

# Data and the run's folder


def stated_meta(cfg: config.Config) -> dict[str, Any] | None:
    """The data's meta as the config states it, without reading any; None if it states none."""
    if not cfg.vocab:
        return None
    return dict(name=cfg.data, vocab=cfg.vocab, grid=list(cfg.grid), n_classes=cfg.n_classes)


def open_data(cfg: config.Config) -> tuple[methods.Spec, dict[str, data.Split]]:
    """The data, which must be what the config states.  -> spec, splits"""
    meta, splits = data.load(cfg.data, cfg.image_size, cfg.grey_levels)
    for key, stated in (stated_meta(cfg) or {}).items():
        if key != "name" and meta[key] != stated:
            raise SystemExit(f"{key} is {meta[key]} in data {cfg.data}, but {stated} in the config")
    with runtime.one_line_errors(ValueError):
        spec = methods.spec_of(asdict(cfg), meta)
    if cfg.method == "forcing":
        if cfg.noise_granularity in ("frame", "next") and not spec.is_video:
            raise SystemExit(
                f"noise_granularity {cfg.noise_granularity} needs frames, and {cfg.data} is no "
                "video: token or shared"
            )
        if cfg.context_frames and cfg.context_frames >= spec.grid[0]:
            raise SystemExit(
                f"context_frames {cfg.context_frames} must be fewer than the {spec.grid[0]} "
                f"frames of {cfg.data}"
            )
    return spec, splits


def make_folder(folder: Path) -> None:
    """Make the run's folder; one that holds other files than a run's is refused."""
    with runtime.one_line_errors(OSError):
        if folder.exists() and not checkpoint.is_run(folder):
            raise SystemExit(
                f"{folder} holds files, but no run of this program: choose another --out-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)


def open_run(cfg: config.Config, spec: methods.Spec, world: runtime.World) -> dict[str, Any] | None:
    """Find the run to resume, or begin one in its folder.  -> the checkpoint or None"""
    folder = Path(cfg.out_dir)
    state = checkpoint.load_checkpoint(folder)
    if state:
        refuse_misfit(cfg, spec, state, world)
        old = state["config"]
        changed = [
            f"{key} {old[key]} -> {value}" for key, value in asdict(cfg).items()
            if old[key] != value and key != "out_dir"
        ]
        if changed and world.is_main:
            print(f"{folder} is resumed with " + ", ".join(changed))
    if world.is_main and not (state and state["it"] >= cfg.max_iters):
        with runtime.one_line_errors(OSError):
            checkpoint.write_config(folder, asdict(cfg))
            meta_file.copy_kept_files(data.folder_of(cfg.data), folder, spec.meta)
    return state


def refuse_misfit(
    cfg: config.Config, spec: methods.Spec, state: dict[str, Any], world: runtime.World,
) -> None:
    """Refuse, by name, to resume with another shape, other data or other micro-batches."""
    old = state["config"]
    for key in cfg.FIXED:
        now = getattr(cfg, key)
        if old[key] != now:
            raise SystemExit(
                f"{cfg.out_dir} was trained with {key} = {old[key]}, not {now}; "
                "choose another --out-dir"
            )
    for key in OF_DATA:
        if state["meta"][key] != spec.meta[key]:
            raise SystemExit(
                f"{cfg.out_dir} was trained on data with {key} = {state['meta'][key]}, "
                f"not {spec.meta[key]}"
            )
    was = old["grad_accumulation_steps"] * state["world_size"]
    now = cfg.grad_accumulation_steps * world.size
    if was != now:
        raise SystemExit(
            f"{cfg.out_dir} was trained with {was} micro-batches per iteration, not {now}: set "
            f"--grad-accumulation-steps to {was / world.size:g}, or start other processes"
        )


# Networks, their averages, one optimizer each


@dataclass
class Training:
    nets: dict[str, model.Transformer]
    ema: dict[str, model.Transformer]       # averaged weights, which are validated and sampled
    optimizers: dict[str, torch.optim.Optimizer]
    lrs: dict[str, float]                   # of each network, at base_width
    trained: list[str]                      # networks; others are frozen
    it: int                                 # iterations done


def build_training(
    cfg: config.Config, spec: methods.Spec, state: dict[str, Any] | None, device: torch.device,
) -> Training:
    """Networks, averages and optimizers as at the start of training, or as in the checkpoint."""
    torch.manual_seed(cfg.seed)
    nets = methods.build(spec)
    runtime.place(nets, device)
    ema = copy.deepcopy(nets)       # in one go: a planner's copy stands on the copy of its trunk
    for net in ema.values():
        net.requires_grad_(False)
    if cfg.trunk_grad:
        nets["planner"].hold(nets["denoiser"], cfg.trunk_grad)
    elif spec.method.has_trunk:
        nets["planner"].hold(ema["denoiser"])           # the trunk that sampling uses
    lrs = {"planner": cfg.planner_lr, "denoiser": cfg.denoiser_lr}
    optimizers = {}
    for name, net in nets.items():
        groups = model.param_groups(net, lrs[name], cfg.weight_decay)
        optimizers[name] = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if state:
        for name in nets:
            nets[name].load_state_dict(state["nets"][name])
            ema[name].load_state_dict(state["ema"][name])
            load_optimizer(optimizers[name], state["optimizers"][name])
    elif cfg.init_from:
        load_initial_weights(cfg, spec, nets, ema)
    elif cfg.freeze_denoiser:
        load_frozen_denoiser(cfg, spec, nets, ema)
    trained = ["planner"] if cfg.freeze_denoiser else list(nets)
    return Training(nets, ema, optimizers, lrs, trained, state["it"] if state else 0)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The saved moments, with today's weight decay; the lr is set at every iteration."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def load_initial_weights(
    cfg: config.Config, spec: methods.Spec, nets: dict, ema: dict,
) -> None:
    """Averaged weights of the run cfg.init_from, into a run that has none of its own yet."""
    other, other_spec = averages_of(f"--init-from {cfg.init_from}", cfg.init_from, spec)
    if other_spec.name != spec.name:
        raise SystemExit(f"--init-from {cfg.init_from} is a {other_spec.name} run, not {spec.name}")
    for name in nets:
        nets[name].load_state_dict(other["ema"][name])
        ema[name].load_state_dict(other["ema"][name])


def averages_of(
    said: str, path: str, spec: methods.Spec,
) -> tuple[dict[str, Any], methods.Spec]:
    """A run or export of the same shape.  -> its checkpoint, without optimizers, and its spec

    said: how messages name it
    """
    other = checkpoint.load_averages(hub.local_folder(path))
    other_spec = methods.spec_of(other["config"], other["meta"])
    shape, theirs = asdict(spec.shape), asdict(other_spec.shape)
    differing = {name: value for name, value in theirs.items() if value != shape[name]}
    if differing:
        has = ", ".join(f"{name} {value}, not {shape[name]}" for name, value in differing.items())
        of_data = [name for name in OF_DATA if name in differing]
        remedy = "it was trained on other data" if of_data else as_flags(differing)
        raise SystemExit(f"{said} has {has}: {remedy}")
    return other, other_spec


def load_frozen_denoiser(
    cfg: config.Config, spec: methods.Spec, nets: dict, ema: dict,
) -> None:
    """The averaged denoiser of the run cfg.freeze_denoiser, into a run that trains a planner."""
    said = f"--freeze-denoiser {cfg.freeze_denoiser}"
    other, other_spec = averages_of(said, cfg.freeze_denoiser, spec)
    is_fitting = other_spec.noise.only_masks and not other_spec.method.networks["denoiser"]
    if not is_fitting:
        raise SystemExit(f"{said} is a {other_spec.name} run, whose denoiser is not one of masks")
    for networks in (nets, ema):
        networks["denoiser"].load_state_dict(other["ema"]["denoiser"])


# One iteration


class Learner(nn.Module):
    """Networks behind their losses: what DDP wraps.  {network: Task} -> (networks,) nats"""

    def __init__(self, nets: dict[str, nn.Module]):
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, tasks: dict[str, objectives.Task]) -> Tensor:
        return torch.stack([task_loss(net, tasks[name]) for name, net in self.nets.items()])


# The names of the networks that it trains -> a Learner, maybe wrapped by DDP
Learners = dict[tuple[str, ...], nn.Module]


def learners_of(cfg: config.Config, training: Training, world: runtime.World) -> Learners:
    """A learner of each trained network, compiled and distributed where that is asked for.

    Networks that give each other gradients have one learner, for DDP averages them once.
    """
    if cfg.compile and world.device.type == "mps":
        raise SystemExit("--compile is for CUDA GPUs and CPUs: leave it out on an Apple GPU")
    for name in training.trained:
        net = training.nets[name]
        net.recompute = cfg.recompute
        if cfg.compile:
            net.hidden = torch.compile(net.hidden)
    groups = [training.trained] if cfg.trunk_grad else [[name] for name in training.trained]
    learners = {}
    for names in groups:
        learner = Learner({name: training.nets[name] for name in names})
        learners[tuple(names)] = distributed(learner) if world.size > 1 else learner
    return learners


def distributed(learner: nn.Module) -> nn.Module:
    """Average gradients over the processes; buffers are constants, and are not broadcast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)      # torch 2.13: another name for it
        return nn.parallel.DistributedDataParallel(
            learner, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def backward(
    cfg: config.Config, learners: Learners, tasks: dict[str, objectives.Task],
    device: torch.device, is_last: bool,
) -> Tensor:
    """Add the gradients of a micro-batch, one learner after another, so that only one holds
    activations at a time.  -> (n_trained,) losses, nats

    is_last: the last micro-batch of its iteration, when DDP averages the gradients
    """
    losses = []
    for names, learner in learners.items():
        own_tasks = {name: tasks[name].to(device) for name in names}
        learner.require_backward_grad_sync = is_last
        with runtime.autocast(device, cfg.dtype):
            own_losses = learner(own_tasks)
        (own_losses.sum() / cfg.grad_accumulation_steps).backward()
        losses.append(own_losses.detach())
    return torch.cat(losses)


def tasks_of(
    cfg: config.Config, spec: methods.Spec, denoiser: model.Transformer | None, x0: Tensor,
    label: Tensor, known: Tensor | None, rng: torch.Generator,
) -> dict[str, objectives.Task]:
    """What the networks learn from a batch.  -> {network: Task}

    denoiser: the averaged one, on whose fills a planner may learn
    """
    tasks = methods.make_tasks(spec, x0, label, known, rng)
    if methods.learns_on_fills(spec):                   # drawn last: all other draws stay the same
        t = tasks["denoiser"].t
        device = next(denoiser.parameters()).device
        with runtime.autocast(device, cfg.dtype):
            tasks = methods.with_planner_on_fills(
                spec, tasks, denoiser, x0, t, label, known, rng,
                runtime.device_of_doubles(device), cfg.on_policy,
            )
    return tasks


class Batches:
    """Training tasks as a function of (seed, iteration, micro-batch)."""

    def __init__(
        self, cfg: config.Config, spec: methods.Spec, split: data.Split, n_groups: int,
        denoiser: model.Transformer | None = None,
    ):
        self.cfg = cfg
        self.spec = spec
        self.split = split
        self.n_groups = n_groups        # micro-batches per iteration, of all processes
        self.denoiser = denoiser        # the averaged one, on whose fills a planner may learn
        n = min(cfg.overfit, len(split)) if cfg.overfit else len(split)
        self.order = data.ShuffledIndices(n, None if cfg.overfit else cfg.seed)

    def tasks(self, it: int, group: int) -> dict[str, objectives.Task]:
        """What the networks learn from micro-batch `group` of iteration `it`, on the host."""
        cfg = self.cfg
        start = (it * self.n_groups + group) * cfg.batch_size
        key = (it, group)
        if cfg.overfit and cfg.overfit_noise == "fixed":  # the same noise for the same sequences
            start %= self.order.n
            key = (0, start)
        rng = runtime.generator("train", cfg.seed, *key)
        index = self.order.take(start, cfg.batch_size)
        x0, label = (torch.from_numpy(y) for y in self.split.rows(index))
        if not cfg.overfit:
            label = objectives.drop_labels(label, self.spec.n_classes, cfg.label_dropout, rng)
        known = data.known_mask(self.spec.meta, x0)
        return tasks_of(cfg, self.spec, self.denoiser, x0, label, known, rng)

    def epochs(self, it: int) -> float:
        """How often each sequence has been seen after `it` iterations."""
        return it * self.n_groups * self.cfg.batch_size / self.order.n


def lr_factor(it: int, cfg: config.Config) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if it < cfg.warmup_iters:
        return (it + 1) / cfg.warmup_iters
    progress = min(1.0, (it - cfg.warmup_iters) / max(1, cfg.decay_iters - cfg.warmup_iters))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def clip_gradients(net: nn.Module, max_norm: float) -> Tensor:
    """Scale a network's gradients down to max_norm; 0: leave them.  -> () their norm before"""
    if max_norm:
        return nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    return nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def update_weights(cfg: config.Config, training: Training) -> Tensor:
    """One optimizer step of every trained network, and of its average.  -> (n_trained,) gradient
    norms before clipping, left on the device"""
    norms = []
    # early on, average over few iterations, so that the initial weights are forgotten
    warmup_decay = (1 + training.it) / (10 + training.it)
    decay = min(cfg.ema_decay, warmup_decay)
    for name in training.trained:
        net = training.nets[name]
        optimizer = training.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = training.lrs[name] * group["lr_scale"] * lr_factor(training.it, cfg)
        norms.append(clip_gradients(net, cfg.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            averages = list(training.ema[name].parameters())
            torch._foreach_lerp_(averages, list(net.parameters()), 1 - decay)
    return torch.stack(norms)


def save(cfg: config.Config, spec: methods.Spec, training: Training, world: runtime.World) -> bool:
    """Write a checkpoint; weights that are not finite end the run.  -> is it written?"""
    for name, net in training.nets.items():
        if not torch.stack([p.isfinite().all() for p in net.parameters()]).all():
            raise SystemExit(
                f"weights of the {name} of {cfg.out_dir} are not finite at iteration "
                f"{training.it}: lower the lr; the last checkpoint is untouched"
            )
    is_saved = torch.ones((), dtype=torch.bool)
    with runtime.main_alone(world) as is_mine:
        if is_mine:
            state = dict(it=training.it, config=asdict(cfg), meta=spec.meta, world_size=world.size)
            for part in ("nets", "ema", "optimizers"):
                modules = getattr(training, part)
                state[part] = {name: module.state_dict() for name, module in modules.items()}
            is_saved.fill_(checkpoint.save_checkpoint(cfg.out_dir, state))
    if world.size > 1:
        dist.broadcast(is_saved, 0)
    return bool(is_saved)
