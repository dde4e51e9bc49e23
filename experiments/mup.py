"""Does a learning rate transfer across widths?   python experiments/mup.py coords      python experiments/mup.py basin

coords  sizes of what flows through both networks after 0 to 10 Adam steps, over widths: flat under muP
basin   losses of planner and denoiser over learning rates and widths: the best rate stays where it is under muP
Both write a CSV and a plot into assets/; finished rows are skipped, so either can be stopped and started again.
Standard parametrization is muP whose base width is the width at hand: one lr for all tensors, nothing scaled.
"""

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config
import data
import model
import runtime
import train_ddpd
from diffusion import objectives

BASE = config.Config(image_size=8, n_layer=4, out_dir="out/mup")
HEAD_DIM = 16
COORD_WIDTHS, COORD_STEPS, COORD_SEEDS, COORD_BATCH = (64, 128, 256, 512, 1024), 10, (0, 1, 2), 8
WIDTHS, SEEDS, STEPS = (32, 64, 128, 256), (0, 1), 150
RATES = {"mup": [2.0**i * 1e-3 for i in range(-2, 4)], "standard": [2.0**i * 1e-3 for i in range(-2, 6)]}


class Rows:
    """A CSV that remembers which rows are finished."""

    def __init__(self, name):
        self.path = ROOT / "assets" / name
        self.rows = list(csv.DictReader(self.path.read_text().splitlines())) if self.path.exists() else []

    def has(self, **key):
        return any(all(row[k] == str(v) for k, v in key.items()) for row in self.rows)

    def add(self, **row):
        is_new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({k: str(v) for k, v in row.items()})


def base_width(parametrization, width):
    return width if parametrization == "standard" else BASE.base_width


def coordinates(width, n_head, base_head_dim, parametrization, seed):
    """Root mean squares after 0 .. COORD_STEPS Adam steps at the default lr.  -> {(net, what, step): rms}"""
    cfg = replace(BASE, n_embd=width, n_head=n_head, base_head_dim=base_head_dim, seed=seed, batch_size=COORD_BATCH,
                  base_width=base_width(parametrization, width))
    meta, splits = data.load("digits", 8)
    torch.manual_seed(seed)
    nets = model.build(model.shape_of(vars(cfg), meta), "maskd")
    order, sizes = data.Order(len(splits["train"]), seed), {}
    plain = model.attend
    for name, net in nets.items():
        lr = {"planner": cfg.planner_lr, "denoiser": cfg.denoiser_lr}[name]
        optimizer = torch.optim.AdamW(model.param_groups(net, lr, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
        for step in range(COORD_STEPS + 1):
            task, seen = train_ddpd.draw_tasks(cfg, meta, splits["train"], order, step, 0, 1)[name], {}

            def attend(q, k, v, scale, seen=seen):
                what = "self" if k.shape[2] == q.shape[2] else "cross"
                seen.setdefault(f"attention {what}", []).append(rms(q @ k.transpose(-1, -2) * scale))
                return plain(q, k, v, scale)

            def added(module, args, out, seen=seen, net=net):
                seen[f"block {list(net.blocks).index(module)}"] = [rms(out - args[0])]

            hooks = [block.register_forward_hook(added) for block in net.blocks]
            model.attend = attend
            with runtime.autocast(torch.device("cpu")):
                try:
                    hidden = net.hidden(task.xt, task.t, task.label).flatten(0, 1).index_select(0, task.sites)
                finally:
                    model.attend = plain
                    for hook in hooks:
                        hook.remove()
                seen["head"] = [rms(net.logits(hidden))]
                loss = model.map_logits(net, hidden, objectives.LOSSES[name], task.target).mean()
            for what, values in seen.items():
                sizes[name, what, step] = np.mean(values)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return sizes


def rms(x):
    return x.detach().float().square().mean().sqrt().item()


def coords():
    rows = Rows("mup_coords.csv")
    for seed in COORD_SEEDS:
        for width in COORD_WIDTHS:
            for heads, parametrization in [("fixed", "mup"), ("growing", "mup"), ("fixed", "standard")]:
                if rows.has(width=width, head_dim=heads, parametrization=parametrization, seed=seed):
                    continue
                n_head, base_head_dim = (width // 64, 0) if heads == "fixed" else (4, BASE.base_width // 4)
                for (net, what, step), size in coordinates(width, n_head, base_head_dim, parametrization, seed).items():
                    rows.add(width=width, head_dim=heads, parametrization=parametrization, seed=seed, net=net,
                             what=what, step=step, rms=f"{size:.4g}")
                print(width, heads, parametrization, seed, flush=True)
    plot_coords(rows.rows)


def plot_coords(rows):
    """One panel per kind of run and network: size against width after the last step, and how far it is from flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [("fixed", "mup"), ("growing", "mup"), ("fixed", "standard")]
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey="row", layout="constrained")
    for column, (heads, parametrization) in enumerate(kinds):
        for panel, net in zip(panels[:, column], ("planner", "denoiser"), strict=True):
            mine = [r for r in rows if (r["head_dim"], r["parametrization"], r["net"]) == (heads, parametrization, net)]
            worst = {"attention logits": 1.0, "blocks and head": 1.0}
            for what in sorted({r["what"] for r in mine}):
                for step in range(COORD_STEPS + 1):
                    size = [np.mean([float(r["rms"]) for r in mine if (r["what"], r["step"], r["width"])
                                     == (what, str(step), str(width))]) for width in COORD_WIDTHS]
                    if min(size) > 0:
                        group = "attention logits" if what.startswith("attention") else "blocks and head"
                        worst[group] = max(worst[group], max(size[1:]) / min(size[1:]))
                if min(size) > 0:
                    panel.plot(COORD_WIDTHS, size, marker="o", markersize=3, label=what)
            title = "muP" if parametrization == "mup" else "standard"
            panel.set(xscale="log", yscale="log", xticks=COORD_WIDTHS, xticklabels=COORD_WIDTHS,
                      title=f"{net}, {title}, head_dim {heads}\n"
                            f"largest ratio over widths 128 to 1024: {max(worst.values()):.2f}")
            panel.minorticks_off()
            print(f"{net}, {title}, head_dim {heads}: largest ratio "
                  + ", ".join(f"{ratio:.2f} of {group}" for group, ratio in worst.items()))
    for panel in panels[-1]:
        panel.set_xlabel("width")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"root mean square after {COORD_STEPS} steps")
    panels[0, 0].legend(fontsize=7, ncols=2)
    figure.savefig(ROOT / "assets" / "mup_coords.png", dpi=110)


def basin(seeds=SEEDS):
    rows = Rows("mup_basin.csv")
    grid = [("mup", width) for width in WIDTHS] + [("standard", WIDTHS[0]), ("standard", WIDTHS[-1])]
    for seed in seeds:
        for parametrization, width in grid:
            for lr in RATES[parametrization]:
                if rows.has(parametrization=parametrization, width=width, lr=lr, seed=seed):
                    continue
                out = Path(f"out/mup/{parametrization}_{width}_{lr}_{seed}")
                shutil.rmtree(out, ignore_errors=True)
                cfg = replace(BASE, n_embd=width, n_head=width // HEAD_DIM, planner_lr=lr, denoiser_lr=lr, seed=seed,
                              base_width=base_width(parametrization, width), max_iters=STEPS, warmup_iters=20,
                              eval_interval=0, save_interval=0, out_dir=str(out))
                key = dict(parametrization=parametrization, width=width, lr=lr, seed=seed)
                rows.add(**key, **losses(cfg), commit=runtime.commit())
                print(rows.rows[-1], flush=True)
                shutil.rmtree(out, ignore_errors=True)
    plot_basin(Rows("mup_basin.csv").rows)                              # with those of a process that ran other seeds


def losses(cfg):
    """Training loss on fresh noise (mean of the last 50 iterations) and validation loss; inf: diverged."""
    import json

    try:
        train_ddpd.main(cfg)
    except SystemExit as error:
        if "not finite" not in str(error):
            raise
        return {f"{net}_{part}": np.inf for net in ("planner", "denoiser") for part in ("train", "val")}
    log = [json.loads(line) for line in (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()]
    steps, last = [row for row in log if "planner_loss" in row and row["it"] > STEPS - 50], log[-1]
    return dict(planner_train=round(np.mean([r["planner_loss"] for r in steps]), 5),
                denoiser_train=round(np.mean([r["denoiser_loss"] for r in steps]), 5),
                planner_val=last["val_planner_bce"], denoiser_val=last["val_denoiser_ce"])


def plot_basin(rows):
    """Training and validation loss against learning rate, a line per width; prints the best rate of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7.4), sharex=True, layout="constrained")
    for row, part in enumerate(("train", "val")):
        for panel, net in zip(panels[row], ("planner", "denoiser"), strict=True):
            for parametrization, widths, style in [("mup", WIDTHS, "-"), ("standard", (WIDTHS[0], WIDTHS[-1]), "--")]:
                rates = RATES[parametrization]
                for width in widths:
                    key = dict(parametrization=parametrization, width=str(width))
                    mine = [r for r in rows if all(r[k] == v for k, v in key.items())]
                    loss = {(r["lr"], r["seed"]): float(r[f"{net}_{part}"]) for r in mine}
                    whole = [s for s in SEEDS if all((str(lr), str(s)) in loss for lr in rates)]
                    by_seed = np.array([[loss[str(lr), str(seed)] for lr in rates] for seed in whole])
                    if not whole:
                        continue
                    mean, best = by_seed.mean(0), int(by_seed.mean(0).argmin())
                    shade = pyplot.get_cmap("viridis")(0.85 - 0.8 * WIDTHS.index(width) / (len(WIDTHS) - 1))
                    name = "muP" if parametrization == "mup" else "standard"
                    panel.plot(rates, mean, style, color=shade, marker="o", markersize=3, label=f"{name}, {width}")
                    panel.plot(rates[best], mean[best], "*", color=shade, markersize=13)
                    print(f"{part:>5} {net:>8} {name:>8} width {width:>4}: best lr {rates[best]:.2g}, "
                          f"loss {mean[best]:.4f}, {len(whole)} seeds differ by {np.ptp(by_seed[:, best]):.4f}")
            span = 0.05 if net == "planner" else 0.3
            low = np.nanmin([line.get_ydata().min() for line in panel.lines])
            panel.set(xscale="log", title=f"{net}, {'training, fresh noise' if part == 'train' else 'validation'}",
                      ylabel="nats per token", ylim=(low - span / 15, low + span))
            panel.set_xticks(RATES["standard"], [f"{1000 * lr:g}" for lr in RATES["standard"]])
            panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel(f"lr / 1e-3: at base width {BASE.base_width} (muP), of every tensor (standard)")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(ROOT / "assets" / "mup_basin.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] == ["coords"]:
        coords()
    elif sys.argv[1:2] == ["basin"] and all(seed.isdigit() for seed in sys.argv[2:]):
        basin(tuple(map(int, sys.argv[2:])) or SEEDS)
    else:
        raise SystemExit("python experiments/mup.py coords      python experiments/mup.py basin [SEED ...]")
