"""Prepared launches: everything that a launch needs, except addresses, is packed once and kept.

`wp.launch` packs some twenty arguments at every call, which for a small rollout takes longer than the
kernels. A `Launch` here is recorded once for given shapes. Afterwards only the addresses in its array
descriptors are replaced. Callers borrow the prepared object from a pool, so threads and nested calls never
share one. team.py runs several launches at once.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
import warp as wp

from .arrays import cache_errors, keep
from .compat import DirectCall, array_descriptor

KEPT = 16
"""Number of shapes of one kind whose prepared launches are kept."""
KEPT_BYTES = 1 << 24
"""Scratch (`nbytes`) up to which a prepared object is kept; making a larger one costs little beside its
work.
"""

PREPARING = threading.RLock()
"""Held while kernels are made and loaded, because Warp's modules are not thread-safe."""

tracer: Any = None
"""The open trace of this process, see tracing.py."""


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context of a named part of a pass, recorded while a trace is open."""
    return contextlib.nullcontext() if tracer is None else tracer.span(name)


T = TypeVar("T")


def array(itemsize: int, *shape: int, components: int = 0) -> Any:
    """Returns the descriptor of a contiguous array that has no address yet. The last axes can be the
    components of a vector element.
    """
    strides = [itemsize] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    axes = len(shape) - components
    return array_descriptor()(data=0, ndim=axes, shape=shape[:axes], strides=strides[:axes])


class Launch:
    """A kernel with its arguments, recorded.

    Args:
        kernel: The kernel.
        dim: Its threads, on one axis or more.
        values: Its arguments by name, arrays as descriptors from `array`. There may be more, for other
            kernels.
        device: Warp's, or one that stands for it.
        block_dim: Threads of a block on a GPU.

    Raises:
        TypeError: an argument of the kernel is not among the values.
    """

    def __init__(
        self, kernel: wp.Kernel, dim: Any, values: Mapping[str, Any], device: Any, block_dim: int = 256
    ) -> None:
        self._index = {a.label: i for i, a in enumerate(kernel.adj.args)}
        missing = [name for name in self._index if name not in values]
        if missing:
            raise TypeError(f"{kernel.key}: no value for the argument {', '.join(missing)}")
        with cache_errors():
            # an empty launch records nothing; a device that is not Warp's records it itself
            self._command: Any = getattr(device, "record_launch", wp.launch)(
                kernel,
                dim=dim,
                inputs=[values[name] for name in self._index],
                device=device,
                record_cmd=True,
                record_tape=False,
                block_dim=block_dim,
            )
        self.kernel = kernel
        self.direct = direct = DirectCall(self._command) if DirectCall.possible(self._command) else None
        self._run: Callable[[], None] = direct or self._command.launch
        self.resize: Callable[[int], None] = direct.resize if direct else self._command.set_dim
        """Sets the number of threads of a launch with one axis."""
        self.put: Callable[[str, int], None] = direct.put if direct else self._put
        """Replaces the integer argument of this name."""

    def _put(self, name: str, value: int) -> None:
        self._command.set_param_at_index(self._index[name], value)

    def takes(self, name: str) -> bool:
        """Whether the kernel has an argument of this name."""
        return name in self._index

    @property
    def dim(self) -> int:
        """Threads, on all axes."""
        return self._command.bounds.size

    @property
    def name(self) -> str:
        """Of the kernel's function."""
        return self.kernel.func.__name__.strip("_")

    def __call__(self) -> None:
        if tracer is None:
            self._run()
            return
        with tracer.span(self.name, self.kernel, self.dim):
            self._run()


class Pool(Generic[T]):
    """Prepared objects by key. Only one caller at a time borrows an object. The least recently used keys are
    forgotten.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._idle: OrderedDict[Hashable, list[T]] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, *key: Any) -> Iterator[T]:
        """Lends the object made by `make(*key)`."""
        idle = self._idle.setdefault(key, [])
        try:
            item = idle.pop()
        except IndexError:
            with PREPARING, torch.inference_mode(False):
                item = self._make(*key)
        try:
            yield keep(item)
        finally:
            if getattr(item, "nbytes", 0) <= KEPT_BYTES:
                idle.append(item)
            if len(self._idle) > KEPT:
                with contextlib.suppress(KeyError):
                    self._idle.popitem(last=False)
