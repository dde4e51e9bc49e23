"""A device that this machine does not have, pretended on CPU data.

    with pretended_device() as device:
        x = torch.zeros(3, device=device)       # x.device == device
        x + torch.zeros(3)                      # RuntimeError: another device

    with pretended_device("mps") as device:     # as an Apple GPU, without float64
        torch.zeros(3, device=device).double()  # TypeError

Every operation on its tensors runs on the CPU, after a check that its tensors and its generator
are of one device by the rules of CUDA. The check sits below autograd, so backward passes and fused
optimizers are checked too. What cannot be pretended:

- autocast: matrix products stay in float32
- branches for device.type == "cuda", such as pinned memory; most kernels that a device lacks
- Module.to makes new Parameters, where CUDA would keep them: move networks before optimizers
- a list as an index, and changes of shape in place: errors here
- what C++ answers without an operation: is_cuda, is_cpu, get_device() and data_ptr() are wrong
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

aten = torch.ops.aten

PRETENDED = torch.device("xpu", 0)      # its name alone is used: PyTorch knows it everywhere
# "mps" has no float64, and by native_functions.yaml of PyTorch 2.6 and 2.13 none of these kernels
MISSING = {aten.logspace.default}
COPIES = {aten.copy_.default}           # between any two devices
TAKE_INDICES = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Pretended(Tensor):
    """A tensor of the pretended device, around one on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False

    @staticmethod
    def __new__(cls, on_cpu: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype, device="meta",
        )
        self.on_cpu = on_cpu
        return self

    @property
    def device(self):
        return PRETENDED

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return pretend(func, args, kwargs or {})

    def numpy(self, **options):
        raise RuntimeError("a tensor of the pretended device is no array: .cpu() first")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.cpu(), spec)

    def __repr__(self):
        return f"pretended {self.on_cpu!r}"

    def __reduce_ex__(self, protocol):                  # checkpoints are read on the CPU
        return self.cpu().__reduce_ex__(protocol)


class Generator(torch.Generator):
    """As torch.Generator, for the pretended device too."""

    def __new__(cls, device="cpu"):
        is_pretended = is_name(torch.device(device))
        self = super().__new__(cls, "cpu" if is_pretended else device)
        self.claimed = PRETENDED if is_pretended else torch.device(device)
        return self

    @property
    def device(self):
        return self.claimed


def pretend(func, args: tuple, kwargs: dict[str, Any]):
    """Run an operation on the CPU tensors inside of its arguments."""
    leaves, tree = tree_flatten((args, kwargs))
    ours = [y for y in leaves if isinstance(y, Pretended)]
    device = kwargs.get("device")                       # of the result
    is_ours = bool(ours) if device is None else is_name(device)
    if not ours and not is_ours:
        return func(*args, **kwargs)
    if ours and any(map(is_foreign, leaves)):
        refuse_mixing(func, args, kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0                                        # the way of plain matrix products
    on_cpu = [y.on_cpu if isinstance(y, Pretended) else y for y in leaves]
    args, kwargs = tree_unflatten(on_cpu, tree)
    if device is not None:
        kwargs["device"] = "cpu"
    out = func(*args, **kwargs)
    if PRETENDED.type == "mps" and (device is None or device.type != "meta"):
        refuse_missing(func, tree_leaves(out) + (on_cpu if ours else []))
    wrappers = {id(y.on_cpu): y for y in ours}

    def wrap(y):
        if id(y) not in wrappers:
            return Pretended(y)
        own = wrappers[id(y)]                           # what is written in place stays itself
        assert own.shape == y.shape, f"{func} resizes in place, which cannot be pretended"
        return own

    return tree_map_only(Tensor, wrap, out) if is_ours else out


def is_name(device: torch.device) -> bool:
    """Of the pretended device, or of what stands for it in C++: autograd makes zeros on "meta"."""
    return device.type in (PRETENDED.type, "meta")


def refuse_missing(func, leaves: list) -> None:
    """Raise where an Apple GPU would: it has no float64, not even in a move to the CPU."""
    if func in MISSING:
        raise NotImplementedError(f"{func} is not implemented for the device {PRETENDED}")
    if any(isinstance(y, Tensor) and y.dtype == torch.float64 for y in leaves):
        raise TypeError(f"{func}: {PRETENDED} does not support float64")


def is_foreign(y: Any) -> bool:
    return isinstance(y, Tensor) and not isinstance(y, Pretended)


def refuse_mixing(func, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise where CUDA would: CPU tensors may only be numbers, sources of a copy, or indices."""
    if func in COPIES:
        return
    takes_indices = func in TAKE_INDICES and isinstance(args[0], Pretended)
    for i, parameter in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        is_index = takes_indices and parameter.name == "indices"
        is_written = parameter.alias_info is not None and parameter.alias_info.is_write
        for y in filter(is_foreign, tree_leaves(value)):
            is_number = y.dim() == 0 and y is value and not is_written
            if y.device.type != "cpu" or not (is_number or is_index):
                raise RuntimeError(
                    f"expected all tensors on one device, but {parameter.name} of {func} is on "
                    f"{y.device}, others on {PRETENDED}"
                )


class Operations(TorchDispatchMode):
    """Sees operations without any pretended tensor: factories, and moves from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return pretend(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Sees what C++ hides from Operations: the class of a generator, the device of torch.tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = None
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
        out = func(*args, **kwargs)
        if device is not None:
            out = out.to(device)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != out.device.type:
            raise RuntimeError(
                f"expected a generator on {out.device}, but that of {func} is on "
                f"{generator.device}"
            )
        return out


@contextmanager
def pretended_device(name: str = "xpu") -> Iterator[torch.device]:
    """A block in which this machine has the device that is yielded; "mps" has no float64."""
    device = torch.device(name, 0)
    with (
        mock.patch.object(sys.modules[__name__], "PRETENDED", device),
        mock.patch.object(torch.backends.mps, "is_macos_or_newer", lambda *version: False),
        mock.patch.object(torch.xpu, "_lazy_init"),
        mock.patch.object(torch, "Generator", Generator), Operations(), Calls(),
    ):
        yield device
