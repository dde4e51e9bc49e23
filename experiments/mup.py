"""Does a learning rate transfer across widths?

python experiments/mup.py coords
python experiments/mup.py basin [SEED ...]
python experiments/mup.py patch

coords  sizes of activations in both networks after 0 to 10 Adam steps: independent of the width
        under muP
basin   losses of planner and denoiser over learning rates and widths: the best rate does not
        depend on the width under muP
patch   both with patches of 2x2 tokens, two widths each; one seed of the basin
The first two write a CSV file and a plot to assets/, the third a CSV file. Finished rows are
skipped, so the same command resumes. The standard parametrization is muP with the base width set to
the width: one rate for all tensors.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import common
import numpy as np
import torch

import config
import data
import methods
import model
import train_ddpd
from support import runtime, training
from support.chunked_head import hidden_at_sites, map_logits

BASE = config.Config(image_size=8, n_layer=4, out_dir="out/mup")
NETS = ("planner", "denoiser")
TITLES = {"mup": "muP", "standard": "standard"}

# coords
KINDS = [("fixed", "mup"), ("growing", "mup"), ("fixed", "standard")]  # heads, parametrization
COORD_WIDTHS = (64, 128, 256, 512, 1024)
COORD_STEPS = 10
COORD_SEEDS = (0, 1, 2)
COORD_BATCH = 8
COORDS = common.Table("mup_coords.csv")

# basin
HEAD_DIM = 16
WIDTHS = (32, 64, 128, 256)
EDGES = (WIDTHS[0], WIDTHS[-1])     # widths of the standard parametrization
SEEDS = (0, 1)
STEPS = 150
N_LAST = 50                         # iterations in the mean training loss
RATES = {
    "mup": [2.0**i * 1e-3 for i in range(-2, 4)],
    "standard": [2.0**i * 1e-3 for i in range(-2, 6)],
}
BASIN = common.Table("mup_basin.csv")

# patch
PATCH = 2
PATCH_COORD_WIDTHS = (128, 512)
PATCH_WIDTHS = (64, 256)
PATCHED = common.Table("mup_patch.csv")


def base_width(parametrization: str, width: int) -> int:
    return width if parametrization == "standard" else BASE.base_width


# Sizes of activations


def coords() -> None:
    for seed in COORD_SEEDS:
        for width in COORD_WIDTHS:
            for heads, parametrization in KINDS:
                key = dict(width=width, head_dim=heads, parametrization=parametrization, seed=seed)
                if COORDS.has(**key):
                    continue
                cfg = coords_config(**key)
                for (net, what, step), size in coordinates(cfg).items():
                    COORDS.add(dict(key, net=net, what=what, step=step, rms=f"{size:.4g}"))
                print(*key.values(), flush=True)
    plot_coords(COORDS.rows())


def coords_config(width: int, head_dim: str, parametrization: str, seed: int) -> config.Config:
    """head_dim "fixed": heads are 64 wide; "growing": there are 4 of them at every width."""
    is_fixed = head_dim == "fixed"
    return replace(
        BASE,
        n_embd=width,
        n_head=width // 64 if is_fixed else 4,
        base_head_dim=0 if is_fixed else BASE.base_width // 4,
        base_width=base_width(parametrization, width),
        batch_size=COORD_BATCH,
        seed=seed,
    )


def coordinates(cfg: config.Config) -> dict[tuple[str, str, int], float]:
    """Root mean squares after 0 to COORD_STEPS Adam steps.  -> {(net, what, step): rms}"""
    meta, splits = data.load("digits", 8)
    spec = methods.spec_of(asdict(cfg), meta)
    batches = training.Batches(cfg, spec, splits["train"], 1)
    lrs = {"planner": cfg.planner_lr, "denoiser": cfg.denoiser_lr}
    torch.manual_seed(cfg.seed)
    sizes = {}
    for name, net in methods.build(spec).items():
        groups = model.param_groups(net, lrs[name], cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        for step in range(COORD_STEPS + 1):
            task = batches.tasks(step, 0)[name]
            with runtime.autocast(torch.device("cpu")):
                with recorded_sizes(net) as seen:
                    hidden = hidden_at_sites(net, task)
                seen["head"] = [rms(net.logits(hidden))]
                loss = map_logits(net, hidden, task.loss, task.target).mean()
            for what, values in seen.items():
                sizes[name, what, step] = np.mean(values)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return sizes


@contextmanager
def recorded_sizes(net: model.Transformer) -> Iterator[dict[str, list[float]]]:
    """While open, records sizes of the attention logits and of what each block adds.

    yields {what: [rms of each call]}
    """
    seen = {}
    attend = model.attend
    model.attend = recording_attend(attend, seen)
    hooks = []
    for i, block in enumerate(net.blocks):
        hooks.append(block.register_forward_hook(recording_hook(f"block {i}", seen)))
    try:
        yield seen
    finally:
        model.attend = attend
        for hook in hooks:
            hook.remove()


def recording_attend(attend: Callable, seen: dict[str, list[float]]) -> Callable:
    """model.attend, which also records the size of the attention logits."""

    def recording(q, k, v, scale):
        is_self = k.shape[2] == q.shape[2]
        logits = q @ k.transpose(-1, -2) * scale
        what = "attention self" if is_self else "attention cross"
        seen.setdefault(what, []).append(rms(logits))
        return attend(q, k, v, scale)

    return recording


def recording_hook(what: str, seen: dict[str, list[float]]) -> Callable:
    """A hook that records the size of what a block adds to the residual."""

    def record(block, args, out):
        seen[what] = [rms(out - args[0])]

    return record


def rms(x: torch.Tensor) -> float:
    return x.detach().float().square().mean().sqrt().item()


def plot_coords(rows: common.Rows) -> None:
    """Size against width after the last step, a panel for each network and kind of run."""
    options = dict(sharex=True, sharey="row")
    figure, panels = common.open_figure(2, 3, width=12, height=6.4, **options)
    for column, (heads, parametrization) in enumerate(KINDS):
        of_kind = common.select(rows, head_dim=heads, parametrization=parametrization)
        for panel, net in zip(panels[:, column], NETS, strict=True):
            sizes = mean_sizes(common.select(of_kind, net=net))
            draw_sizes(panel, sizes)
            ratios = largest_ratios(sizes)
            title = f"{net}, {TITLES[parametrization]}, head_dim {heads}"
            ratio = f"largest ratio over widths 128 to 1024: {max(ratios.values()):.2f}"
            panel.set_title(f"{title}\n{ratio}")
            words = [f"{ratio:.2f} of {group}" for group, ratio in ratios.items()]
            print(f"{title}: largest ratio {', '.join(words)}")
    for panel in panels[-1]:
        panel.set_xlabel("width")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"root mean square after {COORD_STEPS} steps")
    panels[0, 0].legend(fontsize=7, ncols=2)
    common.save_figure(figure, "mup_coords.png")


def mean_sizes(rows: common.Rows) -> dict[tuple[str, int], list[float]]:
    """Means over seeds.  -> {(what, step): size at each width}"""
    values = {}
    for row in rows:
        key = (row["what"], int(row["step"]), int(row["width"]))
        values.setdefault(key, []).append(float(row["rms"]))
    sizes = {}
    for what in sorted({row["what"] for row in rows}):
        for step in range(COORD_STEPS + 1):
            sizes[what, step] = [np.mean(values[what, step, width]) for width in COORD_WIDTHS]
    return sizes


def draw_sizes(panel, sizes: dict[tuple[str, int], list[float]]) -> None:
    """A line for each kind of activation after the last step."""
    for (what, step), size in sizes.items():
        if step == COORD_STEPS and min(size) > 0:
            panel.plot(COORD_WIDTHS, size, marker="o", markersize=3, label=what)
    panel.set_yscale("log")
    common.set_ticks(panel, COORD_WIDTHS)


def largest_ratios(sizes: dict[tuple[str, int], list[float]]) -> dict[str, float]:
    """How far from independent of the width, at any step, leaving out the narrowest networks."""
    ratios = {"attention logits": 1.0, "blocks and head": 1.0}
    for (what, _), size in sizes.items():
        if min(size) > 0:
            is_attention = what.startswith("attention")
            group = "attention logits" if is_attention else "blocks and head"
            ratios[group] = max(ratios[group], max(size[1:]) / min(size[1:]))
    return ratios


# Losses over learning rates


def basin(seeds: tuple[int, ...] = SEEDS) -> None:
    grid = [("mup", width) for width in WIDTHS]
    grid += [("standard", width) for width in EDGES]
    for seed in seeds:
        for parametrization, width in grid:
            for lr in RATES[parametrization]:
                key = dict(parametrization=parametrization, width=width, lr=lr, seed=seed)
                if not BASIN.has(**key):
                    row = key | train_at(**key)
                    BASIN.add(row)
                    print(row, flush=True)
    plot_basin(BASIN.rows())


def train_at(
    parametrization: str, width: int, lr: float, seed: int, patch: int = 1,
) -> dict[str, float | str]:
    """Train in a folder that is removed.  -> {NET_train and NET_val: nats, commit}"""
    folder = Path(f"out/mup/{parametrization}_{width}_{lr}_{seed}")
    cfg = replace(
        BASE,
        n_embd=width,
        n_head=width // HEAD_DIM,
        patch=patch,
        base_width=base_width(parametrization, width),
        planner_lr=lr,
        denoiser_lr=lr,
        max_iters=STEPS,
        warmup_iters=20,
        eval_interval=0,
        save_interval=0,
        seed=seed,
        out_dir=str(folder),
    )
    shutil.rmtree(folder, ignore_errors=True)
    losses = losses_of(cfg)
    shutil.rmtree(folder, ignore_errors=True)
    return losses | {"commit": runtime.commit()}


def losses_of(cfg: config.Config) -> dict[str, float]:
    """Training loss (mean of the last N_LAST iterations) and validation loss; inf: diverged."""
    try:
        train_ddpd.main(cfg)
    except SystemExit as error:
        if "not finite" not in str(error):
            raise
        return {f"{net}_{part}": np.inf for net in NETS for part in ("train", "val")}
    lines = (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    last = [row for row in log if "planner_loss" in row and row["it"] > STEPS - N_LAST]
    means = {}
    for net in NETS:
        mean = float(np.mean([row[f"{net}_loss"] for row in last]))
        means[f"{net}_train"] = round(mean, 5)
    validation = log[-1]
    means["planner_val"] = validation["val_planner_bce"]
    means["denoiser_val"] = validation["val_denoiser_ce"]
    return means


def plot_basin(rows: common.Rows) -> None:
    """Loss against learning rate, a line for each width; prints the best rate of each."""
    figure, panels = common.open_figure(2, 2, width=10, height=7.4, sharex=True)
    parts = {"train": "training, fresh noise", "val": "validation"}
    for row_of_panels, (part, title) in zip(panels, parts.items(), strict=True):
        for panel, net in zip(row_of_panels, NETS, strict=True):
            for width in WIDTHS:
                draw_basin(panel, rows, "mup", width, net, part)
            for width in EDGES:
                draw_basin(panel, rows, "standard", width, net, part)
            panel.set(title=f"{net}, {title}", ylabel="nats per token", ylim=y_range(panel, net))
            rates = RATES["standard"]
            panel.set_xscale("log")
            panel.set_xticks(rates, [f"{1000 * lr:g}" for lr in rates])
            panel.minorticks_off()
    for panel in panels[-1]:
        base = f"at base width {BASE.base_width} (muP), of every tensor (standard)"
        panel.set_xlabel(f"lr / 1e-3: {base}")
    panels[0, 0].legend(fontsize=8)
    common.save_figure(figure, "mup_basin.png")


def draw_basin(
    panel, rows: common.Rows, parametrization: str, width: int, net: str, part: str
) -> None:
    """Mean over the seeds that have all rates, with a star at the best rate."""
    from matplotlib import pyplot

    rates = RATES[parametrization]
    mine = common.select(rows, parametrization=parametrization, width=width)
    by_key = {(row["lr"], row["seed"]): float(row[f"{net}_{part}"]) for row in mine}
    by_seed = []
    for seed in SEEDS:
        keys = [(str(lr), str(seed)) for lr in rates]
        if all(key in by_key for key in keys):
            by_seed.append([by_key[key] for key in keys])
    if not by_seed:
        return
    losses = np.array(by_seed)                                          # (seeds, rates)
    mean = losses.mean(0)
    best = int(mean.argmin())
    spread = np.ptp(losses[:, best])
    name = TITLES[parametrization]
    line = "-" if parametrization == "mup" else "--"
    darkness = WIDTHS.index(width) / (len(WIDTHS) - 1)
    color = pyplot.get_cmap("viridis")(0.85 - 0.8 * darkness)
    style = dict(color=color, marker="o", markersize=3, label=f"{name}, {width}")
    panel.plot(rates, mean, line, **style)
    panel.plot(rates[best], mean[best], "*", color=color, markersize=13)
    print(
        f"{part:>5} {net:>8} {name:>8} width {width:>4}: best lr {rates[best]:.2g}, "
        f"loss {mean[best]:.4f}, {len(by_seed)} seeds differ by {spread:.4f}"
    )


def y_range(panel, net: str) -> tuple[float, float]:
    """From just below the lowest loss, a range that fits the network."""
    low = np.nanmin([line.get_ydata().min() for line in panel.lines])
    span = 0.05 if net == "planner" else 0.3
    return low - span / 15, low + span


# Patches


def patched() -> None:
    """The best rate at each width, and how far sizes of activations depend on the width."""
    for width in PATCH_WIDTHS:
        for lr in RATES["mup"]:
            key = dict(width=width, lr=lr)
            if not PATCHED.has(**key):
                PATCHED.add(key | train_at("mup", width, lr, SEEDS[0], PATCH))
    for net in NETS:
        for width in PATCH_WIDTHS:
            rows = common.select(PATCHED.rows(), width=width)
            best = min(rows, key=lambda row: float(row[f"{net}_train"]))
            print(f"{net}, width {width}: best lr {best['lr']}, loss {best[f'{net}_train']}")
    for patch in (1, PATCH):
        sizes = [mean_coordinates(width, patch) for width in PATCH_COORD_WIDTHS]
        for net in NETS:
            pairs = [[size[key] for size in sizes] for key in sizes[0] if key[0] == net]
            ratio = max(max(pair) / min(pair) for pair in pairs if min(pair) > 0)
            print(
                f"patch {patch}, {net}: sizes at widths {PATCH_COORD_WIDTHS} differ by a factor "
                f"{ratio:.2f} at most"
            )


def mean_coordinates(width: int, patch: int) -> dict[tuple[str, str, int], float]:
    """As coordinates(), the mean of all seeds."""
    of_seeds = []
    for seed in COORD_SEEDS:
        cfg = replace(coords_config(width, "fixed", "mup", seed), patch=patch)
        of_seeds.append(coordinates(cfg))
    return {key: np.mean([sizes[key] for sizes in of_seeds]) for key in of_seeds[0]}


if __name__ == "__main__":
    words = common.read_words(__doc__, "coords", "basin", "patch")
    if words == ["coords"]:
        coords()
    elif words == ["basin"]:
        basin(tuple(common.read_numbers()) or SEEDS)
    elif words == ["patch"]:
        patched()
    else:
        raise SystemExit(__doc__)
