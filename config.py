"""One frozen dataclass and one load().   defaults < config files, left to right < flags"""

import ast
import difflib
import sys
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

# The comment beside a field is its --help. Off is 0 or "".


@dataclass(frozen=True)
class Config:
    """Train a planner and a denoiser.   python train_ddpd.py [configs/NAME.py ...] [--flags]

    One process, or as many as torchrun starts. The same command again goes on where the run stopped.
    """
    method: Literal["ddpd", "gidd", "forcing"] = "ddpd"     # arXiv:2410.06264, 2503.04482, 2407.01392
    nets: Literal["pair", "single"] = "pair"    # planner and denoiser, or one uniform denoiser that serves as both
    denoiser_process: Literal["mask", "uniform"] = "mask"   # what the denoiser's noise tokens look like

    p_uniform: float = 0.1                  # gidd, forcing: uniform noise at t = 1/2, the rest masks; 0: masks only
    weight: Literal["dynamic", "clip", "elbo", "none"] = "dynamic"  # gidd, forcing: of a token's loss; none: plain CE
    clean_share: float = 1.0                # gidd, forcing: share of clean tokens that enter the loss, weighted up
    process: Literal["hybrid", "uniform", "mask"] = "hybrid"    # forcing: what its noise is
    level_group: Literal["frame", "token", "shared", "next"] = "frame"  # forcing: what has a noise level of its own
    staircase_share: float = 0.25           # forcing: share of levels as a rollout asks for them, not independent
    context: int = 0                        # forcing: frames that every rollout is given, at least
    causal: bool = False                    # a frame attends to itself and those before it only

    data: str = "digits"                    # one of sources/, or a folder under data/
    image_size: int = 32                    # tokens per side, where a source makes them
    levels: int = 0                         # grey levels (the vocabulary), where a source makes tokens; 0: its own
    vocab: int = 0                          # ids the data must have; 0: as it says. With grid, --dry-run needs no data
    grid: tuple[int, ...] = ()              # tokens per axis the data must have; (): as it says
    n_classes: int = 0                      # classes the data must have, where vocab is stated

    n_layer: int = 6                        # blocks
    n_head: int = 4                         # heads; they divide n_embd
    n_embd: int = 512                       # width of the residual
    base_width: int = 512                   # muP: the width at which every tensor trains at the lr given here
    base_head_dim: int = 0                  # muP: head width at base_width, if heads widen with n_embd; 0: they do not

    batch_size: int = 32                    # sequences per process and micro-step
    grad_accumulation_steps: int = 1        # micro-steps per iteration
    max_iters: int = 2000                   # iterations (optimizer steps)
    planner_lr: float = 1e-3                # Adam lr of the planner at base_width
    denoiser_lr: float = 2e-3               # Adam lr of the denoiser at base_width
    warmup_iters: int = 50                  # iterations of linear warm-up
    lr_decay_iters: int = 0                 # iterations of the cosine down to a tenth of the lr; 0: max_iters
    weight_decay: float = 0.01              # AdamW, on matrices only
    grad_clip: float = 1.0                  # largest gradient norm of each network; 0: unclipped
    label_dropout: float = 0.1              # share of labels replaced by the null class, for guidance
    ema_decay: float = 0.999                # decay per iteration of the averaged weights, after their warm-up
    overfit: int = 0                        # train on this many sequences only; 0: on all
    overfit_noise: Literal["fixed", "fresh"] = "fixed"  # fixed: losses go to near 0; fresh: to the floors printed
    init_from: str = ""                     # run whose averaged weights a new run starts from

    seed: int = 0                           # of weights, data order, noise and label dropout
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products; auto: bfloat16 where the device has it
    compile: bool = False                   # torch.compile both networks
    dry_run: bool = False                   # print parameters, memory and time per iteration, and train nothing
    out_dir: str = ""                       # the run's folder; "": out/<stem of the last config file> or out/default
    log_interval: int = 10                  # iterations between lines of log.jsonl
    eval_interval: int = 250                # iterations between validations; 0: only the last
    eval_sequences: int = 512               # held-out sequences in a validation, each under one fixed draw of noise
    eval_samples: int = 10                  # pictures drawn in a validation, in 32 steps; 0: none
    save_interval: int = 250                # iterations between checkpoints; 0: only the last
    wandb_project: str = ""                 # Weights & Biases project; "": off
    wandb_entity: str = ""                  # its owner; "": your default
    wandb_name: str = ""                    # run name there; "": the run folder's
    wandb_mode: Literal["auto", "online", "offline"] = "auto"   # auto: offline where there is no key or no network

    # A run goes on only with these unchanged; all others may change from one start to the next.
    FIXED: typing.ClassVar = tuple("""
        method nets denoiser_process p_uniform process level_group causal data image_size levels n_layer n_head n_embd
        base_width base_head_dim batch_size overfit overfit_noise seed
    """.split())

    @property
    def decay_iters(self):
        return self.lr_decay_iters or self.max_iters

    @property
    def kind(self):
        return kind_of(vars(self))

    @property
    def noise(self):
        return noise_of(vars(self))


def kind_of(config):
    """The name under which samplers.FITS lists what a run's networks can do.  config: a Config's dict"""
    if config["method"] != "ddpd":
        return config["method"]
    return "single" if config["nets"] == "single" else {"mask": "maskd", "uniform": "unid"}[config["denoiser_process"]]


def noise_of(config):
    """What the denoiser's noise is: the process, and p_uniform of "hybrid".  config: a Config's dict"""
    kind = kind_of(config)
    process = config["process"] if kind == "forcing" else {"maskd": "mask", "gidd": "hybrid"}.get(kind, "uniform")
    return process, config["p_uniform"] if process == "hybrid" else 0.0


def nearest(key, keys):
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0)
    return f"did you mean {close[0]}?" if close else ""


def read_file(path, cls):
    """The assignments of one config file: names, literals and arithmetic, nothing that runs.  -> dict"""
    types, values = typing.get_type_hints(cls), {}
    try:
        body = ast.parse(Path(path).read_text()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    for node in body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                                    # the header
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise SystemExit(f"{where}: a config file holds assignments only, not `{ast.unparse(node)}`")
        key = node.targets[0].id
        names = [f.name for f in fields(cls)]
        if key not in names:
            raise SystemExit(f"{where}: unknown key {key}; {nearest(key, names)}")
        allowed = (ast.Constant, ast.Name, ast.Tuple, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
                   ast.expr_context)
        if not all(isinstance(n, allowed) for n in ast.walk(node.value)):
            raise SystemExit(f"{where}: {key} must be a value or arithmetic, not `{ast.unparse(node.value)}`")
        try:
            value = eval(compile(ast.Expression(node.value), path, "eval"), {"__builtins__": {}}, values)
        except (ArithmeticError, NameError, TypeError) as error:
            raise SystemExit(f"{where}: {error}") from None
        values[key] = check_type(value, types[key], f"{where}: {key}")
    return values


def check_type(value, kind, where):
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices and value not in choices:
        raise SystemExit(f"{where} is {value!r}, not one of {', '.join(choices)}")
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is tuple:
        if type(value) is not tuple or any(type(v) is not int for v in value):
            raise SystemExit(f"{where} is {value!r}, not whole numbers in brackets, as (32, 32)")
    elif not choices and type(value) is not kind:
        raise SystemExit(f"{where} is {value!r}, not {kind.__name__}")
    return value


def load(cls=Config, argv=None):
    """Read config files (leading arguments, if cls is Config) and flags.  -> cls"""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    files = []
    while cls is Config and argv and not argv[0].startswith("-"):
        files.append(argv.pop(0))
    values = {}
    for path in files:
        values |= read_file(path, cls)
    flags = ["--help", *("--" + f.name.replace("_", "-") for f in fields(cls))]
    flags += ["--no-" + f.name.replace("_", "-") for f in fields(cls) if f.type in (bool, "bool")]
    for arg in argv:
        flag = arg.split("=")[0].replace("_", "-")
        if arg.startswith("--") and flag not in flags:
            raise SystemExit(f"unknown flag {flag}; {nearest(flag, flags)}")
    if cls is not Config:
        return tyro.cli(cls, args=argv, config=(tyro.conf.PositionalRequiredArgs,))
    cfg = tyro.cli(cls, args=argv, default=cls(**values))
    if not cfg.out_dir:
        cfg = replace(cfg, out_dir=f"out/{Path(files[-1]).stem if files else 'default'}")
    return check(cfg)


def check(cfg):
    """Refuse, by name, numbers that mean nothing."""
    positive = ["image_size", "n_layer", "n_head", "n_embd", "base_width", "batch_size", "grad_accumulation_steps",
                "max_iters", "log_interval", "eval_sequences"]
    not_negative = ["levels", "vocab", "n_classes", "base_head_dim", "planner_lr", "denoiser_lr", "warmup_iters",
                    "lr_decay_iters", "context",
                    "weight_decay", "grad_clip", "overfit", "seed", "eval_interval", "eval_samples", "save_interval"]
    for name in positive:
        if getattr(cfg, name) < 1:
            raise SystemExit(f"{name} is {getattr(cfg, name)}; it must be at least 1")
    for name in not_negative:
        if not getattr(cfg, name) >= 0:
            raise SystemExit(f"{name} is {getattr(cfg, name)}; it must not be negative")
    for name in ["label_dropout", "ema_decay"]:
        if not 0 <= getattr(cfg, name) <= 1:
            raise SystemExit(f"{name} is {getattr(cfg, name)}; it must lie in [0, 1]")
    if not 0 <= cfg.p_uniform < 1 or not 0 < cfg.clean_share <= 1:
        raise SystemExit(f"p_uniform {cfg.p_uniform} must lie in [0, 1), clean_share {cfg.clean_share} in (0, 1]")
    if not 0 <= cfg.staircase_share <= 1:
        raise SystemExit(f"staircase_share is {cfg.staircase_share}; it must lie in [0, 1]")
    if bool(cfg.vocab) != bool(cfg.grid) or min(cfg.grid, default=1) < 1 or (cfg.n_classes and not cfg.vocab):
        raise SystemExit(f"vocab {cfg.vocab}, grid {cfg.grid} and n_classes {cfg.n_classes} are stated together: "
                         "ids, tokens per axis, classes")
    if cfg.nets == "single" and cfg.denoiser_process != "uniform":
        raise SystemExit("nets = single needs denoiser_process = uniform: a mask denoiser cannot tell noise from data")
    return cfg
