"""What the tests know exactly: tiny worlds with exact networks, oracles, and Specs of tiny runs."""

import dataclasses

import torch
import torch.nn.functional as F

import config
import methods
from diffusion.processes import Noise, transition_probs


class World:
    """All sequences (S, N) of a data law with their probabilities q (S,), under a forward process.

    Its networks are exact: posteriors by enumeration of the sequences, in float64.
    """

    def __init__(self, points, q, vocab, noise=None):
        self.points = points
        self.q = q.double() / q.sum()
        self.vocab = vocab
        self.noise = noise or Noise("uniform", vocab)

    def under(self, process, p_uniform=0.0):
        """The same data under another forward process."""
        return World(self.points, self.q, self.vocab, Noise(process, self.vocab, p_uniform))

    def likelihood(self, x, t):
        """q(x_d | x0_d) of each token and sequence, 1 at masks.  x (B, N), t (B, 1) -> (B, S, N)"""
        keep, _, redraw = (p.double()[:, None] for p in transition_probs(t.double(), self.noise))
        is_hit = x[:, None] == self.points
        like = torch.where(is_hit, keep + redraw / self.vocab, redraw / self.vocab)
        return torch.where(x[:, None] == self.vocab, 1.0, like)

    def posterior(self, x, t):
        """p(sequence | x_t).  -> (B, S)"""
        joint = self.likelihood(x, t).prod(-1) * self.q
        return joint / joint.sum(1, keepdim=True).clamp_min(1e-300)

    def planner(self, x, t, label, sites=None):
        """Logits of p(noise | x_t) under uniform noise.  -> (B, N)"""
        t = t.double()
        p_kept_if_hit = (1 - t) / (1 - t + t / self.vocab)
        is_hit = (x[:, None] == self.points).double()
        p_hit = torch.einsum("bs,bsn->bn", self.posterior(x, t), is_hit)
        return torch.logit(1 - p_kept_if_hit * p_hit)

    def x0_denoiser(self, x, t, label, sites=None):
        """The x0-prediction: log p(x0_d | x_t), which has seen the token itself.  -> (B, N, V)"""
        one_hot = F.one_hot(self.points, self.vocab).double()
        return torch.einsum("bs,snv->bnv", self.posterior(x, t), one_hot).log()

    def denoiser(self, x, t, label, sites=None):
        """The leave-one-out prediction: log p(x0_d | all other tokens).  -> (B, N or K, V)"""
        log_like = self.likelihood(x, t).clamp_min(1e-300).log()
        log_others = log_like.sum(-1, keepdim=True) - log_like + self.q.log()[:, None]  # (B, S, N)
        weight = (log_others - log_others.amax(1, keepdim=True)).exp()
        if sites is None:
            sites = torch.arange(x.shape[1]).expand(len(x), -1)
        out = torch.full((*sites.shape, self.vocab), -torch.inf, dtype=torch.float64)
        for i, point in enumerate(self.points):     # sequences that share a token add up
            token = point[sites][..., None]         # (B, K, 1)
            log_weight = weight[:, i].gather(1, sites)[..., None].log()
            out.scatter_(-1, token, torch.logaddexp(out.gather(-1, token), log_weight))
        return out

    def sample(self, n, generator):
        """n sequences of the data law.  -> (n, N)"""
        return self.points[torch.multinomial(self.q, n, replacement=True, generator=generator)]

    def entropy(self):
        """Bits per token of the data: the negative log-likelihood of the exact networks."""
        return -(self.q * self.q.log2()).sum().item() / self.points.shape[1]

    def distance(self, x):
        """Total variation between the law of samples x (B, N) and the data's."""
        is_point = (x[:, None] == self.points).all(-1)
        index = torch.where(is_point.any(1), is_point.float().argmax(1), len(self.points))
        share = torch.bincount(index, minlength=len(self.points) + 1).double() / len(x)
        return (share - torch.cat([self.q, torch.zeros(1)])).abs().sum().item() / 2


def dense(seed=0):
    """Three tokens of three values, all 27 sequences, unequal."""
    q = torch.rand(27, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return World(torch.cartesian_prod(*[torch.arange(3)] * 3), q, 3)


def sparse(seed=0):
    """Three tokens of two values each out of 2,000: noise is easy to recognise."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(2000, generator=generator)[:6].view(3, 2)
    q = torch.rand(8, generator=generator, dtype=torch.float64) ** 2
    return World(torch.cartesian_prod(*values), q, 2000)


class Table:
    """A network of a dense world, run once on all states and looked up; all rows share one t."""

    def __init__(self, world, net):
        self.net = net
        n_tokens = world.points.shape[1]
        n_ids = world.vocab + 1         # masks too
        self.states = torch.cartesian_prod(*[torch.arange(n_ids)] * n_tokens)
        self.place_value = n_ids ** torch.arange(n_tokens - 1, -1, -1)

    def __call__(self, x, t, label, sites=None):
        assert (t == t[:1]).all()
        n_states = len(self.states)
        of_states = self.net(self.states, t[:1].expand(n_states, -1), label[:1].expand(n_states))
        out = of_states[(x * self.place_value).sum(1)]
        return out if sites is None else at_sites(out, sites)


class Oracle:
    """Networks that know x0: the planner says where x differs from it, the denoiser what it is.

    Labels are rows of x0, since a sampler asks for some of its sequences only.
    """

    def __init__(self, x0, vocab):
        self.x0 = x0
        self.vocab = vocab
        self.calls = 0

    def planner(self, x, t, label, sites=None):
        self.calls += 1
        return torch.where(x != self.x0[label], torch.inf, -torch.inf)

    def denoiser(self, x, t, label, sites=None):
        self.calls += 1
        logits = F.one_hot(self.x0[label], self.vocab).float().log()
        return logits if sites is None else at_sites(logits, sites)


def at_sites(logits, sites):
    """logits (B, N, V), sites (B, K) -> (B, K, V)"""
    return logits.gather(1, sites[..., None].expand(-1, -1, logits.shape[-1]))


def marginal(probs, t, noise):
    """q_t(. | p) = P(keep) p + P(mask) [mask] + P(redraw) / V.  probs (B, N, V) -> (B, N, V + 1)"""
    keep, mask, redraw = (p[..., None] for p in transition_probs(t, noise))
    tokens = keep * probs + redraw / noise.vocab
    return torch.cat([tokens, mask.expand(*probs.shape[:-1], 1)], -1)


METHOD_FLAGS = {
    "ddpd-mask": dict(denoiser_process="mask"),
    "ddpd-trunk": dict(nets="trunk"),
    "masked": dict(nets="denoiser"),
    "ddpd-uniform": dict(denoiser_process="uniform"),
    "ddpd-single": dict(nets="single", denoiser_process="uniform"),
    "gidd": dict(method="gidd"),
    "forcing": dict(method="forcing"),
}


def tiny_spec(name, grid=(4, 4), vocab=7, n_classes=3, **flags):
    """The Spec of a run of a method: one block of width 16, unless the flags say otherwise."""
    sizes = dict(n_layer=1, n_head=1, n_embd=16, base_width=16)
    cfg = config.Config(**METHOD_FLAGS[name] | sizes | flags)
    meta = dict(grid=list(grid), vocab=vocab, n_classes=n_classes, given=[])
    spec = methods.spec_of(dataclasses.asdict(cfg), meta)
    assert spec.name == name
    return spec
