"""Rollouts of Diffusion Forcing: frames that fall along a staircase of levels, and particles that steer them."""

import torch

from diffusion.draws import How, State, check, draw, free_of, guided, sharpen
from diffusion.processes import draw_posterior, noise_of, staircase


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
