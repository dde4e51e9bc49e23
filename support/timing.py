"""What bench.py times: steps of our own, of a checkout of minDDPD, of attention and of the data.

A side is a function of the settings that returns a function of one step.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import methods
from support import diagnostics, runtime, training

PRODUCT = 2048              # side of the matrix product that a step's rate is compared with


# Our own steps


def our_run(settings: dict[str, Any], patch: int) -> tuple[config.Config, methods.Spec]:
    cfg = config.check(config.Config(**settings["config"] | dict(patch=patch)))
    return cfg, methods.spec_of(settings["config"] | dict(patch=patch), settings["meta"])


def train_ours(settings: dict[str, Any], patch: int) -> Callable[[], None]:
    """A step of training as train_ddpd.py makes it."""
    cfg, spec = our_run(settings, patch)
    device = runtime.pick_device()
    state = training.build_training(cfg, spec, None, device)
    learners = training.learners_of(cfg, state, runtime.World(0, 1, device))
    x0 = torch.randint(spec.vocab, (cfg.batch_size, spec.shape.n_tokens))
    label = torch.arange(cfg.batch_size) % max(1, spec.n_classes)
    generator = torch.Generator().manual_seed(0)

    def step():
        tasks = training.tasks_of(
            cfg, spec, state.ema["denoiser"], x0, label, None, generator
        )
        losses = training.backward(cfg, learners, tasks, device, is_last=True)
        training.update_weights(cfg, state)
        state.it += 1
        losses.tolist()                                 # waits for the device

    return step


def sample_ours(settings: dict[str, Any], patch: int) -> Callable[[], None]:
    """A step of the method's first sampler; planned denoising writes n_sites tokens in it."""
    cfg, spec = our_run(settings, patch)
    device = runtime.pick_device()
    nets = {name: net.requires_grad_(False) for name, net in methods.build(spec).items()}
    runtime.place(nets, device)
    runtime.freeze(nets, device, cfg.dtype)
    home = runtime.device_of_doubles(device)
    label = (torch.arange(cfg.batch_size) % max(1, spec.n_classes)).to(home)
    generator = torch.Generator(home).manual_seed(0)
    options = dict(n_steps=1000)
    if next(iter(spec.method.samplers)) == "ddpd":
        options |= dict(schedule="fixed", k=settings["n_sites"])

    def states():
        while True:
            yield from methods.sample(spec, nets, label, generator=generator, **options)

    endless = states()

    def step():
        with runtime.autocast(device, cfg.dtype):
            next(endless).x.sum().item()

    return step


def count_flops(settings: dict[str, Any], patch: int) -> dict[str, int]:
    """Of a step of training: by formula, and by PyTorch's counter, which also counts what is
    computed again, and on a CPU leaves out the fused kernel of attention."""
    settings = settings | dict(config=settings["config"] | dict(compile=False))
    cfg, spec = our_run(settings, patch)
    with torch.device("meta"):
        nets = methods.build(spec)
    formula = diagnostics.flops_of_step(spec, nets, cfg.batch_size)
    step = train_ours(settings, patch)
    with FlopCounterMode(display=False) as counter:
        step()
    return dict(formula=formula, counter=counter.get_total_flops())


# Steps of minDDPD


def train_peer(settings: dict[str, Any], folder: str) -> Callable[[], None]:
    planner, denoiser, label = peer_nets(settings, folder)
    device = label.device
    vocab = settings["meta"]["vocab"]
    optimizers = [torch.optim.AdamW(net.parameters(), fused=True) for net in (planner, denoiser)]
    x0 = torch.randint(vocab, (len(label), peer_length(settings)), device=device)

    def step():
        t = torch.rand(len(label), device=device)
        is_noise = torch.rand(x0.shape, device=device) < t[:, None]
        x = torch.where(is_noise, torch.randint_like(x0, vocab), x0)
        with torch.autocast(device.type, torch.bfloat16):
            _, planner_loss = planner(x, t, label, targets=is_noise)
            planner_loss.backward()
            _, denoiser_loss = denoiser(x, t, label, targets=x0, mask=is_noise)
            denoiser_loss.backward()
        for net, optimizer in zip((planner, denoiser), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        planner_loss.item()

    return step


class Enough(Exception):
    """A sampler has made as many steps as are timed."""


def sample_peer(settings: dict[str, Any], folder: str) -> Callable[[], None]:
    """The first step of its sampler, which asks the planner once in each."""
    planner, denoiser, label = peer_nets(settings, folder)
    n_calls = 0

    def count(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise Enough

    planner.register_forward_pre_hook(count)

    def step():
        nonlocal n_calls
        n_calls = 0
        with contextlib.suppress(Enough), torch.autocast(label.device.type, torch.bfloat16):
            planner.sample(
                denoiser, class_labels=label, batch_size=len(label), device=label.device,
                sequence_length=peer_length(settings), num_samples=settings["n_sites"],
                infer_time_from_planner=False,
            )

    return step


def peer_length(settings: dict[str, Any]) -> int:
    rows, columns = settings["meta"]["grid"]
    return rows * columns


def peer_nets(settings: dict[str, Any], folder: str):
    """Its planner, its denoiser and labels, from its own model.py."""
    sys.path.insert(0, folder)
    sys.modules.pop("model")                            # ours is imported by now
    import model as peer

    names = ("n_layer", "n_head", "n_embd")
    sizes = {name: settings["config"][name] for name in names}
    n_classes = max(1, settings["meta"]["n_classes"])
    shape = peer.DDPDConfig(
        block_size=peer_length(settings), vocab_size=settings["meta"]["vocab"] + 1,
        num_classes=n_classes, **sizes,
    )
    device = runtime.pick_device()
    planner = peer.DDPDModel(shape, "planner").to(device)
    denoiser = peer.DDPDModel(shape, "denoiser").to(device)
    label = torch.arange(settings["config"]["batch_size"], device=device) % n_classes
    return planner, denoiser, label


# What they are compared with


def multiply(settings: dict[str, Any]) -> Callable[[], None]:
    """A square matrix product in the dtype of training, of PRODUCT rows."""
    device = runtime.pick_device()
    dtype = runtime.matmul_dtype(device, settings["config"]["dtype"])
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device, dtype=dtype)

    def step():
        (a @ b)[0, 0].item()

    return step


def load_batches(settings: dict[str, Any]) -> Callable[[], None]:
    """The next batch of the config's data: read, corrupted and moved to the device."""
    cfg = config.check(config.Config(**settings["config"]))
    spec, splits = training.open_data(cfg)
    batches = training.Batches(cfg, spec, splits["train"], 1)
    device = runtime.pick_device()
    it = 0

    def step():
        nonlocal it
        tasks = batches.tasks(it, 0)
        moved = [task.to(device) for task in tasks.values()]
        moved[0].xt.sum().item()
        it += 1

    return step
