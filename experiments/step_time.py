"""What does a training step cost, and what makes it cheaper?   python experiments/step_time.py configs/digits.py

Interleaved steps of the shipped code and of variants; medians in seconds, and ratios to the shipped one.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import data
import model
import runtime
import train_ddpd

ROUNDS, STEPS = 7, 3        # rounds over the variants, steps of each in a round
VARIANTS = {                # name: (keys that an attention call may have on a CPU to be done by plain products, dtype)
    "shipped": (model.SHORT, "auto"),
    "fused attention": (0, "auto"),
    "float32": (model.SHORT, "float32"),
}


def main(cfg):
    device = runtime.pick_device()
    meta, splits = data.load(cfg.data, cfg.image_size, cfg.levels)
    nets = {k: net.to(device) for k, net in model.build(model.shape_of(vars(cfg), meta), cfg.kind).items()}
    learner, order = train_ddpd.Losses(nets), data.Order(len(splits["train"]), 0)
    optimizers = [torch.optim.AdamW(model.param_groups(net, 1e-4, 0.0), fused=True) for net in nets.values()]
    seconds, it = {name: [] for name in VARIANTS}, 0
    for round_ in range(ROUNDS + 1):                                    # the first one warms up
        for name, (model.SHORT, dtype) in VARIANTS.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                tasks = train_ddpd.draw_tasks(cfg, meta, splits["train"], order, it, 0, 1)
                with runtime.autocast(device, dtype):
                    losses = learner({k: task.to(device) for k, task in tasks.items()})
                losses.sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                it += 1
            losses.sum().item()                                         # waits for the device
            if round_:
                seconds[name].append((time.perf_counter() - began) / STEPS)
    for name, times in seconds.items():
        ratio = np.median(np.array(times) / np.array(seconds["shipped"]))
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(f"{name:16} {np.median(times):.3f} s a step ({spread}), {ratio:.2f} x shipped")
    print(f"{cfg.batch_size} sequences of {meta['grid']} on {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, commit {runtime.commit()}")


if __name__ == "__main__":
    main(config.load(config.Config))
