"""A pretended GPU, to find on a CPU what a GPU would refuse, wait for or be slow at.

Tensors on the device "pretend" keep their numbers on the CPU. Every operation on them is counted as
a kernel launch; operands on two devices are refused, as CUDA refuses them; what makes the host wait
for the device (reading a number, a blocking copy, an index by booleans) is counted with the place
that asked for it. Autocast follows CUDA's lists of operations. Uses an experimental part of torch:
`available()` says whether this torch has it.
"""
import collections, contextlib, sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parents[1])
NAME = "pretend"
aten = torch.ops.aten

# CUDA's autocast computes the first in bf16 and the others in float32.
LOWER = ["conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "convolution", "einsum"]
UPPER = ["group_norm", "layer_norm", "log_softmax.int", "softmax.int", "cross_entropy_loss",
         "nll_loss", "norm.ScalarOpt_dim", "norm.Scalar", "exp", "log", "pow.Tensor_Scalar",
         "smooth_l1_loss", "binary_cross_entropy_with_logits", "cosine_similarity", "rsqrt",
         "cumsum", "prod", "sum.dim_IntList", "sum", "logsumexp"]
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default, aten._unique2.default, aten.bincount.default, aten.is_nonzero.default,
         aten.repeat_interleave.Tensor, aten.unique_dim.default}
INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
         aten._index_put_impl_.default, aten._unsafe_index.Tensor}
FACTORIES = {aten.new_empty.default, aten.new_zeros.default, aten.new_full.default,
             aten.new_ones.default, aten.empty_like.default, aten.zeros_like.default,
             aten.ones_like.default, aten.full_like.default, aten.new_empty_strided.default}

def available():
    """Whether this torch lets a Python module be a device. Beside a GPU it does not: autograd takes
    one of the two for the only device."""
    return (not torch.cuda.is_available()
            and hasattr(backend_registration, "_setup_privateuseone_for_python_backend"))

def _register():
    class Backend(backend_registration._DummyBackendModule):
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
        _lazy_init = staticmethod(lambda *_: None)

    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    setattr(torch, NAME, Backend())
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    for name in LOWER:
        library.impl(name, _cast(name, None))
    for name in UPPER:
        library.impl(name, _cast(name, torch.float32))
    return library, others                      # which must live on

def _cast(name, dtype):
    """An operation under autocast, with its float arguments in `dtype`, or the lower precision."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            to = dtype or torch.get_autocast_dtype(NAME)

            def cast(t):
                ours = t.is_floating_point() and t.device.type == NAME and t.dtype != torch.float64
                return t.to(to) if ours else t

            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
            return operation(*args, **kwargs)

    return run

class Tensor(torch.Tensor):
    """A tensor on the pretended device; `inner` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0), requires_grad=False)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Counter.current.run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"pretended {tuple(self.shape)} {self.dtype}"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def tolist(self):
        Counter.current.wait("tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):          # of torch.save
        return self.inner.detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = Tensor(self.inner.clone(memory_format=torch.preserve_format))
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

def is_tensor(value):
    return isinstance(value, torch.Tensor)

def place():
    """The innermost lines of the project that are being run."""
    frame = sys._getframe(2)
    lines = []
    while frame and len(lines) < 2:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.endswith("pretend.py"):
            lines.append(f"{name[len(ROOT) + 1:]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "torch"

class Counter(TorchDispatchMode):
    """Runs operations on the numbers, and counts launches, waits and copies."""

    current = None

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.launches = 0
        self.waits = collections.Counter()
        self.copies = 0

    def __enter__(self):
        Counter.current = self
        self.lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *details):
        torch._C._set_only_lift_cpu_tensors(self.lift)
        return super().__exit__(*details)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def wait(self, why):
        self.waits[f"{why} @ {place()}"] += 1

    def run(self, func, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        to_us = device is not None and torch.device(device).type == NAME
        to_host = device is not None and not to_us
        inner_args, inner_kwargs = tree_map_only(Tensor, lambda t: t.inner, (args, kwargs))
        if to_us or ours:
            inner_kwargs = {k: v for k, v in inner_kwargs.items() if k != "device"}
        if not ours and not to_us:
            return func(*args, **kwargs)
        if not ours:                            # a new tensor, or one from the host
            if func is aten._to_copy.default:
                self.from_host(args[0], kwargs.get("non_blocking"))
            else:
                self.launches += 1
            return self.wrap(func(*inner_args, **inner_kwargs), ours)
        if func is aten._to_copy.default and to_host or func in FACTORIES and to_host:
            if func is aten._to_copy.default and not kwargs.get("non_blocking"):
                self.wait("copy to the host")
            return func(*inner_args, **inner_kwargs)
        if func is aten.copy_.default:
            return self.copy(func, args, inner_args, kwargs)
        self.refuse_two_devices(func, args, leaves)
        if func in WAITS:
            self.wait(str(func).removeprefix("aten.").split(".")[0])
        result = func(*inner_args, **inner_kwargs)
        results = [value for value in tree_leaves(result) if is_tensor(value)]
        if func is aten._local_scalar_dense.default or not results and not func._schema.is_mutable:
            return result
        self.count(func, args, results, ours)
        if str(func).startswith("aten._foreach"):       # every result is where its operand is
            return None if func._schema.is_mutable else [
                self.wrap(value, ours) if isinstance(operand, Tensor) else value
                for operand, value in zip(args[0], result)]
        return self.wrap(result, ours)

    def count(self, func, args, results, ours):
        """Views launch nothing; operations on lists one kernel, but one for each tensor if their
        second argument is a list of other shapes, which CUDA has no fused kernel for."""
        storages = {t.inner.untyped_storage()._cdata for t in ours}
        shared = all(value.untyped_storage()._cdata in storages for value in results)
        if results and shared and not func._schema.is_mutable:
            return
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and is_tensor(arg[0])]
        slow = (str(func).startswith("aten._foreach") and len(lists) > 1
                and any(a.shape != b.shape for a, b in zip(*lists[:2])))
        self.launches += len(lists[0]) if slow else 1

    def copy(self, func, args, inner_args, kwargs):
        target, source = args[:2]
        if isinstance(target, Tensor) and isinstance(source, Tensor):
            self.launches += 1
        elif isinstance(target, Tensor):
            self.from_host(source, args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            self.wait("copy to the host")
        func(*inner_args, **kwargs)
        return target

    def from_host(self, source, non_blocking):
        self.copies += 1
        if not non_blocking:
            self.wait("blocking copy from the host")

    def refuse_two_devices(self, func, args, leaves):
        host = [leaf for leaf in leaves if is_tensor(leaf) and not isinstance(leaf, Tensor)]
        if func in INDEX and isinstance(args[0], Tensor):
            if host:
                self.wait("index on the host")
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait("index by booleans")
            return
        numbers = all(leaf.dim() == 0 for leaf in host)
        pointwise = torch.Tag.pointwise in func.tags or "foreach" in str(func)
        if host and not (numbers and pointwise) and not str(func).startswith("c10d"):
            raise RuntimeError(f"{func}: operands on two devices @ {place()}")

    def wrap(self, result, ours):
        known = {id(t.inner): t for t in ours}

        def wrapped(value):
            if isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else Tensor(value)

        return tree_map_only(torch.Tensor, wrapped, result)

_libraries = _register() if available() else None

@contextlib.contextmanager
def pretended():
    """Within it torch.cuda says that there is a GPU; yields the counter."""
    import torch.optim.optimizer as optimizer
    answers = dict(is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1,
                   set_device=lambda _: None, current_device=lambda: 0, manual_seed=lambda _: None,
                   is_bf16_supported=lambda including_emulation=True: True,
                   synchronize=lambda *_: None, is_current_stream_capturing=lambda: False)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        optimizer._foreach_supported_types.append(Tensor)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Counter() as counter:
                yield counter
        finally:
            optimizer._foreach_supported_types.remove(Tensor)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
