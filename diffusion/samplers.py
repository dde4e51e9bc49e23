"""Samplers: generators that yield a State after each step: a video is a `for`, and any callable can stand in for a net.

Nets are net(x, t, label, sites=None): planner -> (B, N) logits; denoiser -> (B, N, V) logits, or (B, K, V) at sites.
"""

import inspect
import math
from typing import NamedTuple

import torch

from diffusion.processes import T_MAX, T_MIN, draw_posterior, from_others, from_self, noise_of, staircase

FITS = {                                                # what each kind of run can be sampled with
    "maskd": ("ddpd", "ancestral", "confidence", "remdm"),  # planner + mask denoiser; ddpd alone uses the planner
    "unid": ("ddpd", "ancestral"),                      # planner + uniform denoiser
    "single": ("ddpd", "ancestral"),                    # one uniform denoiser, its own planner
    "gidd": ("ancestral", "self_correct"),              # one denoiser of hybrid noise, which can mend what is finished
    "forcing": ("rollout", "ancestral"),                # one denoiser that is told the noise level of each token
}


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


def check_fit(kind, sampler):
    if sampler not in FITS[kind]:
        raise ValueError(f"sampler {sampler} does not fit a {kind} run; one of {', '.join(FITS[kind])} does")


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


@torch.no_grad()
def ddpd(planner, denoiser, x, label, *, n_steps, generator, schedule="spread", k=1, pick="proportional",
         denoiser_process="uniform", vocab=None, known=None, stop=0.0, refine=0, temperature=1.0, top_k=0, top_p=1.0,
         guidance=1.0, planner_guidance=1.0, guidance_ramp=False, null_label=None):
    """Planned denoising (arXiv:2410.06264, alg. 1): the planner says where noise is, the denoiser what it should be.

    x (B, N) int64 of uniform noise, label (B,)  ->  yields State, n_steps + refine of them, fewer where all stop early.
    planner    None: the denoiser is a self-prediction on uniform noise and serves as both in one call (from_self)
    schedule   how many sites: "one"; "fixed" k; "spread" expected noise left over steps left, rounded up;
               "leap" each site by itself, with probability p_noise (t - s)/t on a fixed clock: exact for many steps
    pick       which sites: in proportion to p_noise, or to its odds ("softmax" of the logits)
    denoiser_process  "mask": it reads x with every token masked (id vocab) that a Bernoulli(p_noise) draw calls noise
    known      (B, N) bool, tokens that are never written; they count as neither noise nor data
    stop       expected number of noise tokens under which a sequence is done; 0: it spends all its steps
    guidance, planner_guidance   1: as trained, more: towards the label; guidance_ramp: growing from 1 as noise goes
    refine     further steps of k sites after n_steps, for all sequences; each sharpens the law
    """
    how = How(temperature, top_k, top_p, 0.0, guidance, guidance_ramp, null_label)
    check(how, [("schedule", schedule, ("one", "fixed", "spread", "leap")),
                ("pick", pick, ("proportional", "softmax")),
                ("denoiser_process", denoiser_process, ("uniform", "mask"))],
          n_steps=(n_steps, 1), k=(k, 1), stop=(stop, 0), refine=(refine, 0))
    if planner_guidance != 1 and null_label is None:
        raise ValueError("planner_guidance needs null_label, the class that stands for no label")
    if planner_guidance != 1 and planner is None:
        raise ValueError("planner_guidance needs a planner: one network as both is guided by guidance")
    if denoiser_process == "mask" and planner is None:
        raise ValueError("a mask denoiser cannot be its own planner: it says nothing of tokens that are not masked")
    if denoiser_process == "mask" and vocab is None:
        raise ValueError("denoiser_process mask needs vocab: the mask id is the vocabulary's size")
    x = x.clone()
    free = torch.ones_like(x, dtype=torch.bool) if known is None else ~known
    done, nfe = torch.zeros(len(x), dtype=torch.bool, device=x.device), torch.zeros_like(label)
    p_noise = torch.zeros(x.shape, device=x.device)
    clock = torch.full((len(x), 1), T_MAX, device=x.device)             # the level at which the planner is asked next
    step = 0
    while step < n_steps + refine:
        is_main = step < n_steps
        is_leap = schedule == "leap" and is_main
        rows = (~done | (not is_main)).nonzero()[:, 0]                  # (b,) sequences that are not done: mostly all
        if is_leap:
            clock[rows] = 1 - step / n_steps                            # the clock of this schedule is fixed
        written, t = torch.zeros_like(free), clock.clone()

        # 1. plan: where is noise, and how much
        if planner is None:
            logits, calls = guided(denoiser, x[rows], t[rows], label[rows], None, *how[-3:])
            p, others = from_self(logits.float().softmax(-1), x[rows], t[rows])
        else:
            logits, calls = guided(planner, x[rows], t[rows], label[rows], None,
                                   planner_guidance, guidance_ramp, null_label)
            p = logits.float().sigmoid()
        nfe[rows] += calls
        p = p * free[rows]                                              # (b, N)
        p_noise[rows] = p
        left, n_free = p.sum(1, keepdim=True), free[rows].sum(1, keepdim=True).clamp_min(1)     # (b, 1) expected noise
        if not is_leap and planner is not None:                         # one network was asked at the clock
            t[rows] = (left / n_free).clamp(T_MIN, T_MAX)               # solves 1 - alpha = mean p_noise
        if is_main:
            done[rows] = left[:, 0] < stop

        # 2. choose: a mask of sites
        busy = (~done[rows] | (not is_main)).nonzero()[:, 0]            # of rows
        rows, p, left, n_free = rows[busy], p[busy], left[busy], n_free[busy]
        is_noise = torch.rand(p.shape, generator=generator, device=p.device) < p
        if is_leap:
            where = is_noise & (torch.rand(p.shape, generator=generator, device=p.device) < 1 / (n_steps - step))
        else:
            keys = first_by(p if pick == "proportional" else p / (1 - p).clamp_min(1e-12), generator)
            n_sites = how_many(schedule if is_main else "fixed", left[:, 0], k, n_steps - step)
            where = top(keys, n_sites) & (keys > 0)                                             # (b, N) bool

        # 3. write
        seen = x[rows].masked_fill(is_noise | where, vocab) if denoiser_process == "mask" else x[rows]
        new, _, calls = fill(denoiser, seen, t[rows], label[rows], where, how, generator,
                             None if planner is not None else others[busy].log())
        nfe[rows] += calls
        x[rows], written[rows] = torch.where(where, new, x[rows]), where
        clock[rows] = ((p * ~where).sum(1, keepdim=True) / n_free).clamp(T_MIN, T_MAX)          # what is left
        yield State(x.clone(), p_noise.clone(), written, t[:, 0], nfe.clone())
        step = n_steps if is_main and done.all() else step + 1


def last(steps):
    """The final State of a sampler, the others forgotten on the way."""
    for state in steps:
        final = state
    return final


def how_many(schedule, left, k, steps_left):
    """Sites per sequence in this step.  left (b,) expected noise tokens -> (b,) int64"""
    if schedule == "spread":
        return (left / steps_left - 1e-4).ceil().clamp_min(0).long()    # 1e-4: 2.0000001 sites are 2
    return torch.full_like(left, 1 if schedule == "one" else k, dtype=torch.long)


@torch.no_grad()
def ancestral(denoiser, x, label, *, n_steps, generator, process, kind="others", vocab=None, p_uniform=0.1, known=None,
              temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0, guidance_ramp=False, null_label=None):
    """The reverse process a step at a time: x_s from q(x_s | x_t, p) of every token on its own.  -> yields State

    x (B, N) pure noise: masks (id vocab), or uniform noise for process "uniform". Exact as steps go to infinity.
    process    "mask", "uniform" or "hybrid" of p_uniform (arXiv:2503.04482), whose levels are spaced as squares
    kind       what the denoiser predicts a token from: the "others", or the token it"self" too (processes.from_others)
    With masks the head runs at tokens that are uncovered, and a sequence without masks leaves the computation.
    """
    how = How(temperature, top_k, top_p, min_p, guidance, guidance_ramp, null_label)
    check(how, [("process", process, ("uniform", "mask", "hybrid")), ("kind", kind, ("others", "self"))],
          n_steps=(n_steps, 1))
    x, free, nfe = x.clone(), free_of(x, known), torch.zeros_like(label)
    vocab = int(x.max()) if vocab is None and process != "uniform" else vocab
    for step in range(n_steps):
        t, s = (torch.full((len(x), 1), 1 - i / n_steps, device=x.device) for i in (step, step + 1))
        t, s = (t**2, s**2) if process == "hybrid" else (t, s)
        told, before = t.clamp(T_MIN, T_MAX), x
        if process == "mask":
            u = torch.rand(x.shape, generator=generator, device=x.device)
            where = free & (x == vocab) & (u < (t - s) / t)
            p_noise = (free & (x == vocab)).float()
            rows = (p_noise.any(1) & where.any()).nonzero()[:, 0]       # the others are done
            new, _, n_calls = fill(denoiser, x[rows], told[rows], label[rows], where[rows], how, generator)
            x, calls = x.index_copy(0, rows, new), torch.zeros_like(nfe).index_fill(0, rows, n_calls)
        else:
            logits, calls = guided(denoiser, x, told, label, None, *how[-3:])
            vocab = vocab or logits.shape[-1]
            probs = sharpen(logits.float(), *how[:4])
            if kind == "self":
                probs = from_others(probs, x, t, process, p_uniform)
            at_x = probs.gather(-1, x.clamp_max(vocab - 1)[..., None])[..., 0]                  # (B, N)
            p_noise = noise_of(at_x, x, t, process, vocab, p_uniform) * free
            new = draw_posterior(draw(probs, generator), at_x, x, t, s, process, vocab, generator, p_uniform)
            x = torch.where(free, new, x)
        nfe = nfe + calls
        yield State(x.clone(), p_noise, x != before, t[:, 0], nfe)


def free_of(x, known):
    return torch.ones_like(x, dtype=torch.bool) if known is None else ~known


def mask_of(x, free, vocab):
    """The mask id of a sampler that starts from masks."""
    vocab = int(x.max()) if vocab is None else vocab
    if not (x == vocab)[free].all():
        raise ValueError(f"samplers of a mask denoiser start from masks, id {vocab}, at all tokens that are not known")
    return vocab


@torch.no_grad()
def confidence(denoiser, x, label, *, n_steps, generator, order="confidence", schedule="arccos", noise=4.5,
               vocab=None, known=None, temperature=1.0, temperature_end=0.0, top_k=0, top_p=1.0, min_p=0.0,
               guidance=1.0, guidance_ramp=False, null_label=None):
    """MaskGIT (arXiv:2202.04200): fill all masks at once, keep the surest, mask the others again.  -> yields State

    x (B, N) masks (id vocab). After a share r of the steps a share arccos(r) / (pi/2) of the tokens is masked, or
    cos(r pi/2) with schedule "cosine", or 1 - r with "linear"; every step keeps at least one token.
    order      "confidence": log-probability of the draw plus noise (1 - r) Gumbel, or "random"
    temperature_end   where the temperature, falling evenly, ends; 0: it stays
    """
    how = How(temperature, top_k, top_p, min_p, guidance, guidance_ramp, null_label)
    check(how, [("order", order, ("confidence", "random")), ("schedule", schedule, ("arccos", "cosine", "linear"))],
          n_steps=(n_steps, 1), noise=(noise, 0), temperature_end=(temperature_end, 0))
    x, free, nfe = x.clone(), free_of(x, known), torch.zeros_like(label)
    vocab = mask_of(x, free, vocab)
    n_free = free.sum(1)
    for step in range(n_steps):
        masked, r = free & (x == vocab), (step + 1) / n_steps
        left = {"arccos": math.acos(r) / (math.pi / 2), "cosine": math.cos(r * math.pi / 2), "linear": 1 - r}[schedule]
        n_left = (n_free * left + 1e-6).long().minimum(masked.sum(1) - 1).clamp_min(0)          # (B,)
        n_left = n_left if step + 1 < n_steps else torch.zeros_like(n_left)
        t = (masked.sum(1, keepdim=True) / n_free.clamp_min(1)[:, None]).clamp(T_MIN, T_MAX)
        if temperature_end:
            how = how._replace(temperature=temperature + (temperature_end - temperature) * step / max(1, n_steps - 1))
        race = torch.empty(x.shape, dtype=torch.float64, device=x.device).exponential_(generator=generator)
        if order == "random":                                           # only those to keep are drawn
            where = top(torch.where(masked, -race.log(), -torch.inf), masked.sum(1) - n_left) & masked
            new, _, calls = fill(denoiser, x, t, label, where, how, generator)
        else:
            new, p, calls = fill(denoiser, x, t, label, masked, how, generator)
            keys = p.double().log() - noise * (1 - r) * race.log()      # -log of an exponential draw is Gumbel noise
            where = top(torch.where(masked, keys, -torch.inf), masked.sum(1) - n_left) & masked
        x, nfe = torch.where(where, new, x), nfe + calls
        yield State(x.clone(), masked.float(), where, t[:, 0], nfe)


@torch.no_grad()
def remdm(denoiser, x, label, *, n_steps, generator, remask="confidence", eta=0.2, vocab=None, known=None,
          temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0, guidance_ramp=False, null_label=None):
    """ReMDM (arXiv:2503.00307): masked diffusion that masks written tokens again, so that it can mend them.

    x (B, N) masks (id vocab)  ->  yields State. From level t to s a written token is masked with probability sigma, at
    most min(1, s / (1 - t)): eta of that ("rescale"), no more than eta ("cap"), or ("confidence") eta of it, shared out
    by a softmax over minus the probability at which each token was written. The first two keep the law of the data.
    """
    how = How(temperature, top_k, top_p, min_p, guidance, guidance_ramp, null_label)
    check(how, [("remask", remask, ("confidence", "rescale", "cap"))], n_steps=(n_steps, 1), eta=(eta, 0))
    x, free, nfe = x.clone(), free_of(x, known), torch.zeros_like(label)
    vocab = mask_of(x, free, vocab)
    sure = torch.zeros(x.shape, device=x.device)                        # probability at which each token was written
    for step in range(n_steps):
        t, s = 1 - step / n_steps, 1 - (step + 1) / n_steps
        masked, u = free & (x == vocab), torch.rand(x.shape, generator=generator, device=x.device)
        most = min(1.0, s / (1 - t)) if t < 1 else 1.0
        sigma = torch.full(x.shape, min(eta, most) if remask == "cap" else min(1.0, eta) * most, device=x.device)
        if remask == "confidence":
            share = torch.where(free & ~masked, -sure, -torch.inf).softmax(1).nan_to_num(0)     # 0 at masks
            sigma = sigma * share
        uncovers = masked & (u < (t - s + sigma * (1 - t)) / t)         # P(keep) grows from 1 - t to 1 - s all the same
        again = free & ~masked & (u < sigma)
        level = torch.full((len(x), 1), t, device=x.device).clamp(T_MIN, T_MAX)
        new, p, calls = fill(denoiser, x, level, label, uncovers, how, generator) if uncovers.any() else (x, sure, 0)
        x, sure = torch.where(again, vocab, new), torch.where(uncovers, p, sure)
        nfe = nfe + calls
        yield State(x.clone(), masked.float(), uncovers | again, level[:, 0], nfe)


@torch.no_grad()
def self_correct(denoiser, x, label, *, n_steps, generator, k=1, t=0.01, temperature=0.1, patience=16, p_uniform=0.1,
                 known=None, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0, guidance_ramp=False, null_label=None,
                 vocab=None):
    """Mend finished sequences with a denoiser that distrusts tokens (arXiv:2503.04482, section 5).  -> yields State

    x (B, N) without masks. Each step draws every token anew at level t, and writes the k draws that differ and are
    likeliest. A sequence is done when no draw differs, or its self-accuracy, the share of tokens that are the likeliest
    in their place, has not risen for `patience` steps.
    """
    how = How(temperature, top_k, top_p, min_p, guidance, guidance_ramp, null_label)
    check(how, n_steps=(n_steps, 1), k=(k, 1), patience=(patience, 1))
    x, free, nfe = x.clone(), free_of(x, known), torch.zeros_like(label)
    p_noise = torch.zeros(x.shape, device=x.device)
    best, since = torch.full((len(x),), -1.0, device=x.device), torch.zeros_like(label)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(n_steps):
        rows = (~done).nonzero()[:, 0]
        level = torch.full((len(rows), 1), t, device=x.device)
        logits, calls = guided(denoiser, x[rows], level, label[rows], None, *how[-3:])
        nfe[rows] += calls
        vocab = logits.shape[-1]
        p_at_x = logits.float().softmax(-1).gather(-1, x[rows][..., None])[..., 0]
        p_noise[rows] = noise_of(p_at_x, x[rows], level, "hybrid", vocab, p_uniform) * free[rows]
        accuracy = ((logits.argmax(-1) == x[rows]) | ~free[rows]).float().mean(1)
        rises = accuracy > best[rows]
        best[rows], since[rows] = best[rows].maximum(accuracy), torch.where(rises, 0, since[rows] + 1)
        probs = sharpen(logits.float(), *how[:4])
        new = draw(probs, generator)                                                            # (b, N)
        differs = (new != x[rows]) & free[rows]
        sure = torch.where(differs, probs.gather(-1, new[..., None])[..., 0].double(), -1.0)
        stops = ~differs.any(1) | (since[rows] >= patience)
        where = top(sure, torch.full_like(label[rows], k)) & differs & ~stops[:, None]
        written = torch.zeros_like(free)
        written[rows] = where
        x[rows] = torch.where(where, new, x[rows])
        done[rows] = stops
        yield State(x.clone(), p_noise.clone(), written, torch.full((len(x),), t, device=x.device), nfe.clone())
        if done.all():
            return


@torch.no_grad()
def rollout(denoiser, x, label, levels, *, generator, process="hybrid", vocab=None, p_uniform=0.1, known=None, window=0,
            stabilise=0.0, context_level=0.0, cache=None, reward=None, reward_weight=1.0, particles=1, n_draws=1,
            temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0, guidance_ramp=False, null_label=None):
    """Diffusion Forcing (arXiv:2407.01392): every frame falls from noise to data along a column of levels.

    x (B, N) pure noise but for known tokens, levels (R, F) as of processes.staircase, F frames of N / F tokens each
    ->  yields State, R - 1 of them. Each row is the posterior of `process` at each token's own level.
    window     frames that the denoiser sees, 0: all; it slides along, the latest frame that falls at its end. Of fewer
               frames than that the missing ones are noise, and dropped
    stabilise, context_level   noise levels told of finished frames and of known tokens, that it may distrust them
    cache      of a causal denoiser: finished frames are computed once
    reward     (B, N) predicted clean tokens -> (B,). Rows are groups of `particles` that follow one another; each is
               weighted by exp(reward_weight (reward now - before)), the reward a mean over n_draws predictions, and a
               group, of one label and one `known`, is resampled when its effective size is under half and at the
               end: x ~ p(x) exp(reward_weight reward(x))
    """
    how = How(temperature, top_k, top_p, min_p, guidance, guidance_ramp, null_label)
    check(how, [("process", process, ("uniform", "mask", "hybrid"))], window=(window, 0), stabilise=(stabilise, 0),
          context_level=(context_level, 0), particles=(particles, 1), n_draws=(n_draws, 1))
    if (stabilise or context_level) and (process == "mask" or (process == "hybrid" and p_uniform == 0)):
        raise ValueError("stabilise needs uniform noise: with masks a visible token is certain at any level")
    if len(x) % particles or x.shape[1] % levels.shape[1]:
        raise ValueError(f"{len(x)} rows of {x.shape[1]} tokens are not groups of {particles} particles and "
                         f"{levels.shape[1]} frames")
    if cache is not None and (reward or guidance != 1):
        raise ValueError("a cache holds one set of rows: it goes without reward and guidance")
    vocab = int(x.max()) if vocab is None and process != "uniform" else vocab
    (n_rows, n_frames), n_tokens, size = levels.shape, x.shape[1], x.shape[1] // levels.shape[1]
    window, missing = window or n_frames, max(0, window - n_frames)
    x, free, nfe = x.clone(), free_of(x, known), torch.zeros_like(label)
    if missing:
        noise = torch.randint(vocab, (len(x), missing * size), generator=generator, device=x.device)
        x = torch.cat([x, noise if process == "uniform" else torch.full_like(noise, vocab)], 1)
        free = torch.cat([free, torch.ones_like(noise, dtype=torch.bool)], 1)
    levels = torch.cat([levels, levels.new_ones(n_rows, missing)], 1).to(x.device, torch.float32)
    is_known = ~free.view(len(x), -1, size).any(2).any(0)               # (F,) frames in which nothing is to be drawn
    levels = levels.masked_fill(is_known, 0)
    herd = Particles(reward, reward_weight, particles, n_draws, n_tokens, x, generator)
    p_noise = torch.zeros(x.shape, device=x.device)
    rows_that_fall = [i for i in range(n_rows - 1) if (levels[i] > levels[i + 1]).any()]
    for i in rows_that_fall:
        t, s = levels[i], levels[i + 1]
        falls = (t > s).nonzero()[:, 0].tolist()
        end = falls[-1] + 1 if cache is not None else max(falls[-1] + 1, min(window, len(t)))
        first = max(0, end - window) if cache is None else cache.n_kept
        if falls[0] < max(first, end - window):
            raise ValueError(f"frames {falls[0]} to {falls[-1]} fall together: too many for a window of {window}")
        here, at = slice(first * size, end * size), slice(first, end)
        t_, s_ = (y[at].repeat_interleave(size).expand(len(x), -1) * free[:, here] for y in (t, s))     # (B, n)
        told = torch.where(free[:, here], torch.where(t_ == 0, stabilise, t_), context_level)
        seen = x[:, here]
        if cache is not None:
            keep = int((t[at] > 0).int().argmax())                      # the first frame that is not finished
            logits, calls = denoiser(seen, told, label, None, cache, keep), 1
        else:
            logits, calls = guided(denoiser, seen, told, label, None, *how[-3:])
        vocab, nfe = vocab or logits.shape[-1], nfe + calls
        probs = sharpen(logits.float(), *how[:4])
        at_x = probs.gather(-1, seen.clamp_max(vocab - 1)[..., None])[..., 0]                   # (B, n)
        doubt = noise_of(at_x, seen, t_, process, vocab, p_uniform) * (t_ > 0)
        if reward is not None:
            rows = herd.move(herd.expects(x, here, probs, doubt))
            x, seen, probs, at_x, doubt = (y[rows] for y in (x, seen, probs, at_x, doubt))
        p_noise, written = torch.zeros_like(p_noise), torch.zeros_like(free)
        p_noise[:, here] = doubt
        fall = slice((falls[0] - first) * size, (falls[-1] + 1 - first) * size)                 # of what is seen
        drawn, now_at = draw(probs[:, fall], generator), slice(falls[0] * size, (falls[-1] + 1) * size)
        new = draw_posterior(drawn, *(y[:, fall] for y in (at_x, seen, t_, s_)), process, vocab, generator, p_uniform)
        new = torch.where(t_[:, fall] > s_[:, fall], new, seen[:, fall])
        written[:, now_at], x[:, now_at] = new != seen[:, fall], new
        if reward is not None and i == rows_that_fall[-1]:
            rows = herd.move(reward(x[:, :n_tokens]), always=True)
            x, p_noise, written = x[rows], p_noise[rows], written[rows]
        yield State(x[:, :n_tokens].clone(), p_noise[:, :n_tokens].clone(), written[:, :n_tokens],
                    t_.sum(1) / (t_ > 0).sum(1).clamp_min(1), nfe)


class Particles:
    """Groups of sequences whose weights follow a reward as it becomes known (sequential Monte Carlo)."""

    def __init__(self, reward, weight, n, n_draws, n_tokens, x, generator):
        self.reward, self.weight, self.n, self.n_draws, self.n_tokens = reward, weight, n, n_draws, n_tokens
        self.before, self.log_w = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        self.luck = torch.Generator(x.device).manual_seed(generator.initial_seed() + 1)     # spends no draw of x

    def expects(self, x, here, probs, doubt):
        """Mean reward of draws of the clean tokens; doubt (B, n): P(noise) of the tokens `here`.  -> (B,)"""
        total = torch.zeros(len(x), device=x.device)
        for _ in range(self.n_draws):
            is_noise = torch.rand(doubt.shape, generator=self.luck, device=x.device) < doubt
            clean = x.clone()
            clean[:, here] = torch.where(is_noise, draw(probs, self.luck), x[:, here])
            total += self.reward(clean[:, :self.n_tokens])
        return total / self.n_draws

    def move(self, now, always=False):
        """Weigh by what the reward has gained, and resample.  -> rows (B,) to go on from"""
        self.log_w = self.log_w + self.weight * (now - self.before)
        rows, self.log_w = resample(self.log_w, self.n, self.luck, always)
        self.before = now[rows]
        return rows


def resample(log_w, particles, generator, always=False):
    """Systematic resampling of each group whose effective size is under half (or, always, whose weights differ).

    log_w (B,), groups of `particles` rows  ->  rows (B,), log_w (B,): 0 where a group was resampled
    """
    groups = log_w.view(-1, particles)
    w = groups.double().softmax(1)
    must = w.square().sum(1).reciprocal() < particles / 2
    if always:
        must = groups.amax(1) > groups.amin(1)
    u = torch.rand(len(w), 1, dtype=torch.float64, generator=generator, device=w.device)
    points = (u + torch.arange(particles, device=w.device)) / particles
    chosen = torch.searchsorted(w.cumsum(1).clamp_max(1), points).clamp_max(particles - 1)
    own = torch.arange(particles, device=w.device)
    rows = torch.where(must[:, None], chosen, own) + torch.arange(len(w), device=w.device)[:, None] * particles
    return rows.flatten(), torch.where(must[:, None], 0.0, groups).flatten()


def options_of(sampler):
    """Names of a sampler's arguments that a user may set."""
    return [*inspect.signature(globals()[sampler]).parameters, *["lag"] * (sampler == "rollout")]


def staircase_of(grid, n_steps, frames=0, lag=-1, context=0):
    """Levels of a rollout: a column for each frame of a video after its context, one for all tokens of other grids.

    lag -1: frame by frame; 0: all together, window by window  ->  (R, F)
    """
    if len(grid) != 3:
        levels = staircase(n_steps, 1, 0)
    else:
        context = min(context, grid[0] - 1)
        frames = (frames or grid[0]) - context
        if frames < 1:
            raise ValueError(f"{frames + context} frames are no more than the {context} that are given")
        block = min(frames, grid[0] - context) if lag == 0 else 1       # as many as a window holds
        levels = staircase(n_steps, frames, n_steps if lag < 1 else lag, block)
        levels = torch.cat([levels.new_zeros(len(levels), context), levels], 1)
    return levels


def run(sampler, kind, nets, label, *, meta, generator, given=None, known=None, p_uniform=0.1, process=None, lag=-1,
        frames=0, context=0, **options):
    """Sample a run's nets from pure noise, but for tokens given (B, N) where known (B, N); self_correct mends `given`.

    sampler: a name in FITS[kind], kind: key of FITS; label (B,); meta: the data's; process: of a forcing run's noise
    frames, context: how many a rollout makes (0: as many as the data has), and of which so many are known
    ->  yields State
    """
    check_fit(kind, sampler)
    vocab, grid = meta["vocab"], list(meta["grid"])
    shape = (len(label), math.prod([frames or grid[0], *grid[1:]] if len(grid) == 3 else grid))
    options |= dict(generator=generator, vocab=vocab, known=known, null_label=meta["n_classes"])
    if sampler == "ddpd" or kind in ("unid", "single") or process == "uniform":
        x = torch.randint(vocab, shape, generator=generator, device=label.device)
    else:
        x = torch.full(shape, vocab, device=label.device)
    if sampler == "self_correct":
        x = given
    elif known is not None:
        x = torch.where(known, given, x)
    denoiser, process = nets["denoiser"], process or {"maskd": "mask", "gidd": "hybrid"}.get(kind, "uniform")
    if kind in ("gidd", "forcing"):
        options |= dict(p_uniform=p_uniform)
    if kind == "forcing":
        lag = 0 if sampler == "ancestral" else lag
        levels = staircase_of(grid, options.pop("n_steps"), frames, lag, context)
        if getattr(denoiser, "is_causal", False) and "reward" not in options and options.get("guidance", 1) == 1:
            options["cache"] = denoiser.new_cache()
        window = grid[0] if len(grid) == 3 else 1
        yield from rollout(denoiser, x, label, levels, process=process, window=window, **options)
    elif sampler == "ddpd":
        yield from ddpd(nets.get("planner"), denoiser, x, label, denoiser_process=process, **options)
    elif sampler == "ancestral":
        learnt = "self" if kind == "single" else "others"
        yield from ancestral(denoiser, x, label, process=process, kind=learnt, **options)
    else:
        chosen = {"confidence": confidence, "remdm": remdm, "self_correct": self_correct}[sampler]
        yield from chosen(denoiser, x, label, **options)
