"""Memory and FLOPs of a training step, found by running the real modules on tensors without values.

Nothing is estimated by formulas for one architecture: torch's FakeTensorMode runs every operator for its shapes alone,
so a model of eight billion parameters is run in seconds, in no memory. It follows torch's rules for the CPU, where
fused attention saves what it saves on a GPU; workspaces of libraries, and what an allocator loses, are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.errors import ModelError, UserError
from llm2clip.training.flops import OWN_OPS

Built = TypeVar("Built", bound=nn.Module)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made in the block and still in use.

    Attributes:
        now: bytes in use.
        peak: the most that were in use at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # what comes in was made before, or has been counted
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _storage(leaf)) not in given and key not in self._known:
                storage = leaf.untyped_storage()
                size = storage.nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Work:
    """A forward, and in training a backward, of samples of one size: captions of a length, or images.

    Attributes:
        forward_flops, backward_flops: of one sample.
        fixed, each: bytes in use at the peak: whatever their number, and for each sample.
    """

    forward_flops: float
    backward_flops: float
    fixed: float
    each: float

    def peak(self, count: float) -> float:
        """Bytes in use at the peak of `count` samples."""
        return self.fixed + self.each * count


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward and backward of one chunk."""

    forward: float
    backward: float


def line_through(peaks: Mapping[int, float]) -> tuple[float, float]:
    """Bytes whatever the count, and for each: a line through one or two measured (count -> bytes), exact at the larger.

    Where the line would begin below zero (operators choose other ways at larger sizes) all bytes count as each one's,
    which is more than smaller counts take.
    """
    most = max(peaks)
    least = min(peaks)
    each = (peaks[most] - peaks[least]) / (most - least) if most > least else peaks[most] / most
    fixed = peaks[most] - each * most
    return (fixed, each) if fixed >= 0 else (0.0, peaks[most] / most)


class Valueless:
    """A module whose tensors have shapes and no values.

    Args:
        build: makes the module; runs on the meta device, so that it takes no memory.

    Attributes:
        module: it, on what torch takes for a CPU.

    Raises:
        ModelError: the code of the model needs values to be built.
    """

    def __init__(self, build: Callable[[], Built]) -> None:
        try:
            with torch.device("meta"):
                self.module = build()
        except UserError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"the model cannot be built without values, which its plan needs: {str(error).splitlines()[0]}"
            ) from error
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        _give_device(self.module, self.mode)

    def flops(
        self,
        chunk: Callable[[], Any],
        call: Callable[[Any, Any], Tensor],
        *,
        train: bool = True,
        formulas: Mapping[Any, Any] | None = None,
    ) -> Flops:
        """FLOPs of one chunk, whatever the model recomputes counted again.

        Args:
            chunk: makes the input, of tensors without values.
            call: the module and its input -> what a loss is taken of.
            train: make a backward pass.
            formulas: FLOPs of operators by their arguments, beside the trainer's own.

        Raises:
            ModelError: the code of the model needs values.
        """
        counter = FlopCounterMode(display=False, custom_mapping={**OWN_OPS, **(formulas or {})})
        forward = 0

        def between() -> None:
            nonlocal forward
            forward = counter.get_total_flops()

        self._run(chunk, call, "fp32", train, counter, between)
        return Flops(float(forward), float(counter.get_total_flops() - forward))

    def peak(
        self,
        chunk: Callable[[], Any],
        call: Callable[[Any, Any], Tensor],
        *,
        precision: str = "fp32",
        train: bool = True,
    ) -> int:
        """Most bytes in use at a time while a chunk runs, beyond weights and their gradients.

        Args:
            chunk, call, train: as in `flops`.
            precision: fp32, bf16 or fp16: autocast of the forward.

        Raises:
            ModelError: the code of the model needs values.
        """
        # a run of its own: torch's counter of FLOPs keeps tensors alive
        live = LiveBytes()
        self._run(chunk, call, precision, train, live, lambda: None)
        return live.peak

    def _run(
        self,
        chunk: Callable[[], Any],
        call: Callable[[Any, Any], Tensor],
        precision: str,
        train: bool,
        watch: AbstractContextManager[Any],
        between: Callable[[], None],
    ) -> None:
        self.module.train(train)
        try:
            with self.mode, _with_gradients(self.module, train), watch:
                with torch.set_grad_enabled(train), _autocast(precision):
                    total = call(self.module, chunk()).sum()
                between()
                if total.requires_grad:
                    total.backward()
        except UserError:
            raise
        except Exception as error:  # whatever a model's code makes of tensors without values
            raise ModelError(
                f"{type(self.module).__name__} cannot be run without values, which its plan needs "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200]})"
            ) from error


@contextmanager
def _with_gradients(module: nn.Module, train: bool) -> Iterator[None]:
    """Give trained parameters gradients, as all but the first chunk of a batch find them."""
    trained = [p for p in module.parameters() if p.requires_grad] if train else []
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.grad = None


def _autocast(precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    # fp16 takes what bf16 takes
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _give_device(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of meta ones; what modules share stays shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too, so that its id is not given again
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    with mode:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = old, new
                table[name] = made[id(old)][1]  # type: ignore[assignment]
