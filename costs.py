"""What a config takes, before anything is trained: parameters, memory, time.   train_ddpd.py CONFIG --dry-run"""

import time
from dataclasses import asdict

import torch

import model
import runtime


def of_step(shape, kind, batch_size, device, context):
    """What a micro-step of batch_size sequences takes. One block is run for it on the spot.  context: its autocast

    -> n_params, bytes by purpose {name: bytes}, FLOPs, FLOPs per second that the block reached forward and backward
    """
    n, d, depth = shape.n_tokens, shape.n_embd, shape.n_layer
    nets = {name: model.build_one(shape, name, kind, "meta") for name in model.names_of(kind)}
    n_params = sum(p.numel() for net in nets.values() for p in net.parameters())
    block = model.Block(shape).to(device)
    turns = [[torch.ones(n, shape.head_dim // 2, device=device)] * 2] * 2
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def run(b):
        kept = {}

        def pack(y):
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        x = torch.randn(b, n, d, device=device, requires_grad=True)
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y), context:
            y = block(x, torch.randn(b, model.N_CONTEXT, d, device=device), turns)
        y.sum().backward()
        x.grad.sum().item()                                             # waits for the device
        return sum(size for where, size in kept.items() if where not in own), time.perf_counter() - began

    one, two = run(1)[0], run(2)[0]
    forward = n * (28 * d * d + 4 * n * d + 4 * model.N_CONTEXT * d)    # of a block and a sequence: products only
    b = max(1, min(batch_size, 4096 // n))
    rate = 3 * forward * b / min(run(b)[1] for _ in range(3))
    flops, logits = len(nets) * depth * 3 * forward * batch_size, 0
    for net in nets.values():
        is_all = net.head == "planner" or kind in ("single", "gidd", "forcing")     # else noise: half of them
        rows = batch_size * n // (1 if is_all else 2)
        chunk = min(rows, max(1, model.LOGITS_PER_CHUNK // net.readout.out_features))
        flops += 6 * rows * d * net.readout.out_features
        logits = max(logits, 3 * 4 * chunk * net.readout.out_features)  # logits, their log-softmax, its gradient
    kept = len(nets) * depth * ((two - one) * batch_size + (2 * one - two))
    bytes_ = {"weights": 4 * n_params, "gradients": 4 * n_params, "optimizer": 8 * n_params, "EMA": 4 * n_params,
              "activations": kept, "logits": logits}
    return n_params, bytes_, flops, rate


def dry_run(cfg, meta):
    """Print what this config takes, and train nothing."""
    device = runtime.pick_device()
    try:
        shape = model.shape_of(asdict(cfg), meta)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    autocast = runtime.autocast(device, cfg.dtype)
    n_params, size, flops, rate = of_step(shape, cfg.kind, cfg.batch_size, device, autocast)
    print(f"{cfg.data}: {' x '.join(map(str, meta['grid']))} tokens, V = {meta['vocab']}, {meta['n_classes']} classes; "
          f"{n_params / 1e6:.2f} M parameters; batch {cfg.batch_size} per process")
    print(f"memory per process: {sum(size.values()) / 2**30:.2f} GiB = "
          + " + ".join(f"{name} {b / 2**30:.2f}" for name, b in size.items()))
    flops *= cfg.grad_accumulation_steps
    print(f"time per iteration: {flops / rate:.3g} s = {flops / 1e12:.3g} TFLOP at {rate / 1e12:.3g} TFLOP/s, measured "
          f"on one block on this {device.type}; all {cfg.max_iters}: {cfg.max_iters * flops / rate / 3600:.2g} hours")
