"""Use from Python: sampling a trained run, and samplers around a stranger's networks."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

import methods
import train_ddpd
from diffusion import samplers
from support import runtime
from support.checkpoint import load_run

VOCAB = 17
LABEL = torch.tensor([3, 5])


# A trained run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8x8 digits, trained for two iterations, as loaded from its folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_ddpd.main(tiny_config("digits", "--max-iters", 2))
    return load_run(folder / "out" / "digits")


def sample_run(run, seed=0, **options):
    """The States of two samples in four steps."""
    rng = torch.Generator().manual_seed(seed)
    return list(methods.sample(run.spec, run.nets, LABEL, n_steps=4, generator=rng, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_weights_sample_the_same(run, dtype):
    """To the bit: what autocast would do in every call is done once."""
    frozen = run._replace(nets={name: copy.deepcopy(net) for name, net in run.nets.items()})
    runtime.freeze(frozen.nets, run.device, dtype)
    assert {p.dtype for p in frozen.nets["planner"].blocks.parameters()} == {getattr(torch, dtype)}
    assert frozen.nets["planner"].tok_emb.weight.dtype == torch.float32
    with runtime.autocast(run.device, dtype):
        for state, other in zip(sample_run(run), sample_run(frozen), strict=True):
            assert torch.equal(state.x, other.x) and torch.equal(state.p_noise, other.p_noise)


def test_a_loaded_run_says_what_it_is(run):
    assert run.it == 2
    assert run.spec.name == "ddpd-mask"
    assert run.spec.grid == [8, 8]
    assert run.spec.vocab == VOCAB
    assert run.spec.n_classes == 10
    assert list(run.nets) == ["planner", "denoiser"]
    assert not any(p.requires_grad for net in run.nets.values() for p in net.parameters())


def test_a_run_is_sampled(run):
    """sample is a generator of States; the x of the last one are the samples."""
    rng = torch.Generator().manual_seed(0)
    states = methods.sample(run.spec, run.nets, torch.tensor([3, 5]), n_steps=4, generator=rng)
    assert inspect.isgenerator(states)
    states = list(states)
    assert len(states) == 4
    for state in states:
        assert state.x.shape == state.p_noise.shape == state.written.shape == (2, 64)
        assert state.p_noise.min() >= 0 and state.p_noise.max() <= 1
    tokens = states[-1].x
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < VOCAB
    assert states[-1].nfe.tolist() == [8, 8]            # planner and denoiser


def test_samples_are_a_function_of_the_seed(run):
    tokens = sample_run(run)[-1].x
    assert torch.equal(tokens, sample_run(run)[-1].x)
    assert not torch.equal(tokens, sample_run(run, seed=1)[-1].x)


def test_last_is_the_last_state(run):
    states = iter(sample_run(run))
    assert torch.equal(samplers.last(states).x, sample_run(run)[-1].x)


def test_a_sampler_and_its_options_are_keywords(run):
    """Any sampler of the method, by name; one of another method is refused by name."""
    states = sample_run(run, sampler="ancestral", temperature=0.5)
    assert states[-1].nfe.tolist() == [4, 4]
    assert states[-1].x.max() < VOCAB
    with pytest.raises(ValueError, match="sampler rollout does not fit a ddpd-mask run"):
        sample_run(run, sampler="rollout")


def test_known_tokens_stay(run):
    """Inpainting: known says where, known_tokens says what."""
    known = (torch.arange(64) < 32).expand(2, -1)
    known_tokens = torch.full((2, 64), 7)
    for state in sample_run(run, known=known, known_tokens=known_tokens):
        assert (state.x[known] == 7).all()
        assert not state.written[known].any()
    assert not (state.x == 7).all()


# A stranger's networks, without any run


TARGET = torch.arange(64).expand(2, -1) % VOCAB         # what the stranger's network predicts


def planner(x, t, label, sites=None):
    """Noise is what differs from the target.  -> (B, N)"""
    return torch.where(x != TARGET[:len(x)], 20.0, -torch.inf)


def denoiser(x, t, label, sites=None):
    """The target, whatever it is shown.  -> (B, N, V), or (B, K, V) at sites"""
    logits = 50 * F.one_hot(TARGET[:len(x)], VOCAB).float()
    if sites is None:
        return logits
    return logits.gather(1, sites[..., None].expand(-1, -1, VOCAB))


class Bigger(torch.nn.Module):
    """A module of somebody else's, with the same signature."""

    def forward(self, x, t, label, sites=None):
        return denoiser(x, t, label, sites)


@pytest.mark.parametrize("net", [denoiser, Bigger()], ids=["function", "module"])
def test_ddpd_takes_any_networks(net, rng):
    """It reaches the target from uniform noise, writes only noise, and counts every call."""
    x = torch.randint(VOCAB, (2, 64), generator=rng)
    n_noise = (x != TARGET).sum(1)
    states = list(samplers.ddpd(planner, net, x, LABEL, n_steps=8, generator=rng))
    assert torch.equal(states[-1].x, TARGET)
    n_written = sum(state.written.sum(1) for state in states)
    assert torch.equal(n_written, n_noise)
    assert states[-1].nfe.max() <= 16


def test_ddpd_takes_one_network_as_both(rng):
    """Without a planner, P(noise) follows from the denoiser's x0-prediction."""
    x = torch.randint(VOCAB, (2, 64), generator=rng)
    final = samplers.last(samplers.ddpd(None, denoiser, x, LABEL, n_steps=32, generator=rng))
    assert torch.equal(final.x, TARGET)
    assert final.nfe.tolist() == [32, 32]


@pytest.mark.parametrize("net", [denoiser, Bigger()], ids=["function", "module"])
@pytest.mark.parametrize("process", ["mask", "uniform"])
def test_ancestral_takes_any_network(process, net, rng):
    """It reaches the target from pure noise of either process, one call in a step."""
    if process == "mask":
        x = torch.full((2, 64), VOCAB)
    else:
        x = torch.randint(VOCAB, (2, 64), generator=rng)
    options = dict(process=process, vocab=VOCAB, kind="others")
    states = list(samplers.ancestral(net, x, LABEL, n_steps=8, generator=rng, **options))
    assert len(states) == 8
    assert torch.equal(states[-1].x, TARGET)
    assert states[-1].nfe.tolist() == [8, 8]


def test_a_strangers_networks_can_stand_in_for_a_runs(run):
    """methods.sample takes any callables under the names of the method's networks."""
    nets = {"planner": planner, "denoiser": denoiser}
    rng = torch.Generator().manual_seed(0)
    states = methods.sample(run.spec, nets, LABEL, n_steps=8, generator=rng)
    assert torch.equal(samplers.last(states).x, TARGET)
