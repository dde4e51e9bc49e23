"""What a large vocabulary costs, four losses interleaved.   python experiments/head.py [ROUNDS]

Forward and backward at V = 65,536, width 256, 4 layers, 8 sequences of 256 tokens; medians, ratios of each round. No
optimizer step: it is the same for all and would flatter the ratios.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import model
import runtime
from diffusion import objectives, processes
from train_ddpd import Losses

VOCAB, GRID, BATCH, P_UNIFORM = 65_536, (16, 16), 8, 0.1


def main(rounds):
    device, shape = runtime.pick_device(), model.Shape(GRID, VOCAB, 0, 4, 4, 256, 256)
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x0 = torch.randint(VOCAB, (BATCH, shape.n_tokens), generator=rng)
    t, label = processes.stratified_t(BATCH, rng), torch.zeros(BATCH, dtype=torch.long)
    gidd = functools.partial(objectives.gidd, x0, t, label, VOCAB, rng, P_UNIFORM, "dynamic")
    ways = {"mask": (objectives.denoiser_task(x0, t, label, VOCAB, rng, "mask"), objectives.denoiser_loss, "maskd"),
            "ce": (objectives.denoiser_task(x0, t, label, VOCAB, rng, "uniform", "all"), objectives.denoiser_loss,
                   "single"),
            "gidd": (gidd()["denoiser"], functools.partial(objectives.gidd_loss, p_uniform=P_UNIFORM), "gidd"),
            "gidd_thin": (gidd(0.1)["denoiser"], functools.partial(objectives.gidd_loss, p_uniform=P_UNIFORM), "gidd")}
    net = model.build_one(shape, "denoiser", "gidd").to(device)
    seconds = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, (task, loss, _) in ways.items():
            learner = Losses({"denoiser": net}, {"denoiser": loss})
            began = time.perf_counter()
            with runtime.autocast(device, "auto"):
                total = learner({"denoiser": task.to(device)}).sum()
            total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:                                                       # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            net.zero_grad()
    for name, (task, *_) in ways.items():
        print(f"{name:10} {len(task.sites):5} tokens, median {statistics.median(seconds[name]):.2f} s")
    for one, other in [("gidd", "ce"), ("gidd_thin", "mask")]:
        ratios = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        print(f"{one} / {other}: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
              f"{rounds} rounds on {runtime.device_name(device)}, commit {runtime.commit()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 7)
