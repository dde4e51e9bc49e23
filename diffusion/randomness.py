"""Random numbers for samplers: from a torch.Generator, or from a stream for each sequence.

With streams a sample depends on the seed and on its own index alone: it is the same in any batch,
on any number of processes, and after an interruption.
"""

import math

import torch
from torch import Tensor


class Streams:
    """A stream of random numbers for each row of a batch: hashes of (key, number of the draw,
    position), by the finalizer of splitmix64 (Steele et al., 2014).

    index (B,) int64: the row's sequence, whose key is a hash of (seed, index)
    """

    def __init__(self, seed: int, index: Tensor):
        self.keys = mix(index + mix(torch.tensor(as_int64(seed), device=index.device)))
        self.n_draws = torch.zeros_like(index)
        self.rows = torch.arange(len(index), device=index.device)

    def of_rows(self, rows: Tensor) -> "Streams":
        """A view of the streams of some rows (b,): its draws advance these streams."""
        view = object.__new__(Streams)
        view.keys = self.keys
        view.n_draws = self.n_draws
        view.rows = self.rows[rows]
        return view

    def bits(self, shape: tuple[int, ...], n_bits: int) -> Tensor:
        """Integers in [0, 2^n_bits): each row's next draw.  -> int64 of this shape (b, ...)"""
        assert shape[0] == len(self.rows)
        self.n_draws[self.rows] += 1
        draw = mix(self.keys[self.rows] + GOLDEN * self.n_draws[self.rows])         # (b,)
        position = torch.arange(math.prod(shape[1:]), device=draw.device)
        hashed = mix(draw[:, None] + GOLDEN * position)
        return shift_right(hashed, 64 - n_bits).view(shape)


Random = torch.Generator | Streams


def of_rows(generator: Random, rows: Tensor) -> Random:
    """What these rows of the batch draw from; a torch.Generator has one stream for all rows."""
    return generator.of_rows(rows) if isinstance(generator, Streams) else generator


def uniform(
    shape: tuple[int, ...], generator: Random, device, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform in [0, 1).  shape (B, ...)"""
    if not isinstance(generator, Streams):
        return torch.rand(shape, dtype=dtype, generator=generator, device=device)
    n_bits = 24 if dtype == torch.float32 else 53           # so that none is rounded up to 1
    return generator.bits(shape, n_bits).to(dtype) / 2**n_bits


def exponential(shape: tuple[int, ...], generator: Random, device) -> Tensor:
    """Exponential with mean 1, float64.  shape (B, ...)"""
    if not isinstance(generator, Streams):
        empty = torch.empty(shape, dtype=torch.float64, device=device)
        return empty.exponential_(generator=generator)
    inside = (generator.bits(shape, 52).double() + 0.5) / 2**52                 # in (0, 1)
    return -inside.log()


def integers(high: int, shape: tuple[int, ...], generator: Random, device) -> Tensor:
    """Uniform in [0, high), int64.  shape (B, ...)"""
    if not isinstance(generator, Streams):
        return torch.randint(high, shape, generator=generator, device=device)
    return (uniform(shape, generator, device, torch.float64) * high).long()


# Hashing


def as_int64(unsigned: int) -> int:
    """The same 64 bits as a signed number, which is what tensors have."""
    unsigned %= 2**64
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


GOLDEN = as_int64(0x9E3779B97F4A7C15)
FACTORS = as_int64(0xBF58476D1CE4E5B9), as_int64(0x94D049BB133111EB)


def mix(z: Tensor) -> Tensor:
    """A bijection of 64 bits in which every bit depends on every other.  int64 -> int64"""
    z = (z ^ shift_right(z, 30)) * FACTORS[0]
    z = (z ^ shift_right(z, 27)) * FACTORS[1]
    return z ^ shift_right(z, 31)


def shift_right(z: Tensor, n: int) -> Tensor:
    """Shift in zeros, where >> would copy the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)
