"""Samplers: generators that yield a State after each step: a video is a `for`, and any callable can stand in for a net.

Nets are net(x, t, label, sites=None): planner -> (B, N) logits; denoiser -> (B, N, V) logits, or (B, K, V) at sites.
"""

import inspect
import math

import torch

from diffusion.draws import How, State, check, draw, fill, first_by, free_of, guided, mask_of, sharpen, top
from diffusion.processes import T_MAX, T_MIN, draw_posterior, from_others, from_self, noise_of
from diffusion.rollouts import rollout, staircase_of

FITS = {                                                # what each kind of run can be sampled with
    "maskd": ("ddpd", "ancestral", "confidence", "remdm"),  # planner + mask denoiser; ddpd alone uses the planner
    "unid": ("ddpd", "ancestral"),                      # planner + uniform denoiser
    "single": ("ddpd", "ancestral"),                    # one uniform denoiser, its own planner
    "gidd": ("ancestral", "self_correct"),              # one denoiser of hybrid noise, which can mend what is finished
    "forcing": ("rollout", "ancestral"),                # one denoiser that is told the noise level of each token
}


def check_fit(kind, sampler):
    if sampler not in FITS[kind]:
        raise ValueError(f"sampler {sampler} does not fit a {kind} run; one of {', '.join(FITS[kind])} does")


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


def options_of(sampler):
    """Names of a sampler's arguments that a user may set."""
    return [*inspect.signature(globals()[sampler]).parameters, *["lag"] * (sampler == "rollout")]


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
