"""What a large vocabulary costs: four losses, timed in turn.

python experiments/head.py [ROUNDS]

Forward and backward at V = 65,536, width 256, 4 layers and 8 sequences of 256 tokens. Prints
medians over rounds, and ratios within a round. There is no optimizer step: it is the same for all
losses and would draw the ratios towards 1.
"""

import statistics
import time

import common
import torch

import model
from diffusion import gidd, objectives
from diffusion.processes import Noise, stratified_t
from support import runtime
from support.chunked_head import task_loss

VOCAB = 65_536
SHAPE = model.Shape(
    grid=(16, 16), vocab=VOCAB, n_classes=0, n_layer=4, n_head=4, n_embd=256, base_width=256
)
BATCH = 8
P_UNIFORM = 0.1
COMPARISONS = [("gidd", "ce"), ("gidd_thin", "mask")]


def make_tasks() -> dict[str, objectives.Task]:
    """Four tasks on the same tokens and noise levels."""
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randint(VOCAB, (BATCH, SHAPE.n_tokens), generator=rng)
    t = stratified_t(BATCH, rng)
    label = torch.zeros(BATCH, dtype=torch.long)

    def denoise(process, at):
        return objectives.denoiser_task(x0, t, label, Noise(process, VOCAB), rng, at=at)

    def gidd_task(rate):
        noise = Noise("hybrid", VOCAB, P_UNIFORM)
        return gidd.gidd_tasks(x0, t, label, noise, rng, clean_token_rate=rate)["denoiser"]

    return {
        "mask": denoise("mask", at="noise"),
        "ce": denoise("uniform", at="all"),
        "gidd": gidd_task(1.0),
        "gidd_thin": gidd_task(0.1),
    }


def time_step(net: model.Transformer, task: objectives.Task, device: torch.device) -> float:
    """Seconds of a forward and backward pass."""
    began = time.perf_counter()
    with runtime.autocast(device):
        loss = task_loss(net, task.to(device))
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    net.zero_grad()
    return seconds


def main(n_rounds: int) -> None:
    device = runtime.pick_device()
    torch.manual_seed(0)
    net = model.Transformer(SHAPE, "denoiser", t_conditioned=True).to(device)
    tasks = make_tasks()
    seconds = {name: [] for name in tasks}
    for i in range(n_rounds + 1):
        for name, task in tasks.items():
            step_s = time_step(net, task, device)
            is_warm = i > 0
            if is_warm:
                seconds[name].append(step_s)
    for name, task in tasks.items():
        median = statistics.median(seconds[name])
        print(f"{name:10} {len(task.sites):5} tokens, median {median:.2f} s")
    for one, other in COMPARISONS:
        ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        interval = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{one} / {other}: median {statistics.median(ratios):.2f} ({interval}), "
            f"{n_rounds} rounds on {runtime.device_name(device)}, commit {runtime.commit()}"
        )


if __name__ == "__main__":
    [n_rounds] = common.read_numbers() or [7]
    main(n_rounds)
