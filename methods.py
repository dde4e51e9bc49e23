"""One table of methods: networks, noise, what they learn, likelihood bounds, samplers that fit.

A new method is a loss, a sampler, a row of METHODS and a config. A new sampler is its function in
diffusion/samplers.py or unmasking.py and an entry in `samplers` of the methods that it fits; new
options of it are also flags, in config.py.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import model
from diffusion import forcing, gidd, likelihood, objectives, samplers
from diffusion.decoding import DECODING_NAMES, State
from diffusion.processes import T_MIN, Noise, corrupt, require_posterior, stratified_t
from diffusion.randomness import Random, Streams

MAX_FILL_STEPS = 4      # steps in which a denoiser fills masks for a planner to learn on


def no_noise(spec, nets, last, label, **options):
    """After a sampler whose clock ends at level 0."""
    return torch.zeros_like(last.p_noise)


def own_noise(noise: Noise) -> Noise:
    """Of samplers that start from what the denoiser was trained on."""
    return noise


class Sampler(NamedTuple):
    """A sampler as a method uses it.

    `call` gets n_steps, generator, known and null_label besides the user's options, and x where it
    starts. The last State must hold no masks.
    """
    function: Callable                  # its keyword arguments are the options of a user
    call: Callable                      # (spec, nets, x, label, **options) -> yields State
    more_options: tuple[str, ...] = ()  # further options, which `call` reads itself
    # the method's Noise -> the Noise at whose level 1 x is drawn; None: x is finished tokens
    prior: Callable | None = own_noise
    # (spec, nets, last State, label, **options) -> P(noise) of the finished tokens (B, N)
    p_noise_after: Callable = no_noise


class Method(NamedTuple):
    # name -> is it told the noise level t?  In building order: a trunk before its planner
    networks: dict[str, bool]
    process: Callable                   # config -> the forward process of the denoiser's noise
    tasks: Callable                     # (spec, x0, t, label, known, generator) -> {network: Task}
    bounds: Callable                    # (nets, batch) -> {bound: nats (B, N)}: of likelihood.py
    samplers: dict[str, Sampler]        # name -> how; the first is the default
    has_own_levels: bool = False        # a noise level for each frame or token; sampled by rollouts
    has_trunk: bool = False             # the planner reads the denoiser's residual, learns on fills


class Spec(NamedTuple):
    """What a run is, worked out once from its config and its data's meta."""
    config: dict[str, Any]              # the fields of config.Config
    meta: dict[str, Any]                # the data's meta.json
    name: str                           # of the method, a row of METHODS
    method: Method
    noise: Noise                        # the denoiser's
    shape: model.Shape                  # of the networks: shape_of_network

    @property
    def grid(self) -> list[int]:
        return self.meta["grid"]

    @property
    def vocab(self) -> int:
        return self.meta["vocab"]

    @property
    def n_classes(self) -> int:
        return self.meta["n_classes"]

    @property
    def is_video(self) -> bool:
        return self.shape.is_video

    @property
    def n_frames(self) -> int:
        """1 if not a video."""
        return self.grid[0] if self.is_video else 1


def method_name(config: dict[str, Any]) -> str:
    if config["method"] != "ddpd":
        return config["method"]
    if config["nets"] == "single":
        return "ddpd-single"
    if config["nets"] == "trunk":
        return "ddpd-trunk"
    if config["nets"] == "denoiser":
        return "masked"
    return "ddpd-mask" if config["denoiser_process"] == "mask" else "ddpd-uniform"


def spec_of(config: dict[str, Any], meta: dict[str, Any]) -> Spec:
    """Raises ValueError for networks that cannot be built, and noise that does not fit."""
    name = method_name(config)
    method = METHODS[name]
    noise = Noise(method.process(config), meta["vocab"], config["p_uniform"])
    if name == "ddpd-single":
        require_posterior(noise)                        # from which planner and denoiser are split
    return Spec(config, meta, name, method, noise, model.shape_of(config, meta))


def build(spec: Spec) -> dict[str, model.Transformer]:
    """The run's networks, untrained."""
    nets = {}
    for name, t_conditioned in spec.method.networks.items():
        if spec.method.has_trunk and name == "planner":
            nets[name] = model.TrunkPlanner(shape_of_network(spec, name), nets["denoiser"])
        else:
            nets[name] = model.Transformer(spec.shape, name, t_conditioned)
    return nets


def shape_of_network(spec: Spec, network: str) -> model.Shape:
    """The run's shape; a planner on the denoiser's trunk has its own number of blocks."""
    if spec.method.has_trunk and network == "planner":
        return replace(spec.shape, n_layer=spec.config["planner_layers"])
    return spec.shape


# What each method's networks learn


def tasks_of_pair(spec, x0, t, label, known, generator):
    return objectives.pair_tasks(x0, t, label, spec.noise, generator, known)


def tasks_of_single(spec, x0, t, label, known, generator):
    return objectives.single_tasks(x0, t, label, spec.noise, generator, known)


def tasks_of_masks(spec, x0, t, label, known, generator):
    """The task of a planner on the trunk needs fills, and is added by with_planner_on_fills."""
    return {"denoiser": objectives.denoiser_task(x0, t, label, spec.noise, generator, known)}


def tasks_of_gidd(spec, x0, t, label, known, generator):
    config = spec.config
    return gidd.gidd_tasks(
        x0, t, label, spec.noise, generator, known, weight=config["weight"] or "dynamic",
        clean_token_rate=config["clean_token_rate"],
    )


def tasks_of_forcing(spec, x0, t, label, known, generator):
    """Draws its own levels; t is not used."""
    config = spec.config
    n_frames = x0.shape[1] if config["noise_granularity"] == "token" else spec.grid[0]
    levels, loss_mask = forcing.draw_levels(
        len(x0), n_frames, config["noise_granularity"], config["rollout_share"], generator,
        config["context_frames"],
    )
    return forcing.forcing_tasks(
        x0, levels, loss_mask, label, spec.noise, generator, known,
        weight=config["weight"] or "none", clean_token_rate=config["clean_token_rate"],
    )


def make_tasks(
    spec: Spec, x0: Tensor, label: Tensor, known: Tensor | None, generator: torch.Generator,
    t: Tensor | None = None,
) -> dict[str, objectives.Task]:
    """What the networks learn from a batch.  -> {network: Task}

    x0 (B, N), label (B,), known (B, N) bool or None, t (B, 1), drawn here where it is None
    """
    if t is None:                       # forcing draws its own levels after these
        t = stratified_t(len(x0), generator)
    return spec.method.tasks(spec, x0, t, label, known, generator)


def fill_masks(
    spec: Spec, denoiser: Callable, x0: Tensor, t: Tensor, label: Tensor, known: Tensor | None,
    generator: torch.Generator, device: torch.device, to_the_end: bool = True,
) -> objectives.Fill:
    """Mask data at level t and let the denoiser fill it in, in 1 to MAX_FILL_STEPS steps.

    x0 (B, N), t (B, 1), label (B,), known (B, N) bool or None and the fill are on the host, the
    denoiser is on the device. The draws are those of streams, the same on any device.
    to_the_end  False: stop after a random number of these steps, with masks left
    """
    x, is_masked = corrupt(x0, objectives.level_per_token(t, x0, known), spec.noise, generator)
    n_steps = torch.randint(1, MAX_FILL_STEPS + 1, (), generator=generator).item()
    seed = torch.randint(2**62, (), generator=generator).item()
    streams = Streams(seed, torch.arange(len(x0), device=device))
    n_taken = n_steps
    if not to_the_end:
        n_taken = torch.randint(1, n_steps + 1, (), generator=generator).item()
    states = samplers.ancestral(
        denoiser, x.to(device), label.to(device), n_steps=n_steps, generator=streams,
        **asdict(spec.noise),
    )
    filled = samplers.last(itertools.islice(states, n_taken)).x.cpu()
    return objectives.Fill(filled, is_masked & (filled != spec.vocab))


def learns_on_fills(spec: Spec) -> bool:
    return spec.method.has_trunk or spec.config["on_policy"] > 0


def passes_for_planner(spec: Spec) -> float:
    """Passes of the denoiser for a row of the planner's batch, in units of a forward pass."""
    mean_steps = (1 + MAX_FILL_STEPS) / 2
    if not spec.method.has_trunk:
        return spec.config["on_policy"] * mean_steps
    passes_to_fill = (1 + mean_steps) / 2   # stopped after any of the steps
    passes_of_trunk = 3 if spec.config["trunk_grad"] else 1     # with its backward pass, or without
    return passes_to_fill + passes_of_trunk


def with_planner_on_fills(
    spec: Spec, tasks: dict[str, objectives.Task], denoiser: Callable, x0: Tensor, t: Tensor,
    label: Tensor, known: Tensor | None, generator: torch.Generator, device: torch.device,
    share: float = 1.0,
) -> dict[str, objectives.Task]:
    """Let the planner learn on the denoiser's fills, in a share of its rows; a planner on the trunk
    in all rows, whose fills may still hold masks.  Other arguments as of fill_masks
    """
    fill_label = spec.config["fill_label"]
    rows = (x0, t, label, known)
    if spec.method.has_trunk:
        fill = fill_masks(spec, denoiser, *rows, generator, device, to_the_end=False)
        task = objectives.fill_task(x0, t, label, fill, fill_label, spec.vocab, known)
    else:
        n = int(share * len(x0) + torch.rand((), generator=generator))  # right on average
        first_rows = (None if y is None else y[:n] for y in rows)
        fill = fill_masks(spec, denoiser, *first_rows, generator, device)
        task = objectives.with_fills(tasks["planner"], x0, fill, fill_label)
    return {**tasks, "planner": task}


def bits_per_token(
    spec: Spec, nets: dict[str, Callable], x0: Tensor, label: Tensor, known: Tensor | None,
    generator: torch.Generator, n_distinct: int = 0, progress: Callable = iter,
) -> dict[str, tuple[float, float]]:
    """Upper bounds on -log2 p(x0) / N, the tight one first; arguments as of the function in
    diffusion/likelihood.py.  -> {bound: (bits per token, standard error)}
    """
    is_along_frames = spec.method.has_own_levels and spec.n_frames > 1
    paths = ("shared", "frames") if is_along_frames else ("shared",)
    return likelihood.bits_per_token(
        nets, spec.method.bounds, x0, label, spec.noise, generator, known=known, paths=paths,
        n_frames=spec.n_frames, n_distinct=n_distinct, progress=progress,
    )


# How each method is sampled


def ddpd(spec, nets, x, label, **options):
    return samplers.ddpd(
        nets.get("planner"), nets["denoiser"], x, label, denoiser_process=spec.noise.process,
        vocab=spec.vocab, **options,
    )


def p_noise_by_planner(spec, nets, last, label, **options):
    names = ("known", "guidance", "planner_guidance", "null_label")
    own = {name: options[name] for name in names if name in options}
    return samplers.p_noise_after(
        nets.get("planner"), nets["denoiser"], last, label,
        denoiser_process=spec.noise.process, **own,
    )


def p2(spec, nets, x, label, **options):
    return samplers.p2(nets["planner"], nets["denoiser"], x, label, vocab=spec.vocab, **options)


def planned(spec, nets, x, label, **options):
    both = nets["planner"].both
    return samplers.planned(nets["denoiser"], both, x, label, vocab=spec.vocab, **options)


def p_noise_by_trunk(spec, nets, last, label, *, known=None, **options):
    t = torch.full((len(label), 1), T_MIN, device=label.device)
    p_noise = nets["planner"](last.x, t, label).sigmoid()
    return p_noise if known is None else p_noise.masked_fill(known, 0)


def ancestral(kind):
    def call(spec, nets, x, label, **options):
        noise = asdict(spec.noise)
        return samplers.ancestral(nets["denoiser"], x, label, kind=kind, **noise, **options)
    return call


def remdm(spec, nets, x, label, **options):
    return samplers.remdm(nets["denoiser"], x, label, vocab=spec.vocab, **options)


def confidence(spec, nets, x, label, **options):
    return samplers.confidence(
        nets["denoiser"], x, label, vocab=spec.vocab, grid=spec.grid, **options
    )


def self_correct(spec, nets, x, label, **options):
    return samplers.self_correct(
        nets["denoiser"], x, label, p_uniform=spec.noise.p_uniform, **options
    )


def p_noise_in_one_more_step(spec, nets, last, label, **options):
    """What the network says in one more step, whose tokens are dropped."""
    generator = torch.Generator(last.x.device)
    further = self_correct(
        spec, nets, last.x, label, n_steps=1, generator=generator, **options
    )
    return next(further).p_noise


def rollout_levels(spec, known, n_steps, frames=0, lag=-1):
    """The scheduling matrix of a rollout after the leading known frames, its levels spaced as the
    process has them.  -> (R, F): a row before each step, and the last one
    """
    if known is None or not spec.is_video:
        return spec.noise.spaced(forcing.rollout_levels(spec.grid, n_steps, frames, lag))
    is_known = known.view(len(known), -1, spec.shape.frame_size).all(2).all(0)
    is_known = is_known.cpu()                           # (F,), on the host as the levels are
    context_frames = int(is_known.int().cumprod(0).sum())
    even = forcing.rollout_levels(spec.grid, n_steps, frames, lag, context_frames)
    levels = spec.noise.spaced(even).masked_fill(is_known, 0)
    is_step = (levels[:-1] > levels[1:]).any(1)         # others moved known frames only: drop them
    is_step[-1] |= not is_step.any()                    # all is known: one State is yielded
    return torch.cat([levels[:1], levels[1:][is_step]])


def rollout(spec, nets, x, label, *, n_steps, frames=0, lag=-1, **options):
    denoiser = nets["denoiser"]
    levels = rollout_levels(spec, options.get("known"), n_steps, frames, lag)
    is_plain = "reward" not in options and options.get("guidance", 1) == 1
    if spec.shape.causal and is_plain:
        options["kv_cache"] = model.KVCache(spec.shape)
    return samplers.rollout(
        denoiser, x, label, levels, window=spec.n_frames, **asdict(spec.noise), **options
    )


def rollout_together(spec, nets, x, label, **options):
    """All frames at once."""
    return rollout(spec, nets, x, label, lag=0, **options)


DDPD = Sampler(
    samplers.ddpd, ddpd, p_noise_after=p_noise_by_planner, prior=Noise.without_masks
)
ANCESTRAL = Sampler(samplers.ancestral, ancestral("others"))
ANCESTRAL_OF_X0 = Sampler(samplers.ancestral, ancestral("self"))
OF_MASKS = {
    "ancestral": ANCESTRAL,
    "confidence": Sampler(samplers.confidence, confidence),
    "remdm": Sampler(samplers.remdm, remdm),
}

METHODS = {
    # planner of uniform noise, and denoiser of masks: it can count them, and is told no t
    "ddpd-mask": Method(
        networks={"planner": False, "denoiser": False},
        process=lambda config: "mask",
        tasks=tasks_of_pair,
        bounds=likelihood.masked_bound,
        samplers={
            "ddpd": DDPD,
            **OF_MASKS,
            "p2": Sampler(samplers.p2, p2, p_noise_after=p_noise_by_planner),
        },
    ),
    # denoiser of masks, and a planner on its last residual that knows the denoiser's mistakes
    "ddpd-trunk": Method(
        networks={"denoiser": False, "planner": False},
        process=lambda config: "mask",
        tasks=tasks_of_masks,
        bounds=likelihood.masked_bound,
        samplers={
            "planned": Sampler(
                samplers.planned, planned, p_noise_after=p_noise_by_trunk
            ),
            **OF_MASKS,
            "p2": Sampler(samplers.p2, p2, p_noise_after=p_noise_by_trunk),
        },
        has_trunk=True,
    ),
    # masked diffusion: that denoiser alone
    "masked": Method(
        networks={"denoiser": False},
        process=lambda config: "mask",
        tasks=tasks_of_masks,
        bounds=likelihood.masked_bound,
        samplers=OF_MASKS,
    ),
    # planner and denoiser on the same noise without masks
    "ddpd-uniform": Method(
        networks={"planner": False, "denoiser": True},
        process=lambda config: config["denoiser_process"],
        tasks=tasks_of_pair,
        bounds=likelihood.pair_bounds,
        samplers={"ddpd": DDPD, "ancestral": ANCESTRAL},
    ),
    # one x0-prediction, from which planner and denoiser are derived
    "ddpd-single": Method(
        networks={"denoiser": True},
        process=lambda config: config["denoiser_process"],
        tasks=tasks_of_single,
        bounds=likelihood.single_bounds,
        samplers={"ddpd": DDPD, "ancestral": ANCESTRAL_OF_X0},
    ),
    # one denoiser of masks and uniform noise, which can also correct finished sequences
    "gidd": Method(
        networks={"denoiser": True},
        process=lambda config: "hybrid",
        tasks=tasks_of_gidd,
        bounds=likelihood.gidd_bound,
        samplers={
            "ancestral": ANCESTRAL,
            "self_correct": Sampler(
                samplers.self_correct, self_correct, p_noise_after=p_noise_in_one_more_step,
                prior=None,
            ),
        },
    ),
    # one denoiser that is told the noise level of each token
    "forcing": Method(
        networks={"denoiser": True},
        process=lambda config: config["process"],
        tasks=tasks_of_forcing,
        bounds=likelihood.forcing_bound,
        samplers={
            "rollout": Sampler(samplers.rollout, rollout, ("lag",)),
            "ancestral": Sampler(samplers.ancestral, rollout_together),
        },
        has_own_levels=True,
    ),
}


def find_sampler(spec: Spec, name: str) -> Sampler:
    """Raises ValueError where the sampler does not fit the method."""
    if name not in spec.method.samplers:
        fitting = ", ".join(spec.method.samplers)
        raise ValueError(f"sampler {name} does not fit a {spec.name} run; one of {fitting} does")
    return spec.method.samplers[name]


def options_of(sampler: Sampler) -> list[str]:
    """Names of a sampler's parameters, the options that a user may set among them."""
    names = [*inspect.signature(sampler.function).parameters, *sampler.more_options]
    return [*names, *DECODING_NAMES] if "decoding" in names else names


def sample(
    spec: Spec, nets: dict[str, Callable], label: Tensor, *, n_steps: int,
    generator: Random, sampler: str = "", known: Tensor | None = None,
    known_tokens: Tensor | None = None, frames: int = 0, x: Tensor | None = None, **options,
) -> Iterator[State]:
    """Sample a run's networks from pure noise around the tokens that are known.  -> yields State

    label      (B,)
    sampler    one of the method's; "": its first
    known, known_tokens   (B, N) bool: where the tokens (B, N) stay; self_correct starts from them
    frames     of a rollout; 0: as many as the data has
    x          (B, N) where sampling starts; None: at starting_tokens
    """
    sampler = sampler or next(iter(spec.method.samplers))
    chosen = find_sampler(spec, sampler)
    if x is None:
        x = starting_tokens(spec, label, generator, sampler, known, known_tokens, frames)
    if spec.method.has_own_levels:
        options["frames"] = frames
    return chosen.call(
        spec, nets, x, label, n_steps=n_steps, generator=generator, known=known,
        null_label=spec.n_classes, **options,
    )


def starting_tokens(
    spec: Spec, label: Tensor, generator: Random, sampler: str,
    known: Tensor | None = None, known_tokens: Tensor | None = None, frames: int = 0,
) -> Tensor:
    """Where sample() starts: the sampler's pure noise around what is known, or finished tokens.

    -> (B, N)
    """
    prior = find_sampler(spec, sampler).prior
    if prior is None:
        if known_tokens is None:
            raise ValueError(f"sampler {sampler} starts from finished tokens: give known_tokens")
        return known_tokens
    grid = [frames or spec.grid[0], *spec.grid[1:]] if spec.is_video else spec.grid
    shape = (len(label), math.prod(grid))
    x = prior(spec.noise).sample_prior(shape, generator, label.device)
    return x if known is None else torch.where(known, known_tokens, x)


def p_noise_after(
    spec: Spec, nets: dict[str, Callable], last: State, label: Tensor, *, sampler: str,
    known: Tensor | None = None, **options,
) -> Tensor:
    """P(noise) of the tokens of sample()'s last State, for pictures.  -> (B, N)

    For ddpd, p2, planned and self_correct this is one more network call, which State.nfe does not
    count; other samplers end at noise level 0, hence with 0.
    """
    chosen = find_sampler(spec, sampler)
    return chosen.p_noise_after(
        spec, nets, last, label, known=known, null_label=spec.n_classes, **options
    )
