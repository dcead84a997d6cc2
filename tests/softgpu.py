"""A graphics card that is none: tensors say that they are on the device `soft`, their values lie on
the CPU. Tensors of two devices in one operator are an error, as on CUDA, and every wait for the
device is noted."""

import traceback

import pytest
import torch
import torch.utils.backend_registration as registration
from conftest import ROOT
from torch.utils._pytree import tree_leaves, tree_map

import lib.device
import model

aten = torch.ops.aten

# Operators whose result's size or value the host must know: CUDA waits for them.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
WAITING |= {aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount}
# Operators that take an index from the CPU and bring it over themselves; a mask makes them wait.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
MIXING = INDEXING | {aten.copy_, aten._to_copy}

WAITS = []  # "file:line" of our code, once a wait


def wait():
    stack = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_stack(None)]
    ours = [at for at in stack if at.startswith(ROOT) and "site-packages" not in at]
    WAITS.append([at for at in ours if "/tests/" not in at][:1])  # none in autograd's thread


class SoftTensor(torch.Tensor):
    def __new__(cls, raw):
        assert raw.dtype != torch.float64, "Apple's MPS has none"
        kind = dict(dtype=raw.dtype, device="soft:0", strides=raw.stride())
        with torch.inference_mode(raw.is_inference()):
            self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **kind)
        self.raw = raw
        return self

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # a checkpoint
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, key = kwargs or {}, "CompositeImplicitAutograd"
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return func.decompose(*args, **kwargs)  # in inference mode these come here whole
        packet, flat = func.overloadpacket, tree_leaves((args, kwargs))
        soft = [x for x in flat if isinstance(x, SoftTensor)]
        hard = [x for x in flat if torch.is_tensor(x) and not isinstance(x, SoftTensor)]
        if soft and packet not in MIXING and any(x.ndim for x in hard):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: soft:0 and cpu ({func})"
            )
        target = kwargs.get("device")
        onto = bool(soft) if target is None else torch.device(target).type == "soft"
        crossing = packet is aten._to_copy and bool(soft) != onto
        if packet is aten.copy_:
            onto, crossing = isinstance(flat[0], SoftTensor), bool(soft and hard)
        pinned = all(getattr(x, "pinned", False) for x in hard)
        fetched = onto and pinned and any(x is True for x in flat)  # non_blocking
        masked = any(torch.is_tensor(x) and x.dtype == torch.bool for x in flat[1:])
        if packet in WAITING or (packet in INDEXING and masked) or (crossing and not fetched):
            wait()

        args, kwargs = tree_map(lambda x: getattr(x, "raw", x), (args, kwargs))
        out = func(*args, **(kwargs if target is None else kwargs | dict(device="cpu")))
        known = {id(x.raw): x for x in soft}

        def wrap(x):
            if not onto or not torch.is_tensor(x):
                return x
            return known[id(x)] if id(x) in known else SoftTensor(x)  # an operator in place

        return tree_map(wrap, out)


# ----------------------------------------------------------------------------------------------
# Installing it


def empty(size, stride=None, dtype=None, **_):
    made = torch.empty(size, dtype=dtype)
    return SoftTensor(made if stride is None else made.as_strided(size, stride))


def copy_from(source, target, non_blocking=False):  # torch.tensor comes here
    wait()
    target.raw.copy_(source)
    return target


LIBRARY = torch.library.Library("aten", "IMPL")


def register():
    """The device, once a process and before its first backward pass, which makes a thread for
    every kind of device that there is."""

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

    registration._setup_privateuseone_for_python_backend("soft", Module())
    LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
    LIBRARY.impl("empty_strided", empty, "PrivateUse1")
    LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")


HAS_API = hasattr(registration, "_setup_privateuseone_for_python_backend")
if HAS_API:
    register()


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@pytest.fixture(scope="module")
def card():
    """The device: every script's --device means it. Yields the list of its waits."""
    if not HAS_API:
        pytest.skip("this torch has no Python backends")
    save = model.save_file  # asks tensors for the address of their storage
    on_cpu = lambda tensors, *rest: save({n: x.cpu() for n, x in tensors.items()}, *rest)  # noqa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.device, "find_device", lambda name: torch.device("soft:0"))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: setattr(x, "pinned", True) or x)
        patch.setattr(model, "save_file", on_cpu)
        yield WAITS
