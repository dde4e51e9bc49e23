"""A world small enough to know everything about: all sequences with their probabilities, and its exact networks."""

import torch

from diffusion.processes import fates


class World:
    """Support points (S, N) in [0, V) with probabilities q (S,); posteriors by enumeration, in float64."""

    def __init__(self, points, q, vocab, process="uniform", p_uniform=0.1):
        self.points, self.q, self.vocab = points, q.double() / q.sum(), vocab
        self.process, self.p_uniform = process, p_uniform

    def under(self, process, p_uniform=0.1):
        """The same data under another forward process."""
        return World(self.points, self.q, self.vocab, process, p_uniform)

    def likelihood(self, x, t):
        """p(x_d | x0_d); masks (id V) say nothing.  x (B, N), t (B, 1) -> (B, S, N)"""
        keep, _, uniform = (y.double()[:, None] for y in fates(t.double(), self.process, self.p_uniform))
        like = torch.where(x[:, None] == self.points, keep + uniform / self.vocab, uniform / self.vocab)
        return torch.where(x[:, None] == self.vocab, torch.ones_like(like), like)

    def self_denoiser(self, x, t, label, sites=None):
        """log p(x0_d | x_t), the token itself among what is seen, (B, N, V)"""
        joint = self.likelihood(x, t).prod(-1) * self.q
        joint = joint / joint.sum(1, keepdim=True).clamp_min(1e-300)
        hot = torch.nn.functional.one_hot(self.points, self.vocab).double()
        return torch.einsum("bs,snv->bnv", joint, hot).log()

    def planner(self, x, t, label, sites=None):
        """logits of p(noise | x_t), (B, N)"""
        joint = self.likelihood(x, t).prod(-1) * self.q
        joint = joint / joint.sum(1, keepdim=True)
        kept = (1 - t.double()) / (1 - t.double() + t.double() / self.vocab)
        p_noise = 1 - kept * torch.einsum("bs,bsn->bn", joint, (x[:, None] == self.points).double())
        return torch.logit(p_noise)

    def denoiser(self, x, t, label, sites=None):
        """log p(x0_d | all tokens but d), (B, N, V) or (B, K, V)"""
        log_like = self.likelihood(x, t).clamp_min(1e-300).log()
        log_others = log_like.sum(-1, keepdim=True) - log_like + self.q.log()[:, None]  # (B, S, N)
        weight = (log_others - log_others.amax(1, keepdim=True)).exp()
        if sites is None:
            sites = torch.arange(x.shape[1]).expand(len(x), -1)
        out = torch.full((*sites.shape, self.vocab), -torch.inf, dtype=torch.float64)
        for i in range(len(self.points)):  # points that share a value add up
            value = self.points[i][sites][..., None]  # (B, K, 1)
            w = weight[:, i].gather(1, sites)[..., None].log()
            out.scatter_(-1, value, torch.logaddexp(out.gather(-1, value), w))
        return out

    def codes(self, x):
        """Index of each sequence among the points, S where it is none of them.  (B, N) -> (B,)"""
        hit = (x[:, None] == self.points).all(-1)
        return torch.where(hit.any(1), hit.float().argmax(1), len(self.points))

    def distance(self, x):
        """Total variation between the samples' law and the world's."""
        share = torch.bincount(self.codes(x), minlength=len(self.points) + 1).double() / len(x)
        return (share - torch.cat([self.q, torch.zeros(1)])).abs().sum().item() / 2


def dense(seed=0):
    """Three tokens of three values, all 27 sequences, unequal."""
    q = torch.rand(27, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return World(torch.cartesian_prod(*[torch.arange(3)] * 3), q, 3)


def sparse(seed=0):
    """Three tokens of two values each out of 2,000: noise is easy to recognise."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randperm(2000, generator=g)[:6].view(3, 2)
    return World(torch.cartesian_prod(*values), torch.rand(8, generator=g, dtype=torch.float64) ** 2, 2000)


class Table:
    """The same network for a dense world and the same levels in all rows: asked once per state, then looked up."""

    def __init__(self, world, net):
        self.world, self.net = world, net
        n = world.points.shape[1]
        self.states = torch.cartesian_prod(*[torch.arange(world.vocab + 1)] * n)  # masks too
        self.place = (world.vocab + 1) ** torch.arange(n - 1, -1, -1)

    def __call__(self, x, t, label, sites=None):
        assert (t == t[:1]).all()
        known = self.net(self.states, t[:1].expand(len(self.states), -1), label[:1].expand(len(self.states)))
        out = known[(x * self.place).sum(1)]
        return out if sites is None else out.gather(1, sites[..., None].expand(-1, -1, out.shape[-1]))
