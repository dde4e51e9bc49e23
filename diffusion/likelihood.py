"""Upper bounds on -log p(x0). Each is the expectation over t of an elbo_* function, which returns
nats per token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.decoding import gather_at
from diffusion.gidd import gidd_loss, token_weights
from diffusion.processes import Noise, corrupt, split_planner_denoiser

LEVEL_MIN = 1e-8            # at T_MIN it would be no bound: up to .19 nats too low on 3 tokens
BATCH = 64                  # sequences at once, at most
MAX_LOGITS = 2**24
STRATA_PER_BLOCK = 32

Nets = dict[str, Callable]
Bounds = dict[str, Tensor]      # name -> nats (B, N)


def elbo_masked(probs: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Masked diffusion: (1/t) CE at masks. Tight for exact networks.

    probs (B, N, V) = p(x0 | x_t), x and x0 (B, N), t (B, 1)  ->  (B, N)
    """
    ce = -gather_at(probs, x0).log()
    is_mask = x == probs.shape[-1]
    return torch.where(is_mask, ce, 0.0) / t


def true_noise_prob(x: Tensor, x0: Tensor, t: Tensor, vocab: int) -> Tensor:
    """P(noise | x_t, x0) under uniform noise.  -> (B, N)"""
    redraw = t / vocab
    return torch.where(x != x0, 1.0, redraw / (1 - t + redraw))


def elbo_tau_leaping(p_noise: Tensor, probs: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Planner and denoiser under schedule "leap" of samplers.ddpd.

    Loose even for exact networks: rates that depend on x alone cannot tell which tokens are done.
    p_noise (B, N), probs (B, N, V) = p(x0 | x_t, noise)  ->  (B, N)
    """
    truth = true_noise_prob(x, x0, t, probs.shape[-1])
    log_rate = (p_noise * gather_at(probs, x0)).log()
    return (p_noise - truth - truth * log_rate) / t


def elbo_renoising(p_noise: Tensor, probs: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Planner and denoiser in the chain that also re-noises, as uniform ancestral sampling does.

    sum over j != x of L_j - M_j + M_j log(M_j / L_j), with the rates L of the model and M of the
    truth. Tight for exact networks. Shapes as in elbo_tau_leaping
    """
    vocab = probs.shape[-1]
    redraw_rate = 1 / (vocab * (1 - t))[..., None]                      # to any one id
    truth = true_noise_prob(x, x0, t, vocab)[..., None]
    is_x0 = torch.zeros_like(probs).scatter(-1, x0[..., None], 1.0)
    model_rate = p_noise[..., None] * (probs / t[..., None] + redraw_rate)
    true_rate = truth * (is_x0 / t[..., None] + redraw_rate)
    log_ratio = torch.special.xlogy(true_rate, true_rate / model_rate)
    terms = model_rate - true_rate + log_ratio
    return terms.scatter(-1, x[..., None], 0.0).sum(-1)


class Corrupted(NamedTuple):
    """A batch at which a bound is evaluated."""
    x: Tensor                   # (B, N) noisy tokens
    x0: Tensor                  # (B, N)
    label: Tensor               # (B,)
    t: Tensor                   # (B, 1) noise level of the sequence
    levels: Tensor              # (B, N) noise level of each token, 0 where it is known
    noise: Noise
    path: str                   # of levels_along


# The bounds of each method's networks: (nets, batch) -> {name: nats (B, N)}


def ask(net: Callable, batch: Corrupted) -> Tensor:
    """Logits in float64, at the level of the sequence."""
    return net(batch.x, batch.t.float(), batch.label).double()


def masked_bound(nets: Nets, batch: Corrupted) -> Bounds:
    probs = ask(nets["denoiser"], batch).softmax(-1)
    return {"masked": elbo_masked(probs, batch.x, batch.x0, batch.t)}


def pair_bounds(nets: Nets, batch: Corrupted) -> Bounds:
    probs = ask(nets["denoiser"], batch).softmax(-1)
    p_noise = ask(nets["planner"], batch).sigmoid()
    return planner_bounds(p_noise, probs, batch)


def single_bounds(nets: Nets, batch: Corrupted) -> Bounds:
    probs = ask(nets["denoiser"], batch).softmax(-1)
    p_noise, leave_one_out = split_planner_denoiser(probs, batch.x, batch.t, batch.noise)
    return planner_bounds(p_noise, leave_one_out, batch)


def planner_bounds(p_noise: Tensor, probs: Tensor, batch: Corrupted) -> Bounds:
    at = (p_noise, probs, batch.x, batch.x0, batch.t)
    return {"renoise": elbo_renoising(*at), "leap": elbo_tau_leaping(*at)}      # tight one first


def gidd_bound(nets: Nets, batch: Corrupted) -> Bounds:
    return {"gidd": elbo_gidd(ask(nets["denoiser"], batch), batch)}


def forcing_bound(nets: Nets, batch: Corrupted) -> Bounds:
    """The denoiser is given each token's level, and each path is a bound of its own."""
    logits = nets["denoiser"](batch.x, batch.levels.float(), batch.label)
    return {batch.path: elbo_gidd(logits.double(), batch)}


def elbo_gidd(logits: Tensor, batch: Corrupted) -> Tensor:
    """GIDD's loss with the bound's weights, at each token's own level.  -> (B, N)"""
    x = batch.x.flatten()                               # (B N,), as the rest
    x0 = batch.x0.flatten()
    t = batch.levels.clamp(LEVEL_MIN, 1 - LEVEL_MIN).flatten()
    weight = token_weights(x0, x, t, batch.noise, "elbo")
    nats = gidd_loss(logits.flatten(0, 1), x0, x, t, weight, batch.noise)
    return nats.view(batch.x.shape)


def levels_along(path: str, u: Tensor, n_tokens: int, n_frames: int) -> tuple[Tensor, Tensor]:
    """Levels on a path from data (u = 0) to noise (u = 1), and how fast each rises: d level / du.

    "shared": all tokens together, t = u^2; "frames": one frame after another, the last one first,
    each level the square of the progress in its turn.  u (B, 1) in (0, 1)  ->  (B, N), (B, N)
    """
    n_turns = 1 if path == "shared" else n_frames
    turn = (u * n_turns).floor()
    u_turn = u * n_turns % 1
    order = torch.arange(n_turns - 1, -1, -1, device=u.device)
    order = order.repeat_interleave(n_tokens // n_turns)
    levels = torch.where(order == turn, u_turn**2, (order < turn).to(u))
    return levels, torch.where(order == turn, 2 * u_turn * n_turns, 0.0)


@torch.no_grad()
def bits_per_token(
    nets: Nets, bounds: Callable, x0: Tensor, label: Tensor, noise: Noise,
    generator: torch.Generator, *, known: Tensor | None = None,
    paths: tuple[str, ...] = ("shared",), n_frames: int = 1, n_distinct: int = 0,
    max_logits: int = MAX_LOGITS, progress: Callable = iter,
) -> dict[str, tuple[float, float]]:
    """Upper bounds on -log2 p(x0) / N, estimated with one noise level for each sequence.

    The level is t = u^2 with u stratified on (0, 1), so the weight is dt/du = 2u: evenly drawn t
    would have a heavy tail near 0.
    x0 (n, N), label (n,); bounds: one of the functions above
    known       (n, N) bool: tokens that are given, and not counted
    n_distinct  x0 repeats its first n_distinct sequences, and the standard error is over these; 0:
                all are distinct
    progress    wraps the batches, as tqdm does
    ->  {bound: (bits per token, standard error)}, empty where the process has no closed form
    """
    if not noise.has_posterior:
        return {}
    n, n_tokens = x0.shape
    stratum = torch.arange(n)
    u = (stratum + torch.rand(n, generator=generator)) / n
    u = u.to(x0.device, torch.float64)[:, None]
    order = torch.randperm(n, generator=generator)      # stratum -> sequence
    is_counted = torch.ones_like(x0, dtype=torch.bool)
    if known is not None:
        is_counted = ~known
    nats = {}                                           # bound -> [(b,) of each batch]
    n_batch = max(1, min(BATCH, max_logits // (n_tokens * noise.vocab)))
    for strata in progress(stratum.split(n_batch)):
        rows = order[strata]
        for path in paths:
            levels, speed = levels_along(path, u[strata], n_tokens, n_frames)
            batch = corrupt_batch(
                x0[rows], label[rows], levels, is_counted[rows], noise, path, generator
            )
            for name, per_token in bounds(nets, batch).items():
                counted = torch.where(is_counted[rows], per_token, 0.0)
                nats.setdefault(name, []).append((speed * counted).sum(1))
    n_counted = is_counted.sum(1).double().mean()
    bits = {name: torch.cat(parts) / math.log(2) / n_counted for name, parts in nats.items()}
    if not n_distinct:
        return {name: mean_and_error(of_bound) for name, of_bound in bits.items()}
    sequence = order.to(x0.device) % n_distinct
    return {
        name: mean_and_clustered_error(of_bound, sequence, n_distinct)
        for name, of_bound in bits.items()
    }


def corrupt_batch(
    x0: Tensor, label: Tensor, levels: Tensor, is_counted: Tensor, noise: Noise, path: str,
    generator: torch.Generator,
) -> Corrupted:
    """Noise drawn on the host, so that it is the same for every device.  levels (B, N) of a path"""
    t = levels[:, :1].clamp(LEVEL_MIN, 1 - LEVEL_MIN)
    if path == "shared":        # along frames, those at 0 and 1 are exactly data and noise
        levels = levels.clamp(LEVEL_MIN, 1 - LEVEL_MIN)
    levels = levels * is_counted
    x, _ = corrupt(x0.cpu(), levels.cpu(), noise, generator)
    return Corrupted(x.to(x0.device), x0, label, t, levels, noise, path)


def mean_and_clustered_error(y: Tensor, sequence: Tensor, n: int) -> tuple[float, float]:
    """Mean of y (r * n,) in the order of strata, and its standard error over n sequences.

    How the bound varies with the level is no error, since the levels are stratified. It is removed
    by subtracting the mean of each block of neighbouring strata.

    sequence (r * n,): the sequence in [0, n) that each y is of
    """
    blocks = y.tensor_split(max(1, len(y) // STRATA_PER_BLOCK))
    residual = torch.cat([block - block.mean() for block in blocks])
    per_sequence = torch.zeros(n, dtype=y.dtype, device=y.device).index_add(0, sequence, residual)
    per_sequence = per_sequence / (len(y) / n)
    return y.mean().item(), per_sequence.std().item() / math.sqrt(n)


def mean_and_error(y: Tensor) -> tuple[float, float]:
    """Mean of stratified draws (n,), and its standard error from differences of neighbouring
    strata, which differ by noise alone."""
    n = len(y)
    differences = y[: n - n % 2].view(-1, 2).diff(dim=1)
    return y.mean().item(), differences.square().sum().sqrt().item() / n
