"""What a run takes, what its losses can reach, and how well its planner is calibrated."""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import config
import data
import methods
import model
from diffusion import objectives, processes
from diffusion.decoding import sample_categorical
from diffusion.processes import corrupt, split_planner_denoiser, stratified_t
from support import runtime
from support.attention import as_on_gpu
from support.checkpoint import Run
from support.chunked_head import chunk_size

N_LEVELS = 256              # noise levels that stand for all of them in the Bayes planner's sum
N_LEVEL_BINS = 10           # of noise level in tables
N_CALIBRATION_BINS = 15

# What a config takes: train_ddpd.py CONFIG --dry-run


class Cost(NamedTuple):
    """Of a micro-step."""
    n_params: int
    bytes: dict[str, int]               # by purpose
    flops: int


class Gpu(NamedTuple):
    flops_per_s: float                  # published peak of dense bfloat16 products, sums in float32
    bytes: float


GPUS = {
    # NVIDIA A100 Tensor Core GPU Datasheet, 80GB SXM
    "a100": Gpu(312e12, 80e9),
    # NVIDIA H100 Tensor Core GPU Datasheet, SXM: half of 1,979, which is with sparsity
    "h100": Gpu(989e12, 80e9),
    # NVIDIA H200 Tensor Core GPU Datasheet, SXM: half of 1,979, which is with sparsity
    "h200": Gpu(989e12, 141e9),
    # NVIDIA HGX B200, an eighth: half of 36 PFLOPS with sparsity, and 1.4 TB
    "b200": Gpu(2250e12, 180e9),
    # NVIDIA L4 Tensor Core GPU Datasheet: half of 242, which is with sparsity
    "l4": Gpu(121e12, 24e9),
    # NVIDIA Ada GPU Architecture, white paper, GeForce RTX 4090: without sparsity
    "rtx4090": Gpu(165.2e12, 24e9),
}


def bytes_kept(block: model.Block, shape: model.Shape, batch: int, device: torch.device,
               autocast: torch.autocast) -> int:
    """Bytes that autograd keeps of a block between its passes, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(y):
        storage = y.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return y

    inputs = inputs_of_block(shape, batch, device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y), autocast:
        y = block(*inputs)
    assert y.grad_fn                                    # alive while counted
    return sum(size for where, size in kept.items() if where not in weights)


def inputs_of_block(shape: model.Shape, batch: int, device: torch.device) -> tuple:
    rope = [[torch.ones(shape.n_patches, shape.head_dim // 2, device=device)] * 2] * 2
    x = torch.randn(batch, shape.n_patches, shape.n_embd, device=device, requires_grad=True)
    label_tokens = torch.randn(batch, model.N_LABEL_TOKENS, shape.n_embd, device=device)
    return x, label_tokens, rope


def measured_rate(
    shape: model.Shape, batch_size: int, device: torch.device, autocast: torch.autocast,
) -> float:
    """FLOP/s that a block reaches forward and backward, in the best of three turns."""
    block = model.Block(shape).to(device)
    batch = max(1, min(batch_size, 4096 // shape.n_patches))
    times = []
    for _ in range(3):
        x, *others = inputs_of_block(shape, batch, device)
        began = time.perf_counter()
        with autocast:
            y = block(x, *others)
        y.sum().backward()
        x.grad.sum().item()                             # waits for the device
        times.append(time.perf_counter() - began)
    return 3 * flops_of_block(shape) * batch / min(times)


def cost_of_step(
    spec: methods.Spec, batch_size: int, device: torch.device, autocast: torch.autocast,
) -> Cost:
    """What a micro-step of batch_size sequences takes. One block is run for it on the spot."""
    shape = spec.shape
    with torch.device("meta"):
        nets = methods.build(spec)
    n_params = sum(p.numel() for net in nets.values() for p in net.parameters())

    block = model.Block(shape).to(device)
    kept_by_two = bytes_kept(block, shape, 2, device, autocast)     # one alone keeps more views
    kept_per_sequence = bytes_kept(block, shape, 3, device, autocast) - kept_by_two

    logits = 0
    for net in nets.values():
        n_logits = min(n_loss_tokens(spec, net, batch_size), chunk_size(net))
        # logits, their log-softmax, its gradient
        logits = max(logits, 3 * 4 * n_logits * net.head.out_features)
    n_blocks = shape.n_layer                            # one network at a time
    if spec.config["trunk_grad"]:                       # twice through the trunk, and the planner
        n_blocks = 2 * shape.n_layer + nets["planner"].shape.n_layer
    kept_by_block = kept_by_two + (batch_size - 2) * kept_per_sequence
    kept = n_blocks * kept_by_block
    if spec.config["recompute"]:
        kept = kept_by_block + 4 * n_blocks * batch_size * shape.n_patches * shape.n_embd
    sizes = {
        "weights": 4 * n_params,
        "gradients": 4 * n_params,
        "optimizer": 8 * n_params,
        "EMA": 4 * n_params,
        "activations": kept,
        "logits": logits,
    }
    return Cost(n_params, sizes, flops_of_step(spec, nets, batch_size))


def cost_on_gpu(spec: methods.Spec, batch_size: int) -> Cost:
    """As cost_of_step on a GPU in bfloat16, for which a block is run on the CPU by its kernel."""
    with as_on_gpu():
        return cost_of_step(
            spec, batch_size, torch.device("cpu"), torch.autocast("cpu", torch.bfloat16)
        )


def n_loss_tokens(spec: methods.Spec, net: model.Transformer, batch: int) -> int:
    """Tokens that enter a network's loss: half of them where a denoiser learns noise alone."""
    learns_noise = "planner" in spec.method.networks or spec.noise.only_masks
    is_half = net.role == "denoiser" and learns_noise
    return batch * net.shape.n_tokens // (2 if is_half else 1)


def flops_of_block(shape: model.Shape) -> int:
    """Of a forward pass of a sequence: products only."""
    n, d = shape.n_patches, shape.n_embd
    return n * (28 * d * d + 4 * n * d + 4 * model.N_LABEL_TOKENS * d)


def flops_of_step(spec: methods.Spec, nets: dict[str, model.Transformer], batch: int) -> int:
    """Of a micro-step of training, forward and twice that backward, and of the denoiser's passes
    for a planner; nothing that is computed again counts."""
    shape = spec.shape
    flops = 0
    for net in nets.values():
        flops += batch * net.shape.n_layer * flops_of_block(shape)
        flops += 2 * n_loss_tokens(spec, net, batch) * net.head.weight.numel()
        if net.unpatch is not None:
            flops += 2 * batch * shape.n_patches * net.unpatch.weight.numel()
    passes = methods.passes_for_planner(spec)
    return 3 * flops + round(passes * batch * shape.n_layer * flops_of_block(shape))


def dry_run(cfg: config.Config, spec: methods.Spec) -> None:
    """Print what this config takes, and train nothing."""
    device = runtime.pick_device()
    autocast = runtime.autocast(device, cfg.dtype)
    if cfg.gpu:
        cost = cost_on_gpu(spec, cfg.batch_size)
    else:
        cost = cost_of_step(spec, cfg.batch_size, device, autocast)
    print(
        f"{cfg.data}: {describe_data(spec)}; {cost.n_params / 1e6:.2f} M parameters; "
        f"batch {cfg.batch_size} per process"
    )
    parts = [f"{name} {size / 2**30:.2f}" for name, size in cost.bytes.items()]
    n_bytes = sum(cost.bytes.values())
    print(f"memory per process: {n_bytes / 2**30:.2f} GiB = " + " + ".join(parts))
    flops = cost.flops * cfg.grad_accumulation_steps
    if cfg.gpu:
        print_estimate(cfg, flops, n_bytes)
        return
    flops_per_s = measured_rate(spec.shape, cfg.batch_size, device, autocast)
    seconds = flops / flops_per_s
    print(
        f"time per iteration: {seconds:.3g} s = {flops / 1e12:.3g} TFLOP at "
        f"{flops_per_s / 1e12:.3g} TFLOP/s, "
        f"measured on one block on this {device.type}; all {cfg.max_iters}: "
        f"{hours(cfg.max_iters * seconds)}"
    )


def print_estimate(cfg: config.Config, flops: int, n_bytes: int) -> None:
    """Print memory and time of a process on cfg.gpu.  flops of an iteration, n_bytes at once"""
    gpu = GPUS[cfg.gpu]
    if n_bytes < gpu.bytes:
        verdict = "fits, if CUDA itself takes no more than the rest"
    else:
        verdict = "does not fit; --recompute or a smaller --batch-size may"
    print(f"{n_bytes / 1e9:.1f} GB of the {gpu.bytes / 1e9:.0f} GB of a {cfg.gpu}: {verdict}")
    rate = cfg.utilization * gpu.flops_per_s
    seconds = flops / rate
    total = cfg.max_iters * seconds
    print(
        f"estimate, not measured: {seconds:.3g} s per iteration = {flops / 1e12:.3g} TFLOP at "
        f"{rate / 1e12:.3g} TFLOP/s, {cfg.utilization:.0%} (an assumption) of the "
        f"{gpu.flops_per_s / 1e12:.0f} published for dense bfloat16"
    )
    n_sequences = cfg.n_gpus * cfg.batch_size * cfg.grad_accumulation_steps
    print(
        f"{cfg.n_gpus} x {cfg.gpu}, {n_sequences} sequences per iteration: all {cfg.max_iters} "
        f"iterations in {hours(total)}, {hours(cfg.n_gpus * total)} of GPU; validations come on top"
    )


def hours(seconds: float) -> str:
    n_hours = seconds / 3600
    return f"{n_hours:,.0f} hours" if n_hours > 10 else f"{n_hours:.2g} hours"


def describe_data(spec: methods.Spec) -> str:
    return f"{' x '.join(map(str, spec.grid))} tokens, V = {spec.vocab}, {spec.n_classes} classes"


# What losses can reach


def print_summary(
    cfg: config.Config, spec: methods.Spec, train: data.Split, nets: dict[str, model.Transformer],
    world: runtime.World,
) -> dict[str, float]:
    """Print what a reader needs to judge the first numbers.  -> the losses named in it, nats"""
    tokens_per_it = spec.shape.n_tokens * cfg.batch_size * cfg.grad_accumulation_steps * world.size
    sizes = [
        f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
        for name, net in nets.items()
    ]
    dtype = str(runtime.matmul_dtype(world.device, cfg.dtype)).removeprefix("torch.")
    print(data_and_folder(cfg, spec, train))
    print(f"{spec.meta['name']}: {describe_data(spec)}; {', '.join(sizes)} parameters")
    print(f"{tokens_per_it} tokens per iteration on {world.size} x {world.device.type}, {dtype}")
    losses = {}
    if cfg.method == "ddpd":
        losses["denoiser_start"] = math.log(spec.vocab)
        print(f"denoiser CE starts at ln V = {losses['denoiser_start']:.4f} nats")
    if "planner" in nets and spec.noise.has_posterior and not spec.method.has_trunk:
        constant, level_only = processes.PLANNER_BCE_CONSTANT, processes.PLANNER_BCE_LEVEL_ONLY
        floor = processes.planner_bce_floor(spec.vocab)
        losses |= dict(planner_blind=constant, planner_level_only=level_only, planner_floor=floor)
        print(
            f"planner BCE: {constant:.4f} nats blind, {level_only:.4f} reading only the level, "
            f"{floor:.4f} at best "
            "(tokens redrawn as themselves)"
        )
    is_fresh_overfit = 0 < cfg.overfit <= 64 and cfg.overfit_noise == "fresh"
    is_fresh_overfit = is_fresh_overfit and spec.noise.has_posterior
    if is_fresh_overfit and cfg.method == "ddpd" and not spec.meta["given"]:
        rows = np.arange(min(cfg.overfit, len(train)))
        x0, label = (torch.from_numpy(y) for y in train.rows(rows))
        by_heart = bayes_losses(spec, x0, label, runtime.generator("bayes losses"))
        losses |= {f"{name}_by_heart": value for name, value in by_heart.items()}
        words = [f"{name} {value:.4f}" for name, value in by_heart.items()]
        print(f"{len(x0)} sequences known by heart leave: " + ", ".join(words))
    if cfg.method == "ddpd" and cfg.batch_size < 4:
        print(
            "warning: a loss is the mean over the noise tokens of a micro-batch; under 4 sequences "
            "that weighs low noise levels up"
        )
    if world.device.type == "cpu" and spec.shape.n_patches * cfg.n_embd > 2**17:
        print("warning: this setting takes hours on a CPU; configs/digits.py takes minutes")
    return losses


def data_and_folder(cfg: config.Config, spec: methods.Spec, train: data.Split) -> str:
    """What is trained on, and the run's folder, in one line."""
    folder = train.tokens_file.parent
    line = f"training on {folder}, {len(train)} sequences; the run goes to {cfg.out_dir}"
    own_size = data.import_source("digits").SIZE
    size = spec.grid[-1]
    if cfg.data != "digits" or size <= own_size:
        return line
    return (
        f"{line}. These digits are enlarged from {own_size}x{own_size} to {size}x{size}; MNIST is "
        f"better: python data.py mnist --image-size {size}, then --data mnist"
    )


def bayes_losses(spec: methods.Spec, x0: Tensor, label: Tensor, generator: torch.Generator,
                 n_rows: int = 2048) -> dict[str, float]:
    """Least losses on fresh noise over a few sequences that are known by heart: Bayes' rule over
    all of them.

    x0 (S, N), label (S,)  ->  {network: nats per token}, over n_rows draws of noise
    """
    row = torch.arange(n_rows) % len(x0)
    t = stratified_t(n_rows, generator)
    tasks = methods.make_tasks(spec, x0[row], label[row], None, generator, t)
    # (R, S): the label rules the others out
    log_prior = (label[row][:, None] == label).double().log()
    losses = {}
    for name, task in tasks.items():
        if name == "planner":
            p_true = bayes_planner(task, x0, log_prior, spec.vocab)
        else:
            p_true = bayes_denoiser(task, x0, row, t, log_prior, spec)
        losses[name] = -p_true.clamp_min(1e-12).log().mean().item()
    return losses


def bayes_planner(task: objectives.Task, x0: Tensor, log_prior: Tensor, vocab: int) -> Tensor:
    """Probability of the right answer, for a planner that is told no t: the sum is over levels
    too.  -> (n,)"""
    hit = task.xt[:, None] == x0                                        # (R, S, N)
    n_hit = hit.sum(-1, keepdim=True)
    t = (torch.arange(N_LEVELS, dtype=torch.float64) + 0.5) / N_LEVELS
    log_hit = (1 - t + t / vocab).log()                                 # (levels,)
    log_miss = (t / vocab).log()
    # (R, S, levels)
    joint = log_prior[..., None] + n_hit * log_hit + (x0.shape[1] - n_hit) * log_miss
    w = joint.flatten(1).softmax(1).view_as(joint)
    p_kept_if_hit = (w * (1 - (log_miss - log_hit).exp())).sum(-1)
    p_clean = torch.einsum("rsn,rs->rn", hit.double(), p_kept_if_hit)
    return torch.where(task.target.view_as(p_clean) > 0, 1 - p_clean, p_clean).flatten()


def bayes_denoiser(task: objectives.Task, x0: Tensor, row: Tensor, t: Tensor, log_prior: Tensor,
                   spec: methods.Spec) -> Tensor:
    """Probability of the right token, for a denoiser that is told t or counts its masks.  ->
    (n,)"""
    vocab = spec.vocab
    level = t.double()[:, None]
    hit = task.xt[:, None] == x0                                        # (R, S, N)
    is_mask = task.xt[:, None] == vocab
    if spec.noise.only_masks:
        evidence = torch.where(hit | is_mask, 0.0, -torch.inf)
    else:
        evidence = torch.where(hit, (1 - level + level / vocab).log(), (level / vocab).log())
    total = log_prior + evidence.sum(-1)                                # (R, S)
    has_own_evidence = not spec.noise.only_masks and spec.name != "ddpd-single"
    w = (total[..., None] - evidence if has_own_evidence else total).softmax(1)
    w = w.view(*w.shape[:2], -1)                                        # (R, S, 1 or N)
    p_true = (w * (x0 == x0[row][:, None])).sum(1)
    return p_true.flatten()[task.sites]


# How well a planner is calibrated


@torch.no_grad()
def planner_predictions(
    run: Run, x0: Tensor, label: Tensor, batch: int,
) -> dict[str, np.ndarray]:
    """P(noise) of held-out tokens and whether they are noise, on corrupted data and on what the
    planner sees in use.

    In use: noise of level t is replaced by the denoiser's draws, and what differs from the clean
    token is noise. x0 (n, N), label (n,) on the CPU  ->  {"corrupted" or "in use": (3, n * N) of t,
    p_noise, is_noise}
    """
    spec, nets = run.spec, run.nets
    device = runtime.device_of_doubles(run.device)
    n = len(x0)
    rng = runtime.generator("planner")
    t = (torch.randperm(n, generator=rng)[:, None] + 0.5) / n
    noise = spec.noise.without_masks()                  # the planner's
    out = {"corrupted": [], "in use": []}

    def ask(x, t, label):
        if "planner" in nets:
            return nets["planner"](x, t, label).sigmoid()
        return split_planner_denoiser(nets["denoiser"](x, t, label).softmax(-1), x, t, noise)[0]

    for i in torch.arange(n).split(batch):
        x, is_noise = (y.to(device) for y in corrupt(x0[i], t[i], noise, rng))
        clean, level, given_label = x0[i].to(device), t[i].to(device), label[i].to(device)
        with runtime.autocast(run.device, spec.config["dtype"]):
            p_noise = ask(x, level, given_label)
            out["corrupted"].append(columns(level, p_noise, is_noise))
            x_input = x.masked_fill(is_noise, spec.vocab) if spec.noise.only_masks else x
            probs = nets["denoiser"](x_input, level, given_label).softmax(-1)
            if spec.name == "ddpd-single":
                probs = split_planner_denoiser(probs, x, level, noise)[1]
            draws = sample_categorical(probs, torch.Generator(device).manual_seed(int(i[0])))
            filled = torch.where(is_noise, draws, x)
            out["in use"].append(columns(level, ask(filled, level, given_label), filled != clean))
    return {name: torch.cat(parts, 1).numpy() for name, parts in out.items()}


def columns(t: Tensor, p_noise: Tensor, is_noise: Tensor) -> Tensor:
    """-> (3, B * N) on the CPU"""
    return torch.stack([t.expand(p_noise.shape), p_noise, is_noise.float()]).flatten(1).cpu()


def calibration_error(
    p: np.ndarray, is_noise: np.ndarray,
) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error over equal bins of p.  -> error, [(mean p, share of noise,
    tokens)]"""
    bins = np.minimum((p * N_CALIBRATION_BINS).astype(int), N_CALIBRATION_BINS - 1)
    table = []
    for b in np.unique(bins):
        here = bins == b
        table.append((p[here].mean(), is_noise[here].mean(), here.sum()))
    return sum(n * abs(mean - share) for mean, share, n in table) / len(p), table


def report_planner(run: Run, x0: Tensor, label: Tensor, batch: int) -> None:
    """Print AUROC and calibration error per bin of noise level; the reliability diagram goes to
    RUN/reliability.png."""
    import matplotlib
    from sklearn.metrics import roc_auc_score

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 4.6), layout="constrained")
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (t, p, is_noise) in planner_predictions(run, x0, label, batch).items():
        error, table = calibration_error(p, is_noise)
        auroc = roc_auc_score(is_noise, p)
        print(f"planner of {run.folder}, {name}: AUROC {auroc:.3f}, calibration error {error:.3f}")
        for b in range(N_LEVEL_BINS):
            here = (t * N_LEVEL_BINS).astype(int) == b
            if 0 < is_noise[here].sum() < here.sum():
                own_auroc = roc_auc_score(is_noise[here], p[here])
                own_error, _ = calibration_error(p[here], is_noise[here])
                print(
                    f"  t {b / N_LEVEL_BINS:.1f} to {(b + 1) / N_LEVEL_BINS:.1f}: "
                    f"AUROC {own_auroc:.3f}, "
                    f"calibration error {own_error:.3f}"
                )
        mean_p, share, _ = np.array(table).T
        panel.plot(
            mean_p, share, marker="o", markersize=4,
            label=f"{name}: AUROC {auroc:.3f}, error {error:.3f}",
        )
    panel.set(
        xlabel="P(noise) said by the planner", ylabel="share of noise", title=str(run.folder),
        xlim=(0, 1), ylim=(0, 1),
    )
    panel.legend()
    figure.savefig(run.folder / "reliability.png", dpi=110)
    pyplot.close(figure)
