"""A prepared system whose physical parameters come as a tensor.

Its parameter struct holds addresses, so that prepared launches can be used again: the numbers are copied into
memory of the prepared system, and the sums of their cotangents are copied out. Callers borrow it, so threads
and nested calls never share one.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import warp as wp
from torch import Tensor

from ...kernels.sweeps.physical import names_of, with_values
from ...kernels.sweeps.rollout import make_kernels
from ...kernels.system import ParameterFunctions
from .arrays import stream, warp_device
from .contract import functions_of
from .launches import Pool
from .registry import find, prepare


def parameter_names(number: int) -> tuple[str, ...]:
    """Names of the physical parameters of a system with kernels, in the order of their columns."""
    return names_of(functions_of(find(number), wp.float32))


def parameter_values(number: int) -> tuple[float, ...]:
    """Their values in the system itself."""
    system: Any = find(number)
    own, params = functions_of(system, wp.float64).parameters, system.parameters(wp.float64)
    if own is not None and own.array:
        words = getattr(params, own.array).numpy()
        return tuple(float(words[place[0]]) for place in own.places)
    source = params if own is None or own.fields is None else system
    return tuple(float(getattr(source, name)) for name in parameter_names(number))


class _Words:
    """An array of `Params` with a row for each world, some of whose words are given."""

    def __init__(self, own: ParameterFunctions, params: Any, rows: int) -> None:
        base = wp.to_torch(getattr(params, own.array))
        self._base = base
        self.table = base.repeat(rows, 1)
        """(rows, words)."""
        sums = sorted({j for _, *of in own.places for j in of})
        self._own = torch.tensor([place[0] for place in own.places], device=base.device)
        self._sums = torch.tensor(sums, dtype=torch.int64, device=base.device)
        part = torch.zeros(len(own.places), len(sums), dtype=base.dtype)
        for i, (_, *of) in enumerate(own.places):
            for j in of:
                part[i, sums.index(j)] = 1.0
        self._part = part.to(base.device)

    def addresses(self) -> Tensor:
        """Of the rows."""
        first, stride = self.table.data_ptr(), self.table.stride(0) * self.table.element_size()
        return first + stride * torch.arange(self.table.shape[0], device=self.table.device)

    def put(self, values: Tensor) -> None:
        """Copies in the parameters (1 or rows, count)."""
        self.table[:, self._own] = values
        if self._sums.numel():
            self.table[:, self._sums] = self._base[self._sums] + (values - self._base[self._own]) @ self._part


class WithValues:
    """A prepared system, its parameters by world, and the place of their cotangents."""

    def __init__(
        self,
        number: int,
        dtype: torch.dtype,
        device: torch.device,
        served: int,
        queue: int,
        rows: int,
        nworld: int,
        wanted: bool,
    ) -> None:
        base = prepare(number, dtype, device)
        functions = with_values(base.functions, base.dtype)
        own, self._dtype = base.functions.parameters, dtype
        self._names, self._fields = names_of(base.functions), None if own is None else own.fields
        row = bytearray(bytes(base.params.__ctype__()))
        self._rows = torch.frombuffer(row, dtype=torch.uint8).to(device).repeat(rows, 1)
        layout = type(base.params.__ctype__())
        self._places = {name: getattr(layout, name) for name, *_ in layout._fields_}
        self._words = None if own is None or not own.array else _Words(own, base.params, rows)
        if self._words is not None and own is not None:
            place = self._places[own.array]
            # the address comes first in Warp's description of an array
            self._rows[:, place.offset : place.offset + 8].view(torch.int64)[:, 0] = self._words.addresses()
        shape = (2, nworld, len(self._names)) if wanted else (0, 0, 1)
        self.adj = torch.zeros(shape, dtype=dtype, device=device)
        """For one or two gradient fields; empty where nobody wants it."""
        params = functions.Params()
        params.base, params.adj = base.params, wp.from_torch(self.adj, requires_grad=False)
        params.values = wp.array(
            ptr=self._rows.data_ptr(),
            dtype=base.functions.Params,
            shape=(rows,),
            device=wp.device_from_torch(device),
        )
        kernels = make_kernels(functions, base.dtype, base.device.is_cpu)
        self.prepared = dataclasses.replace(
            base, functions=functions, params=params, kernels=kernels, wide=None
        )

    def put(self, values: Tensor) -> None:
        """Copies in the parameters (1 or nworld, count), and sets their cotangents to zero."""
        self.adj.zero_()
        if self._words is not None:
            self._words.put(values)
            return
        numbers = dict(zip(self._names, values.unbind(1)))
        for name, number in (self._fields(numbers) if self._fields else numbers).items():
            place = self._places[name]
            self._rows[:, place.offset : place.offset + place.size].view(self._dtype)[:, 0] = number

    def adjoint(self, fields: int) -> Tensor:
        """A copy of the cotangents of the numbers, (fields, nworld, count)."""
        return self.adj[:fields].clone()

    @property
    def nbytes(self) -> int:
        """Of its own memory."""
        words = 0 if self._words is None else self._words.table.nbytes
        return self._rows.numel() + self.adj.numel() * self.adj.element_size() + words


_with_values = Pool(WithValues)


@contextlib.contextmanager
def prepared_with(number: int, values: Tensor, nworld: int, wanted: bool) -> Iterator[WithValues]:
    """Lends a prepared system with these parameters (1 or nworld, count) and, if `wanted`, with their
    cotangents set to zero.
    """
    device = values.device
    queue = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (number, values.dtype, device, id(warp_device(device)), queue, values.shape[0], nworld, wanted)
    with _with_values.borrow(*key) as item, stream(device):
        item.put(values)
        yield item
