"""Train an image tokenizer on a folder of pictures: a convolutional autoencoder with finite scalar
quantisation (FSQ, arXiv:2309.15505).

python tokenizer.py --folder F --group-by _ --out-dir tok/emoji
The same command again resumes. It writes encoder.jit and decoder.jit, TorchScript modules in the
form of the Cosmos discrete tokenizers: `python data.py images --encoder tok/emoji/encoder.jit`.
"""

import typing
from dataclasses import dataclass

import config
from formats.flags import NotNegativeFloat, Positive, Seed


@dataclass(frozen=True)
class TokenizerOptions:
    """What is trained, and on what."""
    folder: str = ""                        # pictures, or one folder of them per class
    out_dir: str = ""                       # for encoder.jit and decoder.jit; "": tok/<folder>
    image_size: Positive = 64               # pixels per side
    downsample: Positive = 4                # pixels per side of a token: 2, 4, 8, 16, ...
    levels: tuple[int, ...] = (5, 5, 5)     # levels of each channel of a code; V is their product
    width: Positive = 64                    # channels after the first convolution
    group_by: str = ""                      # names that agree up to this text stay in one split
    flip: bool = False                      # mirror half of the pictures; not for pictures of text
    batch_size: Positive = 16               # pictures per process
    max_iters: Positive = 3000              # iterations (optimizer steps)
    lr: NotNegativeFloat = 2e-3             # of AdamW
    save_interval: Positive = 250           # iterations between saves and validations
    seed: Seed = 0                   # of weights and order
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products


@dataclass(frozen=True)
class Flags(TokenizerOptions):
    """Train an image tokenizer, or resume it."""

    GROUPS: typing.ClassVar = {"tokenizer": TokenizerOptions}


if __name__ == "__main__":
    flags = config.load(Flags)

import copy
import itertools
import json
import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import ShuffledIndices
from sources import images
from sources._pictures import pixel_chunks, report_unreadable
from support import checkpoint, logs, runtime, training
from support.pictures import fit_images, title_items, write_grid

EMA_DECAY = 0.995
WARMUP_ITERS = 50
N_SHOWN = 10                # held-out pictures in reconstructions.png
VAL_BATCH = 50
# A tokenizer is resumed only with these unchanged
FIXED = ("folder", "image_size", "downsample", "levels", "width", "group_by", "flip", "batch_size",
         "seed")


# The network


class FSQ(nn.Module):
    """Round each channel to one of a few levels; a code is the tuple of its levels."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        numbers = torch.tensor(levels)
        basis = torch.tensor([1, *itertools.accumulate(levels, int.__mul__)][:-1])
        shape = (1, -1, 1, 1)
        self.register_buffer("n_levels", numbers.view(shape))
        self.register_buffer("basis", basis.view(shape))

    def forward(self, z: Tensor) -> Tensor:
        """The nearest code, with the gradient of the bounded z.  (n, C, h, w) -> in [-1, 1]"""
        half = (self.n_levels - 1) * 1.001 / 2
        offset = (self.n_levels % 2 == 0) * 0.5
        bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.n_levels // 2)

    def indices(self, codes: Tensor) -> Tensor:
        """codes (n, C, h, w) -> ids (n, h, w) int32"""
        half = self.n_levels // 2
        digits = (codes * half).round() + half
        return (digits * self.basis).sum(1).int()

    def codes(self, indices: Tensor) -> Tensor:
        """ids (n, h, w) -> codes (n, C, h, w)"""
        digits = indices[:, None].long() // self.basis % self.n_levels
        half = self.n_levels // 2
        return (digits - half) / half


class Block(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def encoder_layers(flags: Flags) -> nn.Sequential:
    """Images (n, 3, H, W) -> (n, C, H / d, W / d): the first halving folds pixels into channels."""
    width = flags.width
    layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), Block(width)]
    for _ in range(n_halvings(flags) - 1):
        layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), Block(2 * width)]
        width *= 2
    layers += [Block(width), nn.GroupNorm(8, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, len(flags.levels), 1))


def decoder_layers(flags: Flags) -> nn.Sequential:
    """The encoder's layers in reverse order."""
    width = flags.width * 2 ** (n_halvings(flags) - 1)
    layers = [nn.Conv2d(len(flags.levels), width, 3, padding=1), Block(width), Block(width)]
    for _ in range(n_halvings(flags) - 1):
        layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.PixelShuffle(2)]
        width //= 2
        layers += [Block(width)]
    layers += [nn.GroupNorm(8, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))


def n_halvings(flags: Flags) -> int:
    return round(math.log2(flags.downsample))


class Encoder(nn.Module):
    """Images (n, 3, H, W) in [-1, 1] -> ids (n, h, w) int32, codes (n, C, h, w)"""

    def __init__(self, flags: Flags):
        super().__init__()
        self.vocab = math.prod(flags.levels)
        self.layers = encoder_layers(flags)
        self.fsq = FSQ(flags.levels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.fsq(self.layers(images))
        return self.fsq.indices(codes), codes


class Decoder(nn.Module):
    """Ids (n, h, w) -> images (n, 3, H, W), about in [-1, 1]"""

    def __init__(self, flags: Flags):
        super().__init__()
        self.vocab = math.prod(flags.levels)
        self.layers = decoder_layers(flags)
        self.fsq = FSQ(flags.levels)

    def forward(self, indices: Tensor) -> Tensor:
        return self.layers(self.fsq.codes(indices))


class Autoencoder(nn.Module):
    """Images -> their reconstructions, through codes."""

    def __init__(self, flags: Flags):
        super().__init__()
        self.encoder = Encoder(flags)
        self.decoder = Decoder(flags)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encoder.fsq(self.encoder.layers(x))
        return self.decoder.layers(codes)


def reconstruction_loss(out: Tensor, x: Tensor) -> Tensor:
    """Absolute and squared errors, and absolute errors of the differences of neighbours."""
    error = out.float() - x
    loss = error.abs().mean() + error.square().mean()
    for axis in (2, 3):
        loss = loss + error.diff(dim=axis).abs().mean()
    return loss


# Pictures


def load_pictures(flags: Flags) -> dict[str, np.ndarray]:
    """All pictures of both splits, which are those of `data.py images`.  -> (n, S, S, 3) uint8"""
    splits, _, unreadable = images.find_splits(flags.folder, flags.image_size, flags.group_by)
    pixels = {}
    for split, pictures in splits.items():
        with tqdm(total=len(pictures), desc=f"{split} pictures", leave=False) as bar:
            chunks = pixel_chunks(pictures, flags.image_size, unreadable, bar)
            loaded = [chunk for chunk, _ in chunks]
        if not loaded:
            raise SystemExit(f"none of {len(pictures)} {split} pictures can be read")
        pixels[split] = np.concatenate(loaded)
    report_unreadable(unreadable)
    return pixels


def as_images(pixels: np.ndarray, device: torch.device) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]"""
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def as_pixels(x: Tensor) -> np.ndarray:
    """The inverse of as_images, rounded and clipped."""
    pixels = (x.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# Training


def learning_rate(it: int, flags: Flags) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if it < WARMUP_ITERS:
        return flags.lr * (it + 1) / WARMUP_ITERS
    progress = (it - WARMUP_ITERS) / max(1, flags.max_iters - WARMUP_ITERS)
    return flags.lr * (0.505 + 0.495 * math.cos(math.pi * min(1.0, progress)))


def batch_at(it: int, pixels: np.ndarray, order: ShuffledIndices, flags: Flags,
             world: runtime.World) -> Tensor:
    """The pictures of an iteration, a function of (seed, it, rank)."""
    group = it * world.size + world.rank
    chosen = pixels[order.take(group * flags.batch_size, flags.batch_size)]
    if flags.flip:
        rng = runtime.generator("tokenizer", flags.seed, group)
        is_mirrored = torch.rand(len(chosen), generator=rng).numpy() < 0.5
        chosen[is_mirrored] = chosen[is_mirrored, :, ::-1]
    return as_images(chosen, world.device)


def train(flags: Flags, pixels: dict[str, np.ndarray], world: runtime.World,
          stop: runtime.Stop) -> None:
    """From the last save to the last iteration."""
    torch.manual_seed(flags.seed)
    net = Autoencoder(flags).to(world.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01, betas=(0.9, 0.95))
    it = resume(flags, net, ema, optimizer)
    learner = training.distributed(net) if world.size > 1 else net
    order = ShuffledIndices(len(pixels["train"]), flags.seed)
    log = logs.open_log(Path(flags.out_dir) / "log.jsonl") if world.is_main else None
    bar = tqdm(total=flags.max_iters, initial=it, disable=not world.is_main, unit="it")
    while it < flags.max_iters:
        x = batch_at(it, pixels["train"], order, flags, world)
        with runtime.autocast(world.device, flags.dtype):
            loss = reconstruction_loss(learner(x), x)
        optimizer.param_groups[0]["lr"] = learning_rate(it, flags)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        it += 1
        update_average(ema, net, it)
        bar.update()
        signal = stop.requested()
        if not signal and it % flags.save_interval and it < flags.max_iters:
            continue
        if not loss.isfinite():
            raise SystemExit(f"the loss is not finite at iteration {it}: lower --lr")
        with runtime.main_alone(world) as is_mine:
            if is_mine:
                save(flags, net, ema, optimizer, it)
                if not signal:
                    scores = validate(flags, ema, pixels["val"], world.device)
                    log.write(json.dumps({"it": it, "loss": loss.item(), **scores}) + "\n")
                    log.flush()
                    bar.write(f"{it:>6}: loss {loss.item():.4f}, {describe(scores)}")
        if signal:
            bar.close()
            raise SystemExit(f"stopped by signal {signal} at iteration {it}, saved; "
                             "the same command resumes")
    bar.close()


@torch.no_grad()
def update_average(ema: nn.Module, net: nn.Module, it: int) -> None:
    decay = min(EMA_DECAY, (1 + it) / (10 + it))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def resume(flags: Flags, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what was saved, if anything was.  -> iterations done"""
    path = Path(flags.out_dir) / "ckpt.pt"
    if not path.exists():
        return 0
    with runtime.one_line_errors(Exception):        # damaged files raise many kinds
        state = torch.load(path, map_location="cpu", weights_only=True)
        expected = state.pop("digest")
    if checkpoint.digest(state) != expected:
        raise SystemExit(f"{path} is damaged: its digest differs")
    now = plain(flags)
    for key in FIXED:
        if state["flags"][key] != now[key]:
            raise SystemExit(f"{flags.out_dir} was trained with {key} = {state['flags'][key]}, "
                             f"not {now[key]}; choose another --out-dir")
    net.load_state_dict(state["net"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["it"]


def plain(flags: Flags) -> dict[str, Any]:
    return asdict(flags) | {"levels": list(flags.levels)}


def save(flags: Flags, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer,
         it: int) -> None:
    """A checkpoint, and the averaged encoder and decoder as TorchScript."""
    folder = Path(flags.out_dir)
    state = dict(it=it, flags=plain(flags), net=net.state_dict(), ema=ema.state_dict(),
                 optimizer=optimizer.state_dict())
    if not checkpoint.save_checkpoint(folder, state):
        raise SystemExit(f"{folder}: iteration {it} could not be saved")
    with runtime.one_line_errors(OSError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")             # torch.jit is what Cosmos' files are made with
        for name in ("encoder", "decoder"):
            module = copy.deepcopy(getattr(ema, name)).cpu().eval()
            new = folder / f"{name}.tmp"
            torch.jit.script(module).save(str(new))
            os.replace(new, folder / f"{name}.jit")


# Validation


@torch.no_grad()
def validate(flags: Flags, net: Autoencoder, pixels: np.ndarray,
             device: torch.device) -> dict[str, float]:
    """Mean PSNR and SSIM of held-out pictures, what of the codes they use; reconstructions.png."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    outputs = []
    ids = []
    for part in np.array_split(pixels, math.ceil(len(pixels) / VAL_BATCH)):
        indices, _ = net.encoder(as_images(part, device))
        ids.append(indices.cpu().numpy())
        outputs.append(as_pixels(net.decoder(indices)))
    output = np.concatenate(outputs)
    pairs = list(zip(pixels, output, strict=True))
    psnr = [peak_signal_noise_ratio(a, b) if (a != b).any() else 100.0 for a, b in pairs]
    window = min(7, flags.image_size - 1 + flags.image_size % 2)
    ssim = [structural_similarity(a, b, channel_axis=2, win_size=window) for a, b in pairs]
    _, counts = np.unique(np.concatenate(ids), return_counts=True)
    p = counts / counts.sum()
    draw_reconstructions(Path(flags.out_dir) / "reconstructions.png", pixels, output)
    return dict(
        val_psnr=round(float(np.mean(psnr)), 3),
        val_ssim=round(float(np.mean(ssim)), 4),
        val_codes=len(counts),
        val_bits=round(float(-(p * np.log2(p)).sum()), 3),
    )


def describe(scores: dict[str, float]) -> str:
    return (f"held-out PSNR {scores['val_psnr']:.2f} dB, SSIM {scores['val_ssim']:.3f}, "
            f"{scores['val_codes']} codes in use, entropy {scores['val_bits']:.2f} bits per token")


def draw_reconstructions(path: Path, pixels: np.ndarray, output: np.ndarray) -> None:
    """Held-out pictures over their reconstructions."""
    n = min(N_SHOWN, len(pixels))
    chosen = np.arange(n) * (len(pixels) // n)
    rows = []
    for shown in (pixels, output):
        rows.append([("", tile) for tile in fit_images(shown[chosen], n)])
    write_grid(path, rows, title_items(["above: held-out pictures", "below: reconstructed"]))



def check_flags(flags: Flags) -> Flags:
    """Refuse what cannot be trained.  -> flags with out_dir filled in"""
    if flags.downsample < 2 or flags.downsample & (flags.downsample - 1):
        raise SystemExit(f"--downsample {flags.downsample} is not 2, 4, 8, ...")
    if flags.image_size % flags.downsample:
        raise SystemExit(f"--image-size {flags.image_size} is no multiple of --downsample "
                         f"{flags.downsample}")
    if not flags.levels or min(flags.levels) < 2:
        raise SystemExit(f"--levels {' '.join(map(str, flags.levels))}: each must be at least 2")
    if flags.width % 8:
        raise SystemExit(f"--width {flags.width} is no multiple of 8")
    if not flags.out_dir:
        name = os.path.basename(os.path.abspath(flags.folder)) or "images"
        return replace(flags, out_dir=f"tok/{name}")
    return flags


def main(flags: Flags) -> None:
    flags = check_flags(flags)
    world = runtime.start(flags.dtype)
    stop = runtime.Stop(world)
    pixels = load_pictures(flags)
    folder = Path(flags.out_dir)
    with runtime.one_line_errors(OSError), ExitStack() as lock:
        folder.mkdir(parents=True, exist_ok=True)
        if world.is_main:
            lock.enter_context(checkpoint.locked(folder))
            side = flags.image_size // flags.downsample
            print(f"{len(pixels['train'])} training and {len(pixels['val'])} held-out pictures, "
                  f"{side} x {side} tokens, V = {math.prod(flags.levels)}")
        train(flags, pixels, world, stop)
    if world.is_main:
        print(f"done: {folder}/encoder.jit, decoder.jit, reconstructions.png. Next: python data.py "
              f"images --folder {flags.folder} --image-size {flags.image_size} "
              f"--encoder {folder}/encoder.jit --name {folder.name}"
              + f" --group-by {flags.group_by}" * bool(flags.group_by))


if __name__ == "__main__":
    with runtime.one_voice():
        try:
            main(flags)
        finally:
            runtime.end()
    runtime.leave_without_shutdown()
