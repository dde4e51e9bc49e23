"""Samplers: generators that yield a State after each step: a video is a `for`, and any callable can stand in for a net.

Nets are net(x, t, label, sites=None): planner -> (B, N) logits; denoiser -> (B, N, V) logits, or (B, K, V) at sites.
"""

import math
from typing import NamedTuple

import torch

from diffusion.processes import from_self

FITS = {                        # what each kind of run can be sampled with
    "maskd": ("ddpd",),         # planner + mask denoiser
    "unid": ("ddpd",),          # planner + uniform denoiser
    "single": ("ddpd",),        # one uniform denoiser, its own planner
}
T_MIN, T_MAX = 1e-4, 1 - 1e-4   # the noise levels that networks are trained at


class State(NamedTuple):
    x: torch.Tensor             # (B, N) tokens after the step
    p_noise: torch.Tensor       # (B, N) in [0, 1]: the map by which its sites were chosen
    written: torch.Tensor       # (B, N) bool: the sites written in this step
    t: torch.Tensor             # (B,) noise level at which the denoiser was asked
    nfe: torch.Tensor           # (B,) network calls so far


def check_fit(kind, sampler):
    if sampler not in FITS[kind]:
        raise ValueError(f"sampler {sampler} does not fit a {kind} run; one of {', '.join(FITS[kind])} does")


def guided(net, x, t, label, sites, guidance, null_label):
    """unlabelled + guidance * (labelled - unlabelled), both in one batch (arXiv:2207.12598).  -> logits, calls

    guidance: a number, or one for each row, (B, 1)
    """
    where = () if sites is None else (sites,)
    if isinstance(guidance, float | int) and guidance == 1:
        return net(x, t, label, *where), 1
    twice = [torch.cat([y, y]) for y in (x, t, *where)]
    both = net(*twice[:2], torch.cat([label, torch.full_like(label, null_label)]), *twice[2:])
    with_label, without = both.clamp(-1e4, 1e4).chunk(2)                # two impossible ids have no difference
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.view(-1, *[1] * (both.dim() - 1)).to(both)
    return without + guidance * (with_label - without), 2


def ramp(guidance, t, is_ramped):
    """Guidance that grows from 1 with the share of noise gone, where it is ramped.  t (B, 1) -> (B, 1), or a number"""
    return 1 + (guidance - 1) * (1 - t) if is_ramped and guidance != 1 else guidance


def sharpen(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k and nucleus (top-p) truncation.  (..., V) -> (..., V)"""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_p, order = probs.sort(-1, descending=True)
        drop = sorted_p.cumsum(-1) - sorted_p >= top_p                  # the first one to reach top_p is kept
        probs = probs.masked_fill(drop.scatter(-1, order, drop), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs, generator):
    """One id from each distribution.  (..., V) -> (...)"""
    return probs.flatten(0, -2).multinomial(1, generator=generator).view(probs.shape[:-1])


def first_by(weight, generator):
    """Keys whose descending order is a draw without replacement in proportion to weight; zero weight has key 0.

    An exponential race in float64: float32 would cut its tails.  (b, N) -> (b, N)
    """
    race = torch.empty(weight.shape, dtype=torch.float64, device=weight.device).exponential_(generator=generator)
    return weight.double() / race


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
    check_ddpd(planner, n_steps=n_steps, schedule=schedule, k=k, pick=pick, denoiser_process=denoiser_process,
               vocab=vocab, stop=stop, refine=refine, temperature=temperature, top_k=top_k, top_p=top_p,
               is_guided=guidance != 1 or planner_guidance != 1, null_label=null_label)
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
            logits, calls = guided(denoiser, x[rows], t[rows], label[rows], None,
                                   ramp(guidance, t[rows], guidance_ramp), null_label)
            p, others = from_self(logits.float().softmax(-1), x[rows], t[rows])
        else:
            logits, calls = guided(planner, x[rows], t[rows], label[rows], None,
                                   ramp(planner_guidance, t[rows], guidance_ramp), null_label)
            p = logits.float().sigmoid()
        nfe[rows] += calls
        p = p * free[rows]                                              # (b, N)
        p_noise[rows] = p
        left, n_free = p.sum(1, keepdim=True), free[rows].sum(1, keepdim=True).clamp_min(1)     # (b, 1) expected noise
        if not is_leap:
            t[rows] = (left / n_free).clamp(T_MIN, T_MAX)               # solves 1 - alpha = mean p_noise
        if is_main:
            done[rows] = left[:, 0] < stop

        # 2. choose: keys in the order of choice, n_sites of them per sequence
        busy = (~done[rows] | (not is_main)).nonzero()[:, 0]            # of rows
        rows, p, left, n_free = rows[busy], p[busy], left[busy], n_free[busy]
        is_noise = torch.rand(p.shape, generator=generator, device=p.device) < p
        if is_leap:
            leaps = is_noise & (torch.rand(p.shape, generator=generator, device=p.device) < 1 / (n_steps - step))
            keys, n_sites = leaps.double(), leaps.sum(1)
        else:
            keys = first_by(p if pick == "proportional" else p / (1 - p).clamp_min(1e-12), generator)
            n_sites = how_many(schedule if is_main else "fixed", left[:, 0], k, n_steps - step)
            n_sites = n_sites.minimum((keys > 0).sum(1))

        # 3. write
        if len(rows):
            sites = keys.topk(max(1, int(n_sites.max()))).indices                               # (b, K)
            chosen = torch.arange(sites.shape[1], device=x.device) < n_sites[:, None]           # (b, K) bool
            where = torch.zeros_like(free[rows]).scatter(1, sites, chosen)                      # (b, N) bool
            if planner is None:
                logits = others[busy].gather(1, sites[..., None].expand(-1, -1, others.shape[-1])).log()
            else:
                seen = x[rows].masked_fill(is_noise | where, vocab) if denoiser_process == "mask" else x[rows]
                logits, calls = guided(denoiser, seen, t[rows], label[rows], sites,
                                       ramp(guidance, t[rows], guidance_ramp), null_label)
                nfe[rows] += calls
            new = draw(sharpen(logits.float(), temperature, top_k, top_p), generator)           # (b, K)
            x[rows] = x[rows].scatter(1, sites, torch.where(chosen, new, x[rows].gather(1, sites)))
            written[rows] = where
            clock[rows] = ((p * ~where).sum(1, keepdim=True) / n_free).clamp(T_MIN, T_MAX)      # what is left
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


def check_ddpd(planner, *, n_steps, schedule, k, pick, denoiser_process, vocab, stop, refine, temperature, top_k, top_p,
               is_guided, null_label):
    """Refuse, by name, arguments that mean nothing."""
    for name, value, choices in [("schedule", schedule, ("one", "fixed", "spread", "leap")),
                                 ("pick", pick, ("proportional", "softmax")),
                                 ("denoiser_process", denoiser_process, ("uniform", "mask"))]:
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")
    for name, value, is_good, rule in [("n_steps", n_steps, n_steps >= 1, "at least 1"), ("k", k, k >= 1, "at least 1"),
                                       ("stop", stop, stop >= 0, "not negative"),
                                       ("top_k", top_k, top_k >= 0, "not negative"),
                                       ("refine", refine, refine >= 0, "not negative"),
                                       ("temperature", temperature, temperature > 0, "above 0"),
                                       ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]")]:
        if not is_good:
            raise ValueError(f"{name} is {value}; it must be {rule}")
    if denoiser_process == "mask" and planner is None:
        raise ValueError("a mask denoiser cannot be its own planner: it says nothing of tokens that are not masked")
    if denoiser_process == "mask" and vocab is None:
        raise ValueError("denoiser_process mask needs vocab: the mask id is the vocabulary's size")
    if is_guided and null_label is None:
        raise ValueError("guidance needs null_label, the class that stands for no label")


def run(sampler, kind, nets, label, *, meta, generator, given=None, known=None, **options):
    """Sample a run's nets from pure noise, but for tokens given (B, N) where known (B, N).

    kind: key of FITS; label (B,); meta: the data's  ->  yields State
    """
    check_fit(kind, sampler)
    vocab, shape = meta["vocab"], (len(label), math.prod(meta["grid"]))
    x = torch.randint(vocab, shape, generator=generator, device=label.device)
    if known is not None:
        x = torch.where(known, given, x)
    process = "mask" if kind == "maskd" else "uniform"
    yield from ddpd(nets.get("planner"), nets["denoiser"], x, label, generator=generator, vocab=vocab, known=known,
                    denoiser_process=process, null_label=meta["n_classes"], **options)
