"""The flags of every script: dataclasses, read by load().

Flags override config files, of which a later one overrides an earlier one, and these the defaults.
The comment beside a field is its --help. Off is 0 or "".
"""

import math
import os
import sys
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from formats.config_files import read_file, summary_of
from formats.flags import (
    Layers,
    NotNegative,
    NotNegativeFloat,
    Positive,
    Seed,
    Share,
    check_bounds,
    check_type,
    flaw,
    parse,
)
from formats.messages import may_stop_reading, nearest, shown
from formats.meta_file import MAX_IDS, MAX_TOKENS

CONFIGS = Path(__file__).parent / "configs"


# Training, in the groups of --help


@dataclass(frozen=True)
class DataOptions:
    """What the tokens are."""
    data: str = "digits"                    # one of sources/, or a folder: under data/, or a path
    image_size: Positive = 32               # tokens per side, where a source makes them
    grey_levels: NotNegative = 0            # grey levels, where a source makes tokens; 0: its own
    vocab: NotNegative = 0                  # vocabulary size the data must have; 0: any
    grid: tuple[int, ...] = ()              # tokens per axis the data must have; (): any
    n_classes: NotNegative = 0              # classes the data must have, where vocab is stated


@dataclass(frozen=True)
class NetworkOptions:
    """Planner and denoiser have the same shape, but for the blocks of a planner on the trunk."""
    n_layer: Layers = 6                     # blocks
    n_head: Positive = 4                    # heads; they divide n_embd
    n_embd: Positive = 512                  # width of the residual
    base_width: Positive = 512              # muP: the width at which every tensor trains at the lr
    base_head_dim: NotNegative = 0          # muP: head width at base_width; 0: the same everywhere
    causal: bool = False                    # videos: a frame sees itself and those before it
    patch: Positive = 1                     # tokens per side of the patches that attention sees


@dataclass(frozen=True)
class OptimisationOptions:
    """AdamW on batches of batch_size * grad_accumulation_steps * processes sequences."""
    batch_size: Positive = 32               # sequences per process and micro-step
    grad_accumulation_steps: Positive = 1   # micro-steps per iteration
    max_iters: Positive = 2000              # iterations (optimizer steps)
    planner_lr: NotNegativeFloat = 1e-3     # Adam lr of the planner at base_width
    denoiser_lr: NotNegativeFloat = 2e-3    # Adam lr of the denoiser at base_width
    warmup_iters: NotNegative = 50          # iterations of linear warm-up
    lr_decay_iters: NotNegative = 0         # cosine decay to a tenth ends here; 0: at max_iters
    weight_decay: NotNegativeFloat = 0.01   # on matrices only
    grad_clip: NotNegativeFloat = 1.0       # largest gradient norm of each network; 0: unclipped
    label_dropout: Share = 0.1              # share of labels made the null class, for guidance
    ema_decay: Share = 0.999                # of the averaged weights per iteration, after a warm-up
    overfit: NotNegative = 0                # train on this many sequences only; 0: on all
    # with --overfit. fixed: the same noise every time, losses go to near 0; fresh: they go to the
    # floors printed
    overfit_noise: Literal["fixed", "fresh"] = "fixed"
    # run, exported run or hf://OWNER/NAME whose averaged weights a new run starts from
    init_from: str = ""


@dataclass(frozen=True)
class MethodOptions:
    """What is learned. Each flag names the methods that read it."""
    # ddpd: planned denoising, arXiv:2410.06264; gidd: arXiv:2503.04482; forcing: arXiv:2407.01392
    method: Literal["ddpd", "gidd", "forcing"] = "ddpd"
    # ddpd: which networks. pair, planner and denoiser; trunk, a mask denoiser and a planner on its
    # last residual; denoiser, a mask denoiser alone, as in masked diffusion and MaskGIT; single,
    # one denoiser of uniform noise that serves as both
    nets: Literal["pair", "trunk", "denoiser", "single"] = "pair"
    planner_layers: Layers = 2              # ddpd: blocks of the planner of nets trunk
    # ddpd: the denoiser's noise; the planner sees the same, but uniform noise instead of masks
    denoiser_process: Literal["mask", "uniform"] = "mask"
    # ddpd: share of the planner's rows in which masks are filled by the averaged denoiser, instead
    # of uniform noise; needs nets pair and denoiser_process mask
    on_policy: Share = 0.0
    # ddpd: what a planner looks for in the denoiser's fills: tokens that differ from the data, or
    # all that were written
    fill_label: Literal["differs", "written"] = "differs"
    # ddpd: run, exported run or hf://OWNER/NAME whose mask denoiser is used unchanged: only the
    # planner is trained
    freeze_denoiser: str = ""
    # ddpd: weight of the planner's loss in the gradient of its trunk, with nets trunk; 0: the
    # denoiser learns as if there were no planner
    trunk_grad: NotNegativeFloat = 0.0
    # forcing: its noise. hybrid: masks and uniform redraws, as always in gidd
    process: Literal["hybrid", "uniform", "mask"] = "hybrid"
    p_uniform: float = 0.1                  # gidd, forcing: share redrawn at t = 1/2 if hybrid
    # gidd, forcing: how a token's loss is weighted. elbo: as in the likelihood bound; clip: that,
    # at most 1; dynamic: GIDD's; none: plain cross-entropy at noise tokens; "": dynamic for gidd,
    # none for forcing
    weight: Literal["", "dynamic", "clip", "elbo", "none"] = ""
    clean_token_rate: float = 1.0           # gidd, forcing: share of clean tokens in the loss
    # forcing: how levels are drawn in training. frame, token: each has its own; shared: one for all
    # frames after the context; next: one frame is noised, those before it are clean
    noise_granularity: Literal["frame", "token", "shared", "next"] = "frame"
    # forcing: share of rows with levels as in a rollout, by frame or token; others are independent
    rollout_share: Share = 0.25
    context_frames: NotNegative = 0         # forcing: frames that every rollout is given, at least


# The flags above that each method reads; those of other methods must stay at their defaults
READS = {
    "ddpd": (
        "nets", "planner_layers", "denoiser_process", "on_policy", "fill_label", "freeze_denoiser",
        "trunk_grad",
    ),
    "gidd": ("p_uniform", "weight", "clean_token_rate"),
    "forcing": (
        "process", "p_uniform", "weight", "clean_token_rate", "noise_granularity", "rollout_share",
        "context_frames",
    ),
}


@dataclass(frozen=True)
class LoggingOptions:
    """Logs, validations and checkpoints."""
    log_interval: Positive = 10             # iterations between lines of log.jsonl
    eval_interval: NotNegative = 250        # iterations between validations; 0: only the last
    # held-out sequences in a validation, one draw of noise; 0: 512, or fewer, so that validating
    # takes a tenth of the training since the last one
    eval_sequences: NotNegative = 0
    eval_samples: NotNegative = 10          # pictures drawn in a validation, at most; 0: none
    save_interval: NotNegative = 250        # iterations between checkpoints; 0: only the last
    wandb_project: str = ""                 # Weights & Biases project; "": off
    wandb_entity: str = ""                  # its owner; "": your default
    wandb_name: str = ""                    # run name there; "": the run folder's
    # auto: offline where there is no key or no network
    wandb_mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True)
class RunOptions:
    """Where and how it runs."""
    out_dir: str = ""                       # folder; "": out/<stem of the last config file>
    seed: Seed = 0                          # of weights, data order, noise and label dropout
    # precision of matrix products; auto: bfloat16 where the device has it; float32: without TF32
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    compile: bool = False                   # torch.compile the networks
    recompute: bool = False                 # recompute activations in backward: less memory, slower
    timeout_minutes: Positive = 30          # minutes that a process waits for a silent one


@dataclass(frozen=True)
class CostOptions:
    """What a config takes, without training."""
    dry_run: bool = False                   # print parameters, memory and time; train nothing
    # with --dry-run: estimate for this GPU by its published peak; "": measure the machine at hand
    gpu: Literal["", "a100", "h100", "h200", "b200", "l4", "rtx4090"] = ""
    n_gpus: Positive = 1                    # with --gpu: processes, each on a GPU
    # with --gpu: share of the peak that training reaches, an assumption
    utilization: Share = 0.35


@dataclass(frozen=True)
class Config(
    CostOptions, RunOptions, LoggingOptions, MethodOptions, OptimisationOptions, NetworkOptions,
    DataOptions,
):
    """Train a planner and a denoiser.   python train_ddpd.py [NAME or FILE.py ...] [--flags]

    NAME is a file of configs/; --list prints them. One process, or as many as torchrun starts. The
    same command again resumes a run that was stopped.
    """

    GROUPS: typing.ClassVar = {
        "data": DataOptions, "network": NetworkOptions, "optimisation": OptimisationOptions,
        "method": MethodOptions, "logging": LoggingOptions, "run": RunOptions,
        "cost": CostOptions,
    }
    # A run is resumed only with these unchanged; all others may change from start to start.
    FIXED: typing.ClassVar = (
        "method", "nets", "planner_layers", "fill_label", "freeze_denoiser", "denoiser_process",
        "p_uniform", "process", "noise_granularity", "causal", "patch",
        "data", "image_size", "grey_levels", "n_layer", "n_head", "n_embd", "base_width",
        "base_head_dim", "batch_size", "overfit", "overfit_noise", "seed",
    )

    @property
    def decay_iters(self) -> int:
        return self.lr_decay_iters or self.max_iters


# Sampling: flags of sample.py and evaluate.py are the samplers' arguments. With None a sampler uses
# its own default

Schedule = Literal["spread", "fixed", "one", "leap", "arccos", "cosine", "linear", "entropy"]


@dataclass(frozen=True)
class PlanFlags:
    """Planned denoising, sampler ddpd."""
    # ddpd: sites per step, spread (default), fixed, one or leap. confidence, p2: how the number of
    # masks falls, arccos (default of confidence), cosine or linear (default of p2); confidence:
    # entropy uncovers an equal share of the entropy left in each step
    schedule: Schedule | None = None
    # sites per step of --schedule fixed, --refine and --correct; 1 if not given
    k: int | None = None
    # draw sites in proportion to P(noise) (default), to its odds (softmax), or at random, without
    # the planner
    pick: Literal["proportional", "softmax", "random"] | None = None
    # a sample is done when fewer noise tokens than this are expected; 0 if not given
    stop: float | None = None
    refine: int | None = None               # further steps of k sites; 0 if not given
    # classifier-free guidance of the planner; 1 (off) if not given
    planner_guidance: float | None = None


@dataclass(frozen=True)
class MaskFlags:
    """Samplers of a mask denoiser: confidence (MaskGIT), remdm, p2 (path planning), planned."""
    # confidence, planned: uncover the most confident draws (default), or random masks; confidence:
    # halton, far from each other
    order: Literal["confidence", "random", "halton"] | None = None
    # confidence, planned: Gumbel noise on the log-probability; 4.5 if not given
    noise: float | None = None
    # confidence: the temperature falls linearly to this; 0, or not given: it stays
    temperature_end: float | None = None
    # remdm: how tokens to mask again are chosen. confidence (default): rather those that were
    # improbable when written; rescale: all alike, eta times the maximum; cap: all alike, up to eta
    remask: Literal["confidence", "rescale", "cap"] | None = None
    # how readily tokens are masked again; 0: never. remdm: share of the maximum (cap: limit on it);
    # if not given 1 for --remask confidence, else 0.2. planned: as remdm; 0.5 if not given. p2:
    # factor on the scores of visible tokens; 1 if not given
    eta: float | None = None
    # planned: power of the odds of being wrong; 1 if not given; 0: ignore the planner, as remdm
    trust: float | None = None
    # planned: power of the odds of a token when it was written; 0 if not given; 1: mask again what
    # looks more doubtful now than it did then
    surprise: float | None = None


@dataclass(frozen=True)
class RolloutFlags:
    """Sampler rollout, of forcing runs."""
    # steps between frames; -1, or not given: one by one; 0: all together
    lag: int | None = None
    # noise level told of finished frames, to distrust them; 0 if not given
    stabilization_level: float | None = None
    # noise level told of known tokens, to distrust them; 0 if not given
    context_level: float | None = None


@dataclass(frozen=True)
class DecodingFlags:
    """All samplers: how tokens are drawn from the denoiser's logits."""
    temperature: float | None = None        # of the denoiser; 1 if not given
    top_k: int | None = None                # draw from so many likeliest ids; 0, or not given: all
    top_p: float | None = None              # probability mass to draw from, in (0, 1]; 1: all
    # least probability to draw, as a share of the largest; 0, or not given: none
    min_p: float | None = None
    # classifier-free guidance of the denoiser; 1 (off) if not given
    guidance: float | None = None


@dataclass(frozen=True)
class VideoFlags:
    """Videos."""
    # frames of held-out videos that are given; 2 if not given
    context_frames: int | None = None
    # frames in all; 0: as many as the data has, 8 times that in evaluate.py
    frames: NotNegative = 0

    @property
    def n_given(self) -> int:
        return 2 if self.context_frames is None else self.context_frames


@dataclass(frozen=True)
class SamplerFlags(DecodingFlags, RolloutFlags, MaskFlags, PlanFlags):
    """Options of samplers. Only flags that are given are passed on; one that the sampler does not
    have is refused."""

    GROUPS: typing.ClassVar = {
        "ddpd": PlanFlags,
        "samplers_of_masks": MaskFlags,
        "rollout": RolloutFlags,
        "decoding": DecodingFlags,
    }

    def sampler_options(self) -> dict[str, Any]:
        """The options that were given, by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplerFlags)}
        return {name: value for name, value in values.items() if value is not None}


# Reading


def load(cls: type = Config, argv: list[str] | None = None) -> Any:
    """Read config files (leading arguments, if cls is Config) and flags.  -> an instance of cls"""
    argv = list(sys.argv[1:] if argv is None else argv)
    if cls is not Config:
        return check_bounds(parse(cls, {}, argv))
    if "--list" in argv:
        with may_stop_reading():
            print_configs()
        raise SystemExit(0)
    files = []
    while argv and not argv[0].startswith("-"):
        files.append(config_path(argv.pop(0)))
    values = {}
    for path in files:
        values |= read_file(path, cls)
    cfg = parse(cls, values, argv)
    if not cfg.out_dir:
        cfg = replace(cfg, out_dir=f"out/{files[-1].stem if files else 'default'}")
    return check(cfg)


def config_path(name: str) -> Path:
    """A config file, or the name of one of configs/."""
    if said := flaw(name):
        raise SystemExit(f"the name of a config file is {said}")
    if os.path.isfile(name):
        return Path(name)
    names = [path.stem for path in CONFIGS.glob("*.py")]
    if name in names:
        return CONFIGS / f"{name}.py"
    raise SystemExit(f"no config file {name}, and none of that name in configs/; "
                     + nearest(Path(name).stem, names))


def print_configs() -> None:
    """The names of configs/, each with the first sentence of its header."""
    for path in sorted(CONFIGS.glob("*.py")):
        print(f"{path.stem:16} {summary_of(path) or 'no header'}")


# Checks


def check(cfg: Config) -> Config:
    """Refuse, by name, values that mean nothing, and flags of other methods."""
    check_values(cfg)
    for field in fields(MethodOptions):
        is_read = field.name == "method" or field.name in READS[cfg.method]
        if not is_read and getattr(cfg, field.name) != field.default:
            readers = [method for method, names in READS.items() if field.name in names]
            raise SystemExit(
                f"{field.name} is not read by method {cfg.method}, only by {', '.join(readers)}"
            )
    return cfg


def check_values(cfg: Config) -> Config:
    """Refuse, by name, values that mean nothing."""
    check_bounds(cfg)
    if not 0 <= cfg.p_uniform < 1:
        raise SystemExit(f"p_uniform is {cfg.p_uniform}; it must lie in [0, 1)")
    if not 0 < cfg.clean_token_rate <= 1:
        raise SystemExit(f"clean_token_rate is {cfg.clean_token_rate}; it must lie in (0, 1]")
    check_stated_data(cfg)
    check_dry_run(cfg)
    if cfg.method == "forcing" and cfg.weight in ("dynamic", "clip"):
        raise SystemExit(
            f"weight = {cfg.weight} learns nothing at level 1, where every rollout begins: "
            "use none or elbo"
        )
    check_fills(cfg)
    if cfg.nets == "single" and cfg.denoiser_process == "mask":
        raise SystemExit(
            "nets = single needs denoiser_process = uniform: a mask denoiser cannot tell noise "
            "from data"
        )
    return cfg


def check_fills(cfg: Config) -> None:
    """Planners that learn on a mask denoiser's fills."""
    if cfg.on_policy and (cfg.nets, cfg.denoiser_process) != ("pair", "mask"):
        raise SystemExit(
            f"on_policy = {cfg.on_policy} needs nets = pair and denoiser_process = mask: "
            "a planner, and masks for the denoiser to fill"
        )
    if cfg.nets in ("trunk", "denoiser") and cfg.denoiser_process != "mask":
        raise SystemExit(f"nets = {cfg.nets} needs denoiser_process = mask")
    if cfg.fill_label == "written" and not cfg.on_policy and cfg.nets != "trunk":
        raise SystemExit("fill_label = written needs fills: on_policy above 0, or nets = trunk")
    if cfg.planner_layers != Config.planner_layers and cfg.nets != "trunk":
        raise SystemExit(
            f"planner_layers = {cfg.planner_layers} needs nets = trunk; a planner apart has n_layer"
        )
    if cfg.trunk_grad and (cfg.nets != "trunk" or cfg.freeze_denoiser):
        raise SystemExit(
            f"trunk_grad = {cfg.trunk_grad:g} needs nets = trunk, and no freeze_denoiser: a trunk "
            "that is trained"
        )
    has_planner = cfg.nets in ("pair", "trunk")
    if cfg.freeze_denoiser and not (has_planner and cfg.denoiser_process == "mask"):
        raise SystemExit(
            "freeze_denoiser needs denoiser_process = mask, and a planner to be trained: nets = "
            "pair or trunk"
        )
    if cfg.freeze_denoiser and cfg.init_from:
        raise SystemExit("freeze_denoiser and init_from both say where weights come from: give one")


def check_dry_run(cfg: Config) -> None:
    """An estimate for a GPU is asked for by --dry-run --gpu, and is one of bfloat16."""
    if cfg.gpu and not cfg.dry_run:
        raise SystemExit(f"gpu = {cfg.gpu} is for --dry-run; training takes the GPUs that it finds")
    for field in fields(CostOptions):
        if field.name in ("n_gpus", "utilization") and not cfg.gpu:
            if getattr(cfg, field.name) != field.default:
                raise SystemExit(f"{field.name} belongs to --dry-run --gpu NAME")
    if not cfg.utilization:
        raise SystemExit("utilization is 0.0; it must be above 0")
    if cfg.gpu and cfg.dtype == "float32":
        raise SystemExit("the estimate for a GPU is one of bfloat16: not with dtype float32")


def check_stated_data(cfg: Config) -> None:
    """vocab, grid and n_classes go together, and are sizes of sequences that can be."""
    if (
        bool(cfg.vocab) != bool(cfg.grid)
        or min(cfg.grid, default=1) < 1
        or (cfg.n_classes and not cfg.vocab)
    ):
        raise SystemExit(
            f"vocab {cfg.vocab}, grid {cfg.grid} and n_classes {cfg.n_classes} are stated "
            "together: ids, tokens per axis, classes"
        )
    for name in ("vocab", "n_classes"):
        if getattr(cfg, name) >= MAX_IDS:
            raise SystemExit(f"{name} is {getattr(cfg, name)}; it must be less than {MAX_IDS}")
    if math.prod(cfg.grid) > MAX_TOKENS:
        raise SystemExit(f"grid is {shown(cfg.grid)}; it must hold at most {MAX_TOKENS} tokens")


def restore(saved: Any) -> Config:
    """The config of a run from its saved values, checked. Fields that did not exist yet when it was
    saved take their defaults."""
    if not isinstance(saved, dict):
        raise SystemExit(f"config is {shown(saved)}, not a dict")
    types = typing.get_type_hints(Config, include_extras=True)
    names = [field.name for field in fields(Config)]
    for key in saved:
        if key not in names:
            raise SystemExit(f"config has an unknown key {shown(key)}")
    values = {name: check_type(value, types[name], name) for name, value in saved.items()}
    return check_values(Config(**values))
