"""Guided network calls, categorical sampling, and the State that a sampler yields after each
step."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.randomness import Random, exponential, of_rows, uniform


class State(NamedTuple):
    """A step of a sampler: x is after it, p_noise is of the tokens before it."""
    x: Tensor                   # (B, N) tokens after the step
    p_noise: Tensor             # (B, N) in [0, 1]: P(noise) before it; without a planner 1 at masks
    written: Tensor             # (B, N) bool: sites written in this step, or tokens that changed
    t: Tensor                   # (B,) noise level before the step; rollouts: a mean over tokens
    nfe: Tensor                 # (B,) network calls so far


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn from a denoiser's logits; sample.py's flags bear these names."""
    temperature: float = 1.0
    top_k: int = 0              # draw from the k likeliest ids; 0: all
    top_p: float = 1.0          # draw from the fewest likeliest ids with this probability mass
    min_p: float = 0.0          # draw from ids at least this share as likely as the likeliest
    guidance: float = 1.0       # 1: as trained; more: towards the label
    null_label: int | None = None   # the class that stands for no label

    def __post_init__(self):
        allowed = {
            "temperature": (self.temperature > 0, "above 0"),
            "top_k": (self.top_k >= 0, "not negative"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
        }
        for name, (is_good, rule) in allowed.items():
            if not is_good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")
        if self.guidance != 1 and self.null_label is None:
            raise ValueError("guidance needs null_label, the class that stands for no label")


DECODING_NAMES = tuple(field.name for field in fields(Decoding))


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")


def check_at_least(**limits: tuple[float, float]) -> None:
    """Refuse, by name, numbers below their limits.  name=(value, least)"""
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def cfg_logits(
    net: Callable, x: Tensor, t: Tensor, label: Tensor, decoding: Decoding,
    sites: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Classifier-free guidance: unlabelled + guidance * (labelled - unlabelled), both in one batch.

    arXiv:2207.12598.  Arguments as of a net  ->  its logits, network calls (1 or 2)
    """
    at_sites = () if sites is None else (sites,)
    if decoding.guidance == 1:
        return net(x, t, label, *at_sites), 1
    twice = [torch.cat([y, y]) for y in (x, t, *at_sites)]
    both_labels = torch.cat([label, torch.full_like(label, decoding.null_label)])
    both = net(twice[0], twice[1], both_labels, *twice[2:])
    both = both.clamp(-1e4, 1e4)                        # -inf minus -inf would be NaN
    labelled, unlabelled = both.chunk(2)
    return unlabelled + decoding.guidance * (labelled - unlabelled), 2


def refuse_nan(logits: Tensor) -> None:
    if logits.isnan().any():
        raise ValueError("the network's logits are not numbers (NaN): nothing can be sampled")


def truncate_probs(logits: Tensor, decoding: Decoding) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p.  (..., V) -> (..., V)"""
    refuse_nan(logits)
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if decoding.top_p == 1 and not decoding.min_p:
        return probs
    if decoding.top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        # the id that reaches top_p stays
        is_dropped = sorted_probs.cumsum(-1) - sorted_probs >= decoding.top_p
        probs = probs.masked_fill(is_dropped.scatter(-1, order, is_dropped), 0)
    if decoding.min_p:
        probs = probs.masked_fill(probs < decoding.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def sample_categorical(probs: Tensor, generator: Random) -> Tensor:
    """One id from each distribution.  (B, ..., V) -> (B, ...)"""
    return invert_cdf(probs, uniform(probs.shape[:-1], generator, probs.device, torch.float64))


def invert_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The id at which the CDF passes u; float64 keeps small tails.  (..., V), (...) -> (...)"""
    cdf = probs.double().cumsum(-1)
    ids = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
    return ids.clamp_max(probs.shape[-1] - 1)[..., 0]


def gather_at(probs: Tensor, x: Tensor) -> Tensor:
    """The probability of each token x; anything at masks.  (B, N, V), (B, N) -> (B, N)"""
    ids = x.clamp_max(probs.shape[-1] - 1)[..., None]
    return probs.gather(-1, ids)[..., 0]


class Sites(NamedTuple):
    """Where a bool tensor (B, N) is true, row by row."""
    rows: Tensor                # (b,) the rows that have any
    index: Tensor               # (b, K) where; rows with fewer than K are padded by other positions
    is_site: Tensor             # (b, K) bool, False at the padding

    def write(self, x: Tensor, values: Tensor) -> Tensor:
        """x (B, N) with values (n,) at the sites."""
        old = x[self.rows]
        at_index = old.gather(1, self.index)
        at_index[self.is_site] = values
        return x.index_copy(0, self.rows, old.scatter(1, self.index, at_index))


def sites_of(where: Tensor) -> Sites:
    """Where `where` (B, N) is true."""
    n_sites = where.sum(1, keepdim=True)
    rows = n_sites[:, 0].nonzero()[:, 0]
    n_sites = n_sites[rows]
    n_most = int(n_sites.max()) if len(rows) else 0
    index = where[rows].int().topk(n_most).indices
    is_site = torch.arange(n_most, device=where.device) < n_sites
    return Sites(rows, index, is_site)


class Draw(NamedTuple):
    x: Tensor                   # (B, N) with new tokens at the sites asked for
    p: Tensor                   # (B, N) probability of what was drawn, 0 elsewhere
    entropy: Tensor             # (B, N) nats of the law it was drawn from, 0 elsewhere or unasked
    calls: Tensor               # (B,) network calls of each row, 0 without sites or with logits


def sample_at(
    denoiser: Callable | None, x: Tensor, t: Tensor, label: Tensor, where: Tensor,
    decoding: Decoding, generator: Random, logits: Tensor | None = None,
    want_entropy: bool = False,
) -> Draw:
    """Draw a token wherever the mask `where` is true, by one network call on the rows that need it.

    x, where (B, N), t (B, 1); logits (B, N, V) of x, if they are known already  ->  Draw
    """
    p = torch.zeros(x.shape, device=x.device)
    entropy = torch.zeros(x.shape, device=x.device)
    calls = torch.zeros(len(x), dtype=torch.long, device=x.device)
    sites = sites_of(where)
    rows, index, is_site = sites
    if len(rows) == 0:
        return Draw(x, p, entropy, calls)
    if logits is None:
        seen = (x[rows], t[rows], label[rows])
        logits, n_calls = cfg_logits(denoiser, *seen, decoding, index)  # (b, K, V)
        calls[rows] = n_calls
    else:
        logits = logits[rows].gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
    probs = truncate_probs(logits[is_site].float(), decoding)           # (n, V)
    # one number for every token, so that a draw does not depend on which others are asked for
    u = uniform((len(rows), x.shape[1]), of_rows(generator, rows), x.device, torch.float64)
    drawn = invert_cdf(probs, u.gather(1, index)[is_site])              # (n,)
    x = sites.write(x, drawn)
    p = sites.write(p, probs.gather(1, drawn[:, None])[:, 0])
    if want_entropy:
        entropy = sites.write(entropy, torch.special.entr(probs).sum(-1))
    return Draw(x, p, entropy, calls)


def race_keys(weight: Tensor, generator: Random) -> Tensor:
    """Keys whose descending order is a draw without replacement in proportion to weight.

    An exponential race, in float64 because float32 would cut its tails; weight 0 has key 0.
    (B, N) -> (B, N)
    """
    return weight.double() / exponential(weight.shape, generator, weight.device)


def topk_mask(keys: Tensor, k: Tensor) -> Tensor:
    """The k (B,) largest keys of each row, as a mask.  (B, N) -> (B, N) bool"""
    rank = keys.argsort(1, descending=True).argsort(1)
    return rank < k[:, None]


def editable_mask(x: Tensor, known: Tensor | None) -> Tensor:
    """The tokens that a sampler may write: all but those that are known.  (B, N) bool"""
    return torch.ones_like(x, dtype=torch.bool) if known is None else ~known


def mask_id_of(x: Tensor, editable: Tensor, vocab: int | None) -> int:
    """The mask id of a sampler that starts from masks; refuses any other start."""
    mask_id = int(x.max()) if vocab is None else vocab
    if not (x == mask_id)[editable].all():
        raise ValueError(
            f"samplers of a mask denoiser start from masks, id {mask_id}, at all tokens not known"
        )
    return mask_id
