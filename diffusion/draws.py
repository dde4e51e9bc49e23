"""What all samplers share: how a network is asked, how tokens are drawn from what it says, what a step is."""

from typing import NamedTuple

import torch


class State(NamedTuple):
    x: torch.Tensor             # (B, N) tokens after the step
    p_noise: torch.Tensor       # (B, N) in [0, 1]: the map by which its sites were chosen
    written: torch.Tensor       # (B, N) bool: the sites written in this step
    t: torch.Tensor             # (B,) noise level at which the denoiser was asked
    nfe: torch.Tensor           # (B,) network calls so far


class How(NamedTuple):
    """How tokens are drawn from a denoiser's logits; sample.py's flags bear these names."""
    temperature: float = 1.0
    top_k: int = 0              # the likeliest ids only; 0: all
    top_p: float = 1.0          # the fewest likeliest ids that hold this mass
    min_p: float = 0.0          # ids at least this share as likely as the likeliest
    guidance: float = 1.0       # 1: as trained; more: towards the label
    guidance_ramp: bool = False     # let guidance grow from 1 with the share of noise gone
    null_label: int | None = None   # the class that stands for no label


def check(how=None, choices=(), **limits):
    """Refuse, by name, arguments that mean nothing.  choices (name, value, allowed); limits name=(value, least)"""
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(allowed)}")
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name, is_good, rule in [("temperature", how.temperature > 0, "above 0"),
                                ("top_k", how.top_k >= 0, "not negative"),
                                ("top_p", 0 < how.top_p <= 1, "in (0, 1]"),
                                ("min_p", 0 <= how.min_p <= 1, "in [0, 1]")]:
        if not is_good:
            raise ValueError(f"{name} is {getattr(how, name)}; it must be {rule}")
    if how.guidance != 1 and how.null_label is None:
        raise ValueError("guidance needs null_label, the class that stands for no label")


def guided(net, x, t, label, sites, guidance, ramp, null_label):
    """unlabelled + guidance * (labelled - unlabelled), both in one batch (arXiv:2207.12598).  -> logits, calls

    ramp: guidance grows from 1 with the share of noise gone, 1 - t of each row
    """
    where = () if sites is None else (sites,)
    if guidance == 1:
        return net(x, t, label, *where), 1
    twice = [torch.cat([y, y]) for y in (x, t, *where)]
    both = net(*twice[:2], torch.cat([label, torch.full_like(label, null_label)]), *twice[2:])
    with_label, without = both.clamp(-1e4, 1e4).chunk(2)                # two impossible ids have no difference
    if ramp:
        guidance = (1 + (guidance - 1) * (1 - t)).view(-1, *[1] * (both.dim() - 1)).to(both)
    return without + guidance * (with_label - without), 2


def sharpen(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after temperature and truncation.  (..., V) -> (..., V)"""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_p, order = probs.sort(-1, descending=True)
        drop = sorted_p.cumsum(-1) - sorted_p >= top_p                  # the first one to reach top_p is kept
        probs = probs.masked_fill(drop.scatter(-1, order, drop), 0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True) if top_p < 1 or min_p else probs


def draw(probs, generator):
    """One id from each distribution, by one number against its float64 sum: tails are kept.  (..., V) -> (...)"""
    cdf = probs.double().cumsum(-1)
    u = torch.rand(*probs.shape[:-1], 1, dtype=torch.float64, generator=generator, device=probs.device)
    return torch.searchsorted(cdf, u * cdf[..., -1:], right=True).clamp_max(probs.shape[-1] - 1)[..., 0]


def fill(denoiser, x, t, label, where, how, generator, logits=None):
    """Draw a token at every place where asked, all at once, in one call (but none for no rows).

    x, where (B, N), t (B, 1), logits (B, N, V) if they are known already
    ->  new (B, N), x elsewhere;  p (B, N) probability of what was drawn, 0 elsewhere;  calls
    """
    n_sites, calls = where.sum(1, keepdim=True), 0
    if len(x) == 0:
        return x, torch.zeros(x.shape, device=x.device), calls
    sites = where.int().topk(max(1, int(n_sites.max()))).indices                                        # (B, K)
    chosen = torch.arange(sites.shape[1], device=x.device) < n_sites                            # (B, K) bool
    if logits is None:
        logits, calls = guided(denoiser, x, t, label, sites, *how[-3:])
    else:
        logits = logits.gather(1, sites[..., None].expand(-1, -1, logits.shape[-1]))
    probs = sharpen(logits[chosen].float(), *how[:4])                                           # (n, V)
    drawn = draw(probs, generator)                                                              # (n,)
    ids, p = x.gather(1, sites), torch.zeros(sites.shape, device=x.device)
    ids[chosen], p[chosen] = drawn, probs.gather(1, drawn[:, None])[:, 0]
    return x.scatter(1, sites, ids), torch.zeros(x.shape, device=x.device).scatter(1, sites, p), calls


def first_by(weight, generator):
    """Keys whose descending order is a draw without replacement in proportion to weight; zero weight has key 0.

    An exponential race in float64: float32 would cut its tails.  (b, N) -> (b, N)
    """
    race = torch.empty(weight.shape, dtype=torch.float64, device=weight.device).exponential_(generator=generator)
    return weight.double() / race


def top(keys, n):
    """The n (B,) largest of each row, as a mask.  (B, N) -> (B, N) bool"""
    rank = keys.argsort(1, descending=True).argsort(1)
    return rank < n[:, None]


def free_of(x, known):
    return torch.ones_like(x, dtype=torch.bool) if known is None else ~known


def mask_of(x, free, vocab):
    """The mask id of a sampler that starts from masks."""
    vocab = int(x.max()) if vocab is None else vocab
    if not (x == vocab)[free].all():
        raise ValueError(f"samplers of a mask denoiser start from masks, id {vocab}, at all tokens that are not known")
    return vocab
