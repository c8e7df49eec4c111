"""A device that is not the CPU, without one: its tensors lie in the CPU's memory, but torch takes them for another device's.

What a GPU refuses is refused here, and a little more: an operation on tensors of both devices, unless the CPU's has a single value. So code
that runs on this device puts every tensor where it belongs; numbers are the CPU's. A device type of its own (torch's PrivateUse1), because
torch asks for a driver wherever it reads "cuda".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def is_available(self) -> bool:
        return False  # to whoever looks for an accelerator: only tests that name the device get it


_setup_privateuseone_for_python_backend("simulated", backend_module=_Backend())
torch.get_device_module("simulated").get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
DEVICE = torch.device("simulated:0")


@contextmanager
def movable() -> Iterator[None]:
    """Within it, models can be moved to the device: a shell cannot take the place of a parameter's values, as a GPU's tensor does, so
    parameters are made anew."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class Misplaced(RuntimeError):
    """An operation on tensors of two devices."""


class Held(torch.Tensor):
    """A tensor of the device: a shell around one of the CPU."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Held:
        with torch.inference_mode(host.is_inference()):
            shell = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=DEVICE
            )
        shell.host = host
        return shell

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name(), dict(kwargs or {})
        if name.startswith(("aten::to.", "aten::_to_copy")):
            return _moved(func, args, kwargs)
        if name == "aten::copy_":
            host_of(args[0]).copy_(host_of(args[1]))
            return args[0]
        kwargs.pop("device", None)  # what is made like a tensor of the device is the device's
        here, there = tree_map_only(torch.Tensor, lambda t: _own(t, name), (args, kwargs))
        made = func(*here, **there)
        known = {id(t.host): t for t in args if isinstance(t, Held)}  # what works in place returns its own argument
        return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else Held(t), made)

    def tolist(self) -> Any:
        return self.host.tolist()


def host_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.host if isinstance(tensor, Held) else tensor


def _own(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(tensor, Held) and tensor.dim():
        raise Misplaced(f"{name} was asked of tensors of two devices")
    return host_of(tensor)


def _moved(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Every form of `to`: the device may be any argument, or be another tensor's."""
    source, *rest = args
    target = source.device
    for value in (*rest, *kwargs.values()):
        if isinstance(value, torch.device | torch.Tensor):
            target = value if isinstance(value, torch.device) else value.device
    cpu = torch.device("cpu")
    rest = [cpu if isinstance(v, torch.device) else host_of(v) if isinstance(v, torch.Tensor) else v for v in rest]
    kwargs = {k: cpu if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    made = func(host_of(source), *rest, **kwargs)
    return Held(made) if target.type == DEVICE.type else made.clone() if made is host_of(source) else made


def _empty(size: Any, **options: Any) -> torch.Tensor:
    return Held(torch.empty(size, dtype=options.get("dtype")))


def _empty_strided(size: Any, stride: Any, **options: Any) -> torch.Tensor:
    return Held(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _arange(start: Any, end: Any, step: Any = 1, **options: Any) -> torch.Tensor:
    return Held(torch.arange(start, end, step, dtype=options.get("dtype")))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    host_of(target).copy_(host_of(source))
    return target


_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("arange", lambda end, **options: _arange(0, end, **options), "PrivateUse1")
_library.impl("arange.start", _arange, "PrivateUse1")
_library.impl("arange.start_step", _arange, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
