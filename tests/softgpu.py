"""A graphics card that is none: tensors say that they are on the device `soft`, their values lie on
the CPU. What would fail on CUDA fails here with CUDA's words, and what would cost time there is
counted. Tests take it through the fixture `card`."""

import functools
import os
import sys
from collections import Counter

import pytest
import torch
import torch.utils.backend_registration as registration

import lib.device
import model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = [os.path.join(ROOT, name) for name in ("model.py", "train.py", "distill.py", "vision.py")]
OURS += [os.path.join(ROOT, name) for name in ("sample.py", "export.py", "bench.py", "lib", "data")]
aten = torch.ops.aten

# Operators whose result's size or value the host must know: CUDA waits for them.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
WAITING |= {aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount}
# Operators that take an index or a number from the CPU and bring it over themselves.
MIXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_}
MIXING |= {aten._to_copy, aten.set_, aten.is_same_size}
# Operators that read shapes alone, and start nothing.
FREE = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.is_same_size, aten.detach}


class Card:
    """What happened, in `events`: (kind, line), where kind is launch, sync or copy, and line is
    "file:line" of our code. `mps`: refuses float64, as MPS does."""

    def __init__(self):
        self.mps, self.events = False, []

    def note(self, kind):
        self.events.append((kind, line_of_ours()))

    def count(self, kind):
        return Counter(line for what, line in self.events if what == kind)


def line_of_ours():
    """file:line of the innermost frame that is our code; "backward" in autograd's thread."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(tuple(OURS)):
            return f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


class SoftTensor(torch.Tensor):
    card = Card()

    @staticmethod
    def __new__(cls, raw):
        kind = dict(dtype=raw.dtype, device="soft:0", strides=raw.stride())
        with torch.inference_mode(raw.is_inference()):
            self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **kind)
        self.raw = raw
        return self

    def __repr__(self, **_):
        return f"soft({self.raw})"

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # a checkpoint
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if is_composite(func):  # in inference mode these come here whole
            return func.decompose(*args, **kwargs or {})
        return run(func, args, kwargs or {})


def each(function, x):
    """function of every leaf of nested lists and tuples."""
    if isinstance(x, list | tuple):
        return type(x)([each(function, part) for part in x])
    return function(x)


def run(func, args, kwargs):
    """One operator, on the values."""
    card, packet, flat = SoftTensor.card, func.overloadpacket, []
    each(flat.append, (*args, *kwargs.values()))
    soft = [x for x in flat if isinstance(x, SoftTensor)]
    hard = [x for x in flat if torch.is_tensor(x) and not isinstance(x, SoftTensor)]
    if soft and packet not in MIXING and any(x.ndim for x in hard):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"soft:0 and cpu! ({func})"
        )
    target = kwargs.get("device")
    onto = bool(soft) if target is None else torch.device(target).type == "soft"
    if packet is aten.copy_:
        onto, crossing = isinstance(flat[0], SoftTensor), bool(soft and hard)
    else:
        crossing = packet is aten._to_copy and bool(soft) != onto
    count(card, func, flat, hard, crossing, onto)
    args, *values = each(lambda x: getattr(x, "raw", x), (args, *kwargs.values()))
    kwargs = dict(zip(kwargs, values)) | (dict(device="cpu") if target is not None else {})
    out, known = func(*args, **kwargs), {id(x.raw): x for x in soft}

    def wrap(x):
        if not torch.is_tensor(x) or not onto:
            return x
        if x.dtype == torch.float64 and card.mps:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return known[id(x)] if id(x) in known else SoftTensor(x)

    return flat[0] if packet is aten.copy_ else each(wrap, out)


def count(card, func, flat, hard, crossing, onto):
    """What CUDA would do for this operator: wait, copy, launch a kernel, or nothing."""
    packet = func.overloadpacket
    bools = [x for x in flat[1:] if torch.is_tensor(x) and x.dtype == torch.bool]
    if crossing:
        card.note("copy")
        non_blocking = any(x is True for x in flat)
        if not (onto and non_blocking and all(x.is_pinned() for x in hard)):
            card.note("sync")
    elif packet in WAITING or (bools and packet in MIXING - {aten.copy_, aten._to_copy}):
        card.note("sync")
    if not crossing and packet not in FREE and not is_view(func):
        card.note("launch")


@functools.cache
def is_composite(func):
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@functools.cache
def is_view(func):
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


# ----------------------------------------------------------------------------------------------
# Installing it, once a process


def empty(size, dtype=None, **_):
    return SoftTensor(torch.empty(size, dtype=dtype))


def empty_strided(size, stride, dtype=None, **_):
    return SoftTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, target, non_blocking=False):  # torch.tensor comes here
    SoftTensor.card.note("copy")
    SoftTensor.card.note("sync")
    target.raw.copy_(source)
    return target


@functools.cache
def library():
    """Registers the device; None where this torch cannot."""
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        return None

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

    registration._setup_privateuseone_for_python_backend("soft", Module())
    made = torch.library.Library("aten", "IMPL")
    made.impl("empty.memory_format", empty, "PrivateUse1")
    made.impl("empty_strided", empty_strided, "PrivateUse1")
    made.impl("_copy_from", copy_from, "PrivateUse1")
    torch.utils._foreach_utils._foreach_supported_types.append(SoftTensor)
    return made


class Generator(torch.Generator):
    """torch.Generator, for the card too."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.on = torch.device(device).type
        return self


@pytest.fixture
def card(monkeypatch):
    """The device: every script's --device means it. Yields its Card."""
    if library() is None:
        pytest.skip("this torch has no Python backends")
    monkeypatch.setattr(lib.device, "find_device", lambda name: torch.device("soft:0"))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: setattr(x, "pinned", True) or x)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: getattr(x, "pinned", False))
    save = model.save_file  # asks tensors for the address of their storage
    on_cpu = lambda tensors, *rest: save({n: x.cpu() for n, x in tensors.items()}, *rest)  # noqa
    monkeypatch.setattr(model, "save_file", on_cpu)
    monkeypatch.setattr(SoftTensor, "card", Card())
    return SoftTensor.card
