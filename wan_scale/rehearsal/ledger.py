"""What an update allocates and computes, counted operation by operation on fake tensors.

    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        ...                                        # what lives on CARD is counted, what lives on HOST is not
    ledger.peak(start, stop)                       # {term: bytes} at the highest moment between two events
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# To fake tensors these are two devices, and an operation that mixes them is an error.
HOST, CARD = torch.device("cpu"), torch.device("cpu", 1)
TERMS = ("weights", "gradients", "optimizer", "EMA", "gathered", "activations")
FAKE = torch._C._TorchDispatchModeKey.FAKE
ROUND = 512  # bytes: what PyTorch's allocator on a GPU rounds to
ASKED = (aten._local_scalar_dense.default, aten.is_nonzero.default)
# A tensor without values says yes: the norm is finite, a clip needs the finite difference. In these functions the
# question is whether something is wrong, and it says no.
NO = {"interpolate"}
REPOSITORY = str(Path(__file__).resolve().parents[2])
MOVES = ("c10d", "_c10d_functional", "fsdp", "tmd")  # namespaces whose operations are between GPUs
WEIGHTS = ("weights", "gathered")
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"


class Ledger(TorchDispatchMode):
    """Follows every storage on CARD from its first operation to its release, and every product of matrices.

    Operations whose tensors are all real run as they are, so that grids and seeds keep their values.
    """

    def __init__(self, on_operation=lambda: None):
        super().__init__()
        self.on_operation = on_operation
        self.events: list[tuple[int, int]] = []  # (number of a storage, bytes that it takes or gives back)
        self.terms: list[str] = []  # by number
        self.alive: dict[int, list] = {}  # id of a storage: [weak reference, number, bytes]
        self.flops: Counter = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and each operation would pay for the wrapper

    def __enter__(self):
        self.fake, self.resize = active_fake_mode(), torch.UntypedStorage.resize_
        # no operation, but how FSDP takes and frees what it gathers
        torch.UntypedStorage.resize_ = lambda storage, size: self.resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on this rank's part
        # within a fake mode of its own DTensor asks for shapes: what it makes is nowhere
        if func.namespace == "prim" or torch._C._get_dispatch_mode(FAKE) is not self.fake:
            return func(*args, **kwargs)
        fakes = [t for t in tree_iter((args, kwargs)) if isinstance(t, FakeTensor)]
        # DTensor asks for shapes with whole tensors that it makes by empty_strided: they must not become real
        if not fakes and kwargs.get("device") != CARD and func is not aten.empty_strided.default:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in ASKED:
            return self.answer(fakes[0].dtype)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # it is no new tensor, as its fake would be
        self.on_operation()
        if not fakes and func is aten._to_copy.default:  # else PyTorch would keep the value of a single number, on HOST
            args = (self.fake.from_tensor(args[0]), *args[1:])
        found = func(*args, **kwargs)
        moved = func.namespace in MOVES
        cast = func is aten._to_copy.default and fakes and self.term(fakes[0]) in WEIGHTS
        for tensor in tree_iter(found):
            self.see(tensor, "gathered" if moved or cast else "activations")
        if moved:  # its buffers, too, from their beginning on
            self.name([t for t in fakes if self.term(t) == "activations"], "gathered")
        if kind := self.kind(func, args):
            self.flops[kind] += self.products(func, args, kwargs, found)
        return found

    def answer(self, dtype: torch.dtype):
        """The value of a tensor that has none: yes or one, for NO no."""
        frame = sys._getframe(2)
        ours = lambda file: file.startswith(REPOSITORY) and "rehearsal" not in file and ".venv" not in file
        while frame.f_back and not ours(frame.f_code.co_filename):
            frame = frame.f_back
        kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
        return kind(frame.f_code.co_name not in NO)

    # ---- Bytes -------------------------------------------------------------------------------------------------------

    def see(self, tensor, term: str) -> list | None:
        """The entry of a tensor's storage, made where it is new; None where it is not on CARD."""
        if not isinstance(tensor, FakeTensor) or tensor.fake_device != CARD or tensor.fake_mode is not self.fake:
            return None
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.alive:
            gone = lambda _: self.take(self.alive.pop(key), 0)
            self.alive[key] = [weakref.ref(storage, gone), len(self.terms), 0]
            self.terms.append(term)
            self.take(self.alive[key], storage.nbytes())
        return self.alive[key]

    def take(self, entry: list, size: int) -> None:
        size = -(-size // ROUND) * ROUND
        if size != entry[2]:
            self.events.append((entry[1], size - entry[2]))
            entry[2] = size

    def resized(self, storage, size: int):
        found = self.resize(storage, size)
        if id(storage) in self.alive:
            self.take(self.alive[id(storage)], size)
        return found

    def name(self, tensors, term: str) -> None:
        """Say what tensors are, from their beginning on."""
        for tensor in tensors:
            if entry := self.see(tensor.to_local() if isinstance(tensor, DTensor) else tensor, term):
                self.terms[entry[1]] = term

    def term(self, tensor) -> str:
        entry = self.see(tensor, "activations")
        return self.terms[entry[1]] if entry else ""

    def peak(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """{term: bytes} at the moment of most bytes in all, among the events from `start` to `stop`."""
        totals = list(accumulate(change for _, change in self.events[:stop]))
        highest = max(range(start, len(totals)), key=totals.__getitem__)
        found = dict.fromkeys(TERMS, 0)
        for number, change in self.events[: highest + 1]:
            found[self.terms[number]] += change
        return found

    # ---- FLOPs -------------------------------------------------------------------------------------------------------

    @staticmethod
    def kind(func, args) -> str:
        """Which sort of work an operation is: linear, attention, attention backward, convolution, or none ("")."""
        name = func._overloadpacket.__name__
        if name in (FORWARD, BACKWARD):
            return "attention backward" if name == BACKWARD else "attention"
        if func._overloadpacket not in flop_registry:
            return ""
        if name.startswith("convolution"):
            stride = args[4 if name.endswith("backward") else 3]
            return "linear" if max(stride) > 1 else "convolution"  # patches side by side: a linear layer
        return "linear"

    @staticmethod
    def products(func, args, kwargs, found) -> int:
        """FLOPs of an operation, 2 a multiply-add; fused attention's gradient computes the scores again: 2.5 times."""
        name = func._overloadpacket.__name__
        if name in (FORWARD, BACKWARD):
            q, k = args[:2] if name == FORWARD else args[1:3]
            return (4 if name == FORWARD else 10) * prod(q.shape) * k.shape[-2]
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=found)
