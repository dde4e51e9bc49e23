"""Tensors stay on one device: training, sampling and judging on a device that is pretended, so
that a machine without a GPU finds what would fail on one."""

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from pretend import pretended_device
from torch import Tensor
from world import tiny_spec

import config
import evaluate
import methods
import support.judged
import support.validate
import train_ddpd
from sources import maze
from support import chunked_head, diagnostics, runtime, sampling
from support.training import Training, build_training, open_data, tasks_of
from support.validate import validate

N_ROWS = 6
N_STEPS = 3
VOCAB = 7
VIDEO = (4, 2, 2)


@pytest.fixture(scope="module", params=["xpu", "mps"])
def name_of_device(request):
    """As CUDA is, and as an Apple GPU is, without float64."""
    return request.param


@pytest.fixture
def device(name_of_device):
    with pretended_device(name_of_device) as device:
        yield device


# The pretended device itself


def other_generator(x: Tensor) -> torch.Generator:
    return torch.Generator("cpu" if x.device.type != "cpu" else "xpu")


MIXED = {
    "sum": lambda x, y: x + y,
    "sum with a number of the device": lambda x, y: x[0, 0] + y,
    "matrix product": lambda x, y: y @ x.T,
    "stack": lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    "where": lambda x, y: torch.where(y > 0, x, 0.0),
    "gather": lambda x, y: x.gather(1, y.long()),
    "gather by the device": lambda x, y: y.gather(1, x.long()),
    "index of the device": lambda x, y: y[x[0].long()],
    "mask of the device": lambda x, y: y[x > 0],
    "assignment at a mask": lambda x, y: x.masked_scatter_(x > 0, y),
    "assignment at indices": lambda x, y: x.index_put_((x[0].long(),), y[0]),
    "written number": lambda x, y: y[0, 0].add_(x[0, 0]),
    "out": lambda x, y: torch.mul(x, x, out=y),
    "array": lambda x, y: x.numpy(),
    "array by numpy": lambda x, y: np.asarray(x),
    "gradient": lambda x, y: (x.requires_grad_() ** 2).sum(1).backward(torch.ones(2)),
    "embedding": lambda x, y: torch.nn.Embedding(4, 2)(x.long()),
}
DRAWS = {
    "rand": lambda device, rng: torch.rand(2, 2, generator=rng, device=device),
    "randint": lambda device, rng: torch.randint(5, (2,), generator=rng, device=device),
    "randperm": lambda device, rng: torch.randperm(5, generator=rng, device=device),
    "multinomial": lambda device, rng: torch.ones(5, device=device).multinomial(1, generator=rng),
    "exponential_": lambda device, rng: torch.ones(5, device=device).exponential_(generator=rng),
    "normal_": lambda device, rng: torch.ones(5, device=device).normal_(generator=rng),
}
ALLOWED = {
    "number of the CPU": lambda x, y: x * y[0, 0],
    "where with numbers": lambda x, y: torch.where(x > 0, y[0, 0], x),
    "masked_fill": lambda x, y: x.masked_fill(x > 0, y[0, 0]),
    "index of the CPU": lambda x, y: x[y[0].long()],
    "mask of the CPU": lambda x, y: x[y > 0],
    "copy": lambda x, y: x.copy_(y),
    "move": lambda x, y: y.to(x.device) + y.to(x),
    "torch.tensor": lambda x, y: torch.tensor([1.0, 2.0], device=x.device) + x,
    "from numpy": lambda x, y: torch.from_numpy(y.numpy()).to(x.device) + x,
    "new_zeros": lambda x, y: x.new_zeros(2) + torch.zeros_like(x),
}


def pair_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the device and of the CPU, both [[0, 1], [1, 0]]."""
    return torch.eye(2, device=device).flip(0), torch.eye(2).flip(0)


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(name, device):
    with pytest.raises(RuntimeError, match=r"one device|no array"):
        MIXED[name](*pair_on(device))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_is_allowed(name, device):
    """The result is on the device, and as on the CPU."""
    x, y = pair_on(device)
    out = ALLOWED[name](x, y)
    assert out.device == device
    assert torch.equal(out.cpu(), ALLOWED[name](y.clone(), y))


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_draws_on_its_own_device_alone(name, device):
    draw = DRAWS[name]
    on_device = draw(device, torch.Generator(device).manual_seed(1))
    assert on_device.device == device
    assert torch.equal(on_device.cpu(), draw("cpu", torch.Generator().manual_seed(1)))
    with pytest.raises(RuntimeError, match=rf"a generator on {device}, but that of .* is on cpu"):
        draw(device, torch.Generator())
    with pytest.raises(RuntimeError, match=rf"a generator on cpu, but that of .* is on {device}"):
        draw("cpu", torch.Generator(device))


DOUBLES = {
    "made": lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
    "from numpy": lambda x: torch.from_numpy(np.zeros(2)).to(x.device),
    "cast": lambda x: x.double(),
    "cast in a move": lambda x: x.to("cpu", torch.float64),
    "sum": lambda x: x.sum(dtype=torch.float64),
}


@pytest.mark.parametrize("name", DOUBLES)
def test_an_apple_gpu_has_no_float64(name):
    """float32 leaves it first, and is cast then."""
    with pretended_device("mps") as device:
        x, y = pair_on(device)
        with pytest.raises(TypeError, match="does not support float64"):
            DOUBLES[name](x)
        assert x.cpu().double().dtype == torch.float64
        assert y.double().to(device, torch.float32).device == device


def test_numbers_and_arrays_are_read_by_way_of_the_cpu(device):
    x, y = pair_on(device)
    assert x.tolist() == y.tolist()
    assert x[0, 1].item() == float(x.sum()) - 1 == 1
    assert f"{x.sum():.2f}" == "2.00"
    assert x.cpu().device.type == "cpu"
    assert x.cpu().numpy().sum() == 2


# Training

IMAGE_ROWS = [
    ("ddpd-mask", {}),
    ("ddpd-trunk", {}),
    ("ddpd-trunk", dict(trunk_grad=0.5)),
    ("masked", {}),
    ("ddpd-uniform", {}),
    ("ddpd-single", {}),
    ("gidd", {}),
    ("gidd", dict(weight="elbo", clean_token_rate=0.5)),
    ("forcing", dict(noise_granularity="token")),
    ("forcing", dict(noise_granularity="token", process="mask", weight="dynamic")),
]
VIDEO_ROWS = [
    ("forcing", dict(grid=VIDEO)),
    ("forcing", dict(grid=VIDEO, causal=True, weight="dynamic")),
    ("forcing", dict(grid=VIDEO, noise_granularity="shared", process="uniform", context_frames=1)),
    ("forcing", dict(grid=VIDEO, noise_granularity="next")),
]
all_rows = pytest.mark.parametrize(
    "name, flags", IMAGE_ROWS + VIDEO_ROWS,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)


def test_every_method_has_a_row():
    assert {name for name, _ in IMAGE_ROWS} == set(methods.METHODS)


def training_on(device: str | torch.device, spec: methods.Spec) -> Training:
    """The start of a run, but for weights that are not zero: all of them have gradients."""
    training = build_training(config.Config(**spec.config), spec, None, torch.device(device))
    rng = torch.Generator("cpu").manual_seed(1)
    for net in training.nets.values():
        for p in net.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=rng).to(device))
    return training


def nets_on(device: torch.device, spec: methods.Spec) -> dict[str, torch.nn.Module]:
    nets = training_on(device, spec).nets
    return {name: net.requires_grad_(False) for name, net in nets.items()}


def batch_of(spec: methods.Spec) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and known tokens, the first half, on the CPU."""
    rng = torch.Generator("cpu").manual_seed(2)
    x0 = torch.randint(VOCAB, (N_ROWS, spec.shape.n_tokens), generator=rng)
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, : x0.shape[1] // 2] = True
    return x0, torch.arange(N_ROWS) % 3, known


def train_step(device: str | torch.device, spec: methods.Spec) -> tuple[Training, Tensor, list]:
    """As in train_ddpd.train.  -> training, losses, gradients"""
    device = torch.device(device)
    cfg = config.Config(**spec.config | dict(dtype="float32"))
    training = training_on(device, spec)
    rng = torch.Generator("cpu").manual_seed(3)
    tasks = tasks_of(cfg, spec, training.ema["denoiser"], *batch_of(spec), rng)
    learners = train_ddpd.learners_of(cfg, training, runtime.World(0, 1, device))
    losses = train_ddpd.backward(cfg, learners, tasks, device, is_last=True)
    gradients = [p.grad.clone() for net in training.nets.values() for p in net.parameters()]
    train_ddpd.update_weights(cfg, training)
    return training, losses, gradients


@pytest.mark.parametrize("logits_per_chunk", [2**25, 20], ids=["whole", "chunks"])
@all_rows
def test_a_training_step(name, flags, logits_per_chunk, device, monkeypatch):
    """Losses and gradients are those of the CPU; weights and averages move on the device."""
    monkeypatch.setattr(chunked_head, "LOGITS_PER_CHUNK", logits_per_chunk)
    spec = tiny_spec(name, vocab=VOCAB, **flags)
    training, losses, gradients = train_step(device, spec)
    assert losses.device == device
    for nets in (training.nets, training.ema):
        for net in nets.values():
            assert all(p.device == device for p in net.parameters())
    for key, net in training_on(device, spec).nets.items():
        pairs = zip(net.parameters(), training.nets[key].parameters(), strict=True)
        assert all((before != after).any() for before, after in pairs), key
    _, losses_on_cpu, gradients_on_cpu = train_step("cpu", spec)
    torch.testing.assert_close(losses.cpu(), losses_on_cpu)
    for gradient, on_cpu in zip(gradients, gradients_on_cpu, strict=True):
        torch.testing.assert_close(gradient.cpu(), on_cpu, rtol=1e-3, atol=1e-5)


# Sampling

OPTIONS = {
    "ddpd": [
        dict(schedule="one", pick="softmax"), dict(schedule="fixed", k=2, refine=2),
        dict(schedule="leap"), dict(stop=3.0, planner_guidance=1.5),
    ],
    "ancestral": [],
    "confidence": [
        dict(order="random", schedule="cosine"), dict(temperature_end=0.5, schedule="linear"),
    ],
    "remdm": [dict(remask=remask) for remask in ("confidence", "rescale", "cap")],
    "planned": [dict(trust=0.0, eta=0.3), dict(trust=2.0, order="confidence")],
    "p2": [dict(eta=0.0), dict(eta=2.0, schedule="cosine")],
    "self_correct": [dict(k=2, t=0.3), dict(patience=1, temperature=1.0)],
    "rollout": [dict(stabilization_level=0.02, context_level=0.05), dict(lag=1)],
}
LONG = [dict(frames=7), dict(frames=2), dict(frames=6, lag=0), dict(frames=6, lag=2)]    # of VIDEO
GENERAL = dict(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, guidance=2.0)
STEERED = dict(particles=2, reward_weight=3.0, n_draws=2)


def variants_of(name: str, flags: dict, sampler: str) -> Iterator[tuple[dict, bool]]:
    """Options that the sampler has in this method, and whether some tokens are known."""
    known_options = methods.options_of(methods.METHODS[name].samplers[sampler])
    general = {key: value for key, value in GENERAL.items() if key in known_options}
    for is_known in (False, True):
        yield {}, is_known
        yield general, is_known
    special = OPTIONS[sampler]
    if sampler == "rollout":
        special = [*special, *(LONG if "grid" in flags else []), STEERED]
    for options in special:
        is_planner_missing = name == "ddpd-single" and "planner_guidance" in options
        is_level_unknown = flags.get("process") == "mask" and "context_level" in options
        if not is_planner_missing and not is_level_unknown:
            yield options, True


CASES = [
    (name, flags, sampler, options, is_known)
    for name, flags in IMAGE_ROWS + VIDEO_ROWS[:3]
    for sampler in methods.METHODS[name].samplers
    for options, is_known in variants_of(name, flags, sampler)
]


def id_of_case(case: tuple) -> str:
    name, flags, sampler, options, is_known = case
    words = [name, *flags.values(), sampler, *options, *["known"] * is_known]
    return "-".join(map(str, words))


def reward(x: Tensor) -> Tensor:
    return (x == 0).float().sum(1)


# What differs on an Apple GPU is how networks are asked
CASES_OF_APPLE = [
    case for case in CASES
    if (case[-1] and case[-2].keys() <= GENERAL.keys()) or "particles" in case[-2]
]


@pytest.mark.parametrize("case", CASES, ids=id_of_case)
def test_a_sampler(case):
    with pretended_device() as device:
        sample_and_check(case, device, device)


@pytest.mark.parametrize("case", CASES_OF_APPLE, ids=id_of_case)
def test_a_sampler_on_an_apple_gpu(case):
    with pretended_device("mps") as device:
        sample_and_check(case, device, torch.device("cpu"))


def sample_and_check(case: tuple, device: torch.device, home: torch.device) -> None:
    """All of its States are at home; samples are tokens; known ones stay."""
    name, flags, sampler, options, is_known = case
    spec = tiny_spec(name, vocab=VOCAB, **flags)
    options = dict(options)
    x0, label, known = batch_of(spec)
    if "particles" in options:
        options["reward"] = reward
        x0, label = (y.repeat_interleave(2, 0)[:N_ROWS] for y in (x0, label))
    if "frames" in options:
        n_tokens = options["frames"] * spec.shape.frame_size
        x0 = x0.repeat(1, 2)[:, :n_tokens]
        known = torch.arange(n_tokens).expand(x0.shape) < spec.shape.frame_size
    if is_known or sampler == "self_correct":
        options["known_tokens"] = x0.to(home)
    if is_known:
        options["known"] = known.to(home)
    rng = runtime.generator("test", device=home)
    states = list(methods.sample(
        spec, nets_on(device, spec), label.to(home), sampler=sampler, n_steps=N_STEPS,
        generator=rng, **options,
    ))
    for state in states:
        assert all(y.device == home for y in state)
    x = states[-1].x.cpu()
    assert 0 <= x.min() and x.max() < VOCAB
    if is_known:
        assert torch.equal(x[known], x0[known])


# Bounds, validation, evaluation


@pytest.mark.parametrize("n_distinct", [0, 2])
@all_rows
def test_bits_per_token(name, flags, n_distinct, device):
    """Finite, and as on the CPU: the noise is drawn there."""
    spec = tiny_spec(name, vocab=VOCAB, **flags)
    x0, label, known = batch_of(spec)

    def bits_on(device):
        batch = (y.to(runtime.device_of_doubles(device)) for y in (x0, label, known))
        rng = torch.Generator("cpu").manual_seed(4)
        return methods.bits_per_token(
            spec, nets_on(device, spec), *batch, rng, n_distinct=n_distinct
        )

    bits = bits_on(device)
    assert bits
    for name_of_bound, pair in bits_on(torch.device("cpu")).items():
        assert bits[name_of_bound] == pytest.approx(pair, rel=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, name_of_device):
    """Runs of two iterations, trained, validated and sampled on the pretended device."""
    folder = tmp_path_factory.getbasetemp() / "test_devices" / name_of_device
    folder.mkdir(parents=True, exist_ok=True)
    video = ["--method", "forcing", "--data", "bounce", "--context-frames", 2]
    flags = {
        "pair": [],
        "on_policy": ["--on-policy", 0.5],
        "single": ["--nets", "single", "--denoiser-process", "uniform"],
        "gidd": ["--method", "gidd"],
        "video": [*video, "--eval-sequences", 4],
    }
    with pretended_device(name_of_device) as device, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runtime, "pick_device", lambda *rank: device)
        patch.setattr(support.validate, "N_STEPS", 2)
        patch.setattr(support.validate, "N_STEPS_PER_FRAME", 1)
        for name, of_run in flags.items():
            for n_iters in (1, 2):
                train_ddpd.main(tiny_config(name, *of_run, "--max-iters", n_iters))
    return {name: folder / "out" / name for name in flags}


def test_a_run_is_trained_validated_and_resumed(runs, name_of_device):
    for run in runs.values():
        lines = (run / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        assert [row["device"] for row in log if "device" in row] == [f"{name_of_device}:0"] * 2
        assert sum("denoiser_loss" in row for row in log) == 2
        bits = [value for row in log for key, value in row.items() if "_bits_" in key]
        assert bits and all(map(math.isfinite, bits))
        assert (run / "samples.png").exists()


def test_validation_in_chunks(runs, device, monkeypatch):
    """As in one piece."""
    cfg = tiny_config("pair")
    spec, splits = open_data(cfg)
    nets = nets_on(device, spec)
    whole = validate(cfg, spec, nets, splits["val"], device, cfg.eval_sequences)
    monkeypatch.setattr(chunked_head, "LOGITS_PER_CHUNK", 2000)
    in_chunks = validate(cfg, spec, nets, splits["val"], device, cfg.eval_sequences)
    assert in_chunks["val_planner_bce"] == pytest.approx(whole["val_planner_bce"], abs=1e-4)
    assert in_chunks["val_denoiser_ce"] == pytest.approx(whole["val_denoiser_ce"], abs=1e-4)


@pytest.fixture
def judged(runs, device, monkeypatch):
    """-> a function: name of a run -> Judged, its networks on the device"""
    monkeypatch.setattr(support.judged, "N_BITS", 16)
    monkeypatch.setattr(support.judged, "N_BITS_VIDEO", 16)
    return lambda name: evaluate.Judged(runs[name], device)


@pytest.mark.parametrize("name", ["pair", "single", "gidd", "video"])
def test_a_run_is_judged(name, judged):
    """Bits of held-out data, and samples as an array, with given frames where it is a video."""
    judged = judged(name)
    assert judged.run.nets["denoiser"].head.weight.device == judged.run.device
    for bits, error in judged.bits().values():
        assert math.isfinite(bits) and math.isfinite(error)
    flags = evaluate.Flags(runs=(), n=6, frames=10 if name == "video" else 0)
    labels, _, known_tokens, known = judged.held_out(flags)
    sampler = next(iter(judged.spec.method.samplers))
    options = dict(n_steps=2, guidance=1.5)
    if name == "video":
        options["frames"] = 10
    request = sampling.Request(sampler, options, 0, labels, known_tokens, known)
    tokens, nfe, _, moments = sampling.draw_batch(judged.run, request, range(6), n_recorded=2)
    assert len(tokens) == 6 and tokens.max() < judged.spec.vocab
    assert (nfe > 0).all() and moments[-1].x.shape[0] == 2
    if known is not None:
        assert (tokens == known_tokens)[known].all()


def test_particles_of_mazes(device, monkeypatch):
    """A run on data with known tokens, and the experiment whose reward reads samples."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import forcing

    monkeypatch.setattr(runtime, "pick_device", lambda *rank: device)
    sizes = {(maze, "N_TRAIN"): 40, (maze, "N_VAL"): 20, (forcing, "N_GUIDED"): 3}
    sizes |= {(forcing, "PARTICLES"): 2, (forcing, "GUIDED_STEPS"): 2}
    for (module, name), size in sizes.items():
        monkeypatch.setattr(module, name, size)
    flags = ["--data", "maze", "--method", "forcing", "--noise-granularity", "token"]
    train_ddpd.main(tiny_config("maze", *flags, "--max-iters", 1, "--eval-samples", 0))
    rows = []
    monkeypatch.setattr(forcing, "choose_cells", lambda rate: np.arange(len(rate)))
    monkeypatch.setattr(forcing, "add_row", lambda data, row: rows.append(row))
    forcing.guide(evaluate.Judged("out/maze", device))
    assert [row["sampler"] for row in rows] == ["rollout", "particles"]


@pytest.mark.parametrize("name", ["pair", "single"])
def test_a_planner_is_judged(name, judged):
    judged = judged(name)
    x0, label = (torch.from_numpy(y) for y in judged.splits["val"].spread_subset(10))
    predictions = diagnostics.planner_predictions(judged.run, x0, label, batch=4)
    for part in ("corrupted", "in use"):
        assert predictions[part].shape == (3, 10 * 64)
        assert np.isfinite(predictions[part]).all()


def test_an_apple_gpu_compiles_nothing():
    with pretended_device("mps") as device:
        training = training_on(device, tiny_spec("gidd"))
        cfg = config.Config(compile=True)
        with pytest.raises(SystemExit, match="leave it out on an Apple GPU"):
            train_ddpd.learners_of(cfg, training, runtime.World(0, 1, device))
