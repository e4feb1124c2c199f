"""A GPU that is none: tensors that say `cuda:0`, whose numbers lie on the CPU, and that count every wait.

Models run on it for real, so that code which depends on values (a sampler, an engine's loop) goes its way.
What a GPU would make of it is written down: reading a value on the host, or an upload, is counted with its
place in our tree; a tensor of the CPU beside one of the card is an error, as an index too, where torch would
move it in silence. What it cannot tell: times, streams, memory, and whether a kernel compiles.

For torch the card is of device `meta`, and `Tensor.device` says otherwise: a CPU build of torch has no device
guard for CUDA. All operations pass `PretendCard`, which runs them on the CPU's tensors inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda", 0)
_aten = torch.ops.aten
# The result's shape, or a Python number, hangs on values: the host waits for them.
_READS = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "tensor_split",
}


class ImplicitMoveError(AssertionError):
    """A tensor of the CPU met one of the card; torch fails, or moves it in silence."""


class CardTensor(torch.Tensor):
    """Numbers on the CPU that claim to lie on the card."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CardTensor:
        """Wrap numbers of the CPU."""
        with torch.inference_mode(held.is_inference()):  # a view of what was made before it is none of it
            made: CardTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=torch.device("meta"),
                requires_grad=False,
            )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Say what is held."""
        del tensor_contents
        return f"CardTensor({self.held!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The card."""
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """As tensors on a GPU say."""
        return True

    def data_ptr(self) -> int:
        """Where the numbers are, by which our own code tells tensors apart."""
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> CardTensor:
        """Copy what is held: torch's own way copies storages, and the card has none."""
        memo[id(self)] = copied = CardTensor(self.held.clone())
        return copied

    def tolist(self) -> Any:
        """Read everything: torch's own way knows no subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what runs outside the mode: nobody would count it."""
        raise ImplicitMoveError(f"{func} on the card's tensors outside of PretendCard")


@dataclass(frozen=True, slots=True)
class Wait:
    """One moment in which host and card met: which operation, and where in our tree (or another's)."""

    kind: str  # read or upload
    operation: str
    place: str


@dataclass(slots=True)
class Waits:
    """What was counted."""

    found: list[Wait] = field(default_factory=list)

    def places(self, kind: str = "read") -> list[str]:
        """Where it happened, in order."""
        return [wait.place for wait in self.found if wait.kind == kind]


class PretendCard(TorchDispatchMode):
    """While it is entered, `cuda` is there: a mode that computes for it and counts."""

    def __init__(self) -> None:
        super().__init__()
        # Only in the place of the fake mode does torch not try to start CUDA when `device="cuda"` is named.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self._counting: list[Waits] = []
        self._lifts: list[bool] = []

    def __enter__(self) -> PretendCard:
        """Begin; `torch.tensor(..., device="cuda")` then makes a CPU tensor and uploads it, as for a GPU."""
        self._lifts.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts.pop())

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        """Count waits for the length of a `with` block."""
        waits = Waits()
        self._counting.append(waits)
        try:
            yield waits
        finally:
            self._counting.remove(waits)

    def note(self, kind: str, operation: str) -> None:
        """Write down that the host waits."""
        for waits in self._counting:
            waits.found.append(Wait(kind, operation, _place()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on what the tensors hold, and say what a GPU would have waited for."""
        del types
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # inference mode passes compositions on whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        has_card = any(isinstance(x, CardTensor) for x in tensors)
        name = func.overloadpacket.__name__
        wanted = kwargs.get("device")
        goes_to_card = has_card if wanted is None else torch.device(wanted).type != "cpu"
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "_to_copy" and has_card != goes_to_card:
            if args[0].numel():
                self.note("upload" if goes_to_card else "read", name)
        elif name == "copy_" and _place().startswith("transformers/"):  # theirs to decide; seen all the same
            if isinstance(args[0], CardTensor) != isinstance(args[1], CardTensor):
                self.note("upload" if isinstance(args[0], CardTensor) else "read", name)
        elif has_card:
            _check_one_device(name, tensors)
            if name in _READS or _has_mask_index(name, args) or _has_open_repeats(func, kwargs):
                self.note("read", name)
        done = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        return _rewrap(func, args, kwargs, done, goes_to_card=goes_to_card)


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, CardTensor) else value


def _rewrap(func: Any, args: Any, kwargs: Any, done: Any, *, goes_to_card: bool) -> Any:
    """Wrap results, but hand back the very tensors that were written in place."""
    written = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    known = {id(_unwrap(x)): x for x in tree_flatten(written)[0] if isinstance(x, torch.Tensor)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return CardTensor(value) if goes_to_card else value

    return tree_map(wrap, done)


def _check_one_device(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Numbers without dimensions may come from the CPU: torch passes them to a kernel as arguments."""
    strangers = [x for x in tensors if not isinstance(x, CardTensor) and (x.dim() or name == "copy_")]
    if strangers:
        shapes = [tuple(x.shape) for x in strangers]
        raise ImplicitMoveError(f"{name} at {_place()}: CPU tensors {shapes} beside the card's")


def _has_mask_index(name: str, args: Any) -> bool:
    """A bool index is turned into places first, and their number is read."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _has_open_repeats(func: Any, kwargs: Any) -> bool:
    """Repeats by a tensor, without the size of what comes out."""
    return func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


def _place() -> str:
    """The innermost function of ours, or of Transformers, that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        for root in ("/src/sentei/", "/site-packages/transformers/"):
            if root in file:
                prefix = "transformers/" if "transformers" in root else ""
                return f"{prefix}{file.split(root)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the test itself"


def put_on_card(module: Any) -> Any:
    """Move a module's weights and buffers onto the card, in place; the mode must be entered."""
    for inner in module.modules():
        for name, weight in inner._parameters.items():
            if weight is not None:
                inner._parameters[name] = nn.Parameter(weight.detach().to(CARD), requires_grad=False)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = buffer.to(CARD)
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    return module
