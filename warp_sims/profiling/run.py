"""Measures where the time of a rollout and its gradients goes: every launch and every wide product, beside
the rates that the machine reaches.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import warp as wp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..arguments import check_count
from ..bridge.runtime.launches import PREPARING
from ..bridge.runtime.registry import prepare
from ..bridge.runtime.tracing import Event, trace
from ..kernels.agreement import make_combine
from ..kernels.flow import Flow, schedule
from ..kernels.policy.description import PRODUCTS, parse
from ..kernels.sweeps.rollout import make_kernels
from ..plans import Loss
from ..policies.networks import fused_network
from ..rollouts import rollout
from ..systems import System
from ..training.provenance import machine
from .attribution import REST, attribute
from .case import FLOWS, Case, make_case
from .ceilings import measure_ceilings, wait
from .generated import compare_with_generated
from .resources import cuda_rollout, device_resources, find_ptxas
from .result import FlowProfile, KernelProfile, Memory, Pass, Profile, Row, spread
from .work import Work, needed_operations, work_of

__all__ = ["profile"]

AGAINST = ("generated",)


def profile(
    system: System,
    policy: nn.Module | None = None,
    *,
    flows: Sequence[str | Flow] = FLOWS,
    batch: int = 256,
    horizon: int = 100,
    loss: Loss = None,
    control_cost: float = 0.0,
    x0: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 20,
    against: str | None = None,
    compile_times: bool = True,
    arch: int = 90,
) -> Profile:
    """Times a rollout and its gradients, launch by launch, beside the rates that this machine reaches.

    Args:
        system: The simulated system, built in or your own.
        policy: As in `rollout`; None for `MLP(state_size, (100, 100), control_size)`. A copy is used.
        flows: Names, letters or `Flow`s. They take turns, so that a change of the machine's speed concerns
            all alike.
        batch: Number of worlds.
        horizon: Number of steps.
        loss: As in `rollout`; None for "final", or the mean square of all states for a system without a loss.
        control_cost: As in `rollout`.
        x0: Initial states (batch, state_size); None for the system's, or normal ones where it has none.
        dtype: torch.float32 or torch.float64.
        device: "cpu", "cuda" or "cuda:INDEX".
        repeats: Timed forward and backward passes of each flow; as many again are traced.
        against: "generated" compares Warp's generated adjoints of the same forward pass with the hand-written
            ones.
        compile_times: Whether to compile every kernel again, to measure the time and read its registers on a
            GPU.
        arch: GPU architecture to compile for, 90 for sm_90; no GPU is needed.

    Returns:
        `Profile`: print it, or take `to_json()` and `write_trace(path)`. docs/profile.md says how everything
        is counted.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says what was expected.
        RuntimeError: another trace or profile of this process is running.
    """
    case = make_case(system, policy, flows, batch, horizon, loss, control_cost, x0, dtype, device)
    check_count("profile", "repeats", repeats)
    if against is not None and against not in AGAINST:
        raise ValueError(f"profile: against is {against!r}, expected {AGAINST[0]!r} or None")
    for flow in case.flows:
        for _ in range(2):
            _passes(case, flow)  # compiles, prepares
    ceilings = measure_ceilings(case.device, dtype)
    measured = [_Measured(flow, [], [], [], []) for flow in case.flows]
    for i in range(repeats):
        shift = i % len(measured)
        for one in [*measured[shift:], *measured[:shift]]:
            forward, backward = _passes(case, one.flow)
            one.forward.append(forward)
            one.backward.append(backward)
            one.traced.append(_traced(case, one.flow))
    for one in measured:
        one.counted.extend(_traced(case, one.flow, count=True))
    rows = compare_with_generated(system, case.policy, case.x0, horizon, repeats) if against else ([], [])
    kernels: dict[str, Any] = {}
    for one in measured:
        for event in (e for part in one.counted for e in part.events):
            if event.kernel is not None:
                kernels.setdefault(_label(event.name, one.flow), event.kernel)
    return Profile(
        system=repr(system),
        policy=_describe(case.policy),
        fused=case.problem.layout is not None,
        device=str(case.device),
        machine=_machine(case.device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        horizon=horizon,
        loss=case.loss_name,
        repeats=repeats,
        ceilings=ceilings,
        flows=tuple(_flow_profile(case, one) for one in measured),
        memory=_memory(case),
        kernels=_kernel_profiles(case, kernels, arch) if compile_times else (),
        arch=arch,
        ptxas=find_ptxas() is not None,
        against=tuple(rows[0]),
        versions={name: version(name) for name in ("warp-lang", "torch")},
        notes=(*case.notes, *rows[1]),
    )


# Measuring


class _Measured(NamedTuple):
    flow: Flow
    forward: list[float]
    backward: list[float]
    traced: "list[tuple[_Part, _Part]]"
    counted: "list[_Part]"


class _Part(NamedTuple):
    """One traced pass."""

    events: list[Event]
    start: int
    end: int


def _forward(case: Case, flow: Flow) -> Tensor:
    out = rollout(
        case.system,
        case.policy,
        case.x0,
        horizon=case.horizon,
        flow=flow,
        loss=case.loss,
        control_cost=case.control_cost,
    )
    assert out.loss is not None
    return out.loss


def _passes(case: Case, flow: Flow) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    case.policy.zero_grad(set_to_none=True)
    wait(case.device)
    start = time.perf_counter()
    value = _forward(case, flow)
    wait(case.device)
    between = time.perf_counter()
    value.backward()
    wait(case.device)
    return between - start, time.perf_counter() - between


def _traced(case: Case, flow: Flow, count: bool = False) -> tuple[_Part, _Part]:
    """The events of both passes; with `count` also torch's operations, and then without sensible times."""
    case.policy.zero_grad(set_to_none=True)
    wait(case.device)
    if not count:
        return _recorded(case, flow, None)
    with TorchOperations() as operations:
        return _recorded(case, flow, lambda: operations.total)


def _recorded(case: Case, flow: Flow, count: Callable[[], int] | None) -> tuple[_Part, _Part]:
    with trace(case.device, count) as tracer:
        with tracer.span("forward"):
            value = _forward(case, flow)
        wait(case.device)
        with tracer.span("backward"):
            value.backward()
        events = tracer.events()
    return _part(events, "forward"), _part(events, "backward")


class TorchOperations(TorchDispatchMode):
    """Counts the operations of torch's products by torch's own formulas.

    `FlopCounterMode` has the same formulas, but also follows modules, which fails under `torch.func.vjp`.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _part(events: list[Event], name: str) -> _Part:
    whole = next(event for event in events if event.name == name and event.kernel is None)
    inside = [e for e in events if e is not whole and whole.start <= e.start and e.end <= whole.end]
    return _Part(inside, whole.start, whole.end)


# Results


def _flow_profile(case: Case, one: _Measured) -> FlowProfile:
    base, check = schedule(one.flow.value, case.horizon, None, "profile")
    needed = needed_operations(case.problem, base, check) or (None, None)
    passes = []
    for i, times in enumerate((one.forward, one.backward)):
        parts = [traced[i] for traced in one.traced]
        rows = _rows(case, parts, one.counted[i], base, check)
        last = parts[-1]
        passes.append(
            Pass(
                spread(times),
                spread([(part.end - part.start) / 1e9 for part in parts]),
                tuple(sorted(rows, key=lambda row: -row.time.median)),
                needed[i],
                tuple(last.events),
                (last.start, last.end),
            )
        )
    ratios = [backward / forward for forward, backward in zip(one.forward, one.backward, strict=True)]
    return FlowProfile(one.flow.value, passes[0], passes[1], spread(ratios))


def _rows(case: Case, parts: Sequence[_Part], counted: _Part, base: str, check: str) -> Iterator[Row]:
    divided = [attribute(part.events, part.start, part.end) for part in parts]
    wall = sum(part.end - part.start for part in parts)
    named = _by_path(parts[-1].events)
    torch_operations: dict[str, int] = {}
    for path, events in _by_path(counted.events).items():
        torch_operations[path] = sum(event.operations for event in events)
    for name in dict.fromkeys([*(path for one in divided for path in one), REST]):
        events = named.get(name, [])
        inner = name.split(" / ")[-1]
        work = work_of(inner, case.problem, base, check) if events else Work(None, None)
        counted_by_torch = torch_operations.get(name) or None
        yield Row(
            name,
            len(events),
            len({event.thread for event in events}),
            spread([one.get(name, 0) / 1e9 for one in divided]),
            sum(one.get(name, 0) for one in divided) / wall,
            counted_by_torch if work.operations is None else work.operations,
            work.bytes,
        )


def _by_path(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Events by the names that `attribute` gives them."""
    found: dict[str, list[Event]] = {}
    open_: dict[int, list[tuple[int, str]]] = {}
    for event in events:
        stack = open_.setdefault(event.thread, [])
        while stack and stack[-1][0] <= event.start:
            stack.pop()
        path = f"{stack[-1][1]} / {event.name}" if stack else event.name
        stack.append((event.end, path))
        found.setdefault(path, []).append(event)
    return found


def _memory(case: Case) -> tuple[Memory, ...]:
    """What the forward pass keeps for the backward pass, besides the parameters themselves."""
    kept: dict[int, Tensor] = {}
    own = {q.data_ptr() for q in case.policy.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.setdefault(tensor.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = _forward(case, case.flows[0])
    del value
    p = case.problem
    names: dict[tuple[int, ...], str] = {
        (p.horizon + 1, p.nworld, p.state_size): "states",
        (p.horizon, p.nworld, p.control_size): "controls",
    }
    if p.layout is not None:
        names |= {(p.layout.packed,): "packed parameters"}
    found = [
        Memory(
            names.get(tuple(t.shape), "hidden activations" if p.layout is not None else "other"),
            tuple(t.shape),
            t.numel() * t.element_size(),
        )
        for t in kept.values()
    ]
    return tuple(sorted(found, key=lambda memory: -memory.bytes))


# Kernels


def _kernel_profiles(case: Case, ran: dict[str, Any], arch: int) -> tuple[KernelProfile, ...]:
    """Compile time of the kernels that ran, and resources of those that a GPU runs instead or as well."""
    p = prepare(case.system.number, case.x0.dtype, case.device)
    # a CPU may run another form of them
    forms = make_kernels(p.functions, p.dtype, on_cpu=False)
    fused = fused_network(case.policy)
    if fused is None:
        on_gpu = {"simulate": forms.simulate, "loss": forms.loss}
    else:
        sweep = cuda_rollout(p.functions, p.dtype, fused.description, case.problem.nworld)
        on_gpu = {sweep.func.__name__: sweep}
    for flow in case.flows:
        two = flow is Flow.COMBINED
        on_gpu[_label("adjoint", flow)] = forms.adjoint[int(two)]
        if two:
            on_gpu["combine"] = make_combine(p.dtype)
    on_cpu = ran if case.device.type == "cpu" else {}
    if on_cpu:
        _cold_seconds(make_combine(p.dtype))  # the first of a process also reads Warp's headers
    return tuple(
        KernelProfile(
            name,
            _cold_seconds(on_cpu[name]) if name in on_cpu else None,
            device_resources(on_gpu[name], arch) if name in on_gpu else None,
        )
        for name in dict.fromkeys([*on_gpu, *ran])
    )


def _label(name: str, flow: Flow) -> str:
    """Name of a kernel in the table of kernels: adjoint sweeps differ by the number of fields."""
    return f"{name} of two fields" if flow is Flow.COMBINED and name.endswith("adjoint") else name


def _cold_seconds(kernel: wp.Kernel) -> float:
    """Seconds to compile a kernel's module for a CPU, past every cache."""
    with tempfile.TemporaryDirectory() as folder, PREPARING:
        start = time.perf_counter()
        wp.compile_aot_module(kernel.module, device="cpu", module_dir=folder)
        return time.perf_counter() - start


# Descriptions


def _describe(policy: nn.Module) -> str:
    """The kind of a policy, and of a fused one the sizes between its products."""
    fused, kind = fused_network(policy), type(policy).__name__
    if fused is None:
        return kind
    first, operations = parse(fused.description)
    return f"{kind} {'-'.join(map(str, [first, *(op.width for op in operations if op.kind in PRODUCTS)]))}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = machine()
    return f"{found['cpu']}, {found['cores']} cores"
