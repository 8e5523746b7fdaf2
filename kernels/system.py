"""What a simulated system hands to the engine: a parameter struct and pure device functions for one dtype."""

from __future__ import annotations

from typing import Any, NamedTuple


class BlockFunctions(NamedTuple):
    """Step and adjoint of up to `layout.BLOCK` neighbouring worlds at once, for CPUs. Their numbers can lie
    in the lanes of a vector, which compilers do not do automatically.

    They are optional, and give the results of `step` and `step_vjp` up to rounding. Both work in place, on
    contiguous trajectories, for the worlds world0 ... world0 + worlds - 1 of step t:

        step(states, controls, p, t, nworld, world0, worlds)
            reads states[t] and controls[t], writes states[t + 1]
        step_vjp(states, controls, p, t, nworld, world0, worlds, adj, adj_u)
            reads states[t], states[t + 1] = step(states[t]), controls[t];
            adj[f] holds the cotangent of states[t + 1] and becomes that of states[t]; writes adj_u[f, t]

    with states (horizon + 1, nworld) and adj (fields, nworld) of `State`, controls (horizon, nworld) and
    adj_u (fields, horizon, nworld) of `Control`, and one or two gradient fields f.
    """

    step: Any
    step_vjp: Any


class MemoryFunctions(NamedTuple):
    """Step and adjoint of one world in memory, for GPUs and states that do not fit the registers of a thread.

    Warp passes vectors by value, so they go through the registers of a thread, and what does not fit is
    spilled. These functions work on memory, one component at a time. They are optional, and give the results
    of `step` and `step_vjp` up to rounding.

        step(states, controls, p, t, world)
            reads states[t, world] and controls[t, world], writes states[t + 1, world]
        step_vjp(states, controls, p, t, world, adj, adj_u)
            reads states[t, world], states[t + 1, world] = step(states[t, world]), controls[t, world];
            adj[f] holds the cotangent of states[t + 1, world] and becomes that of states[t, world];
            writes adj_u[f]
        loss(states, p, t, world) -> dtype
            cost of states[t, world]
        loss_vjp(states, p, t, world, adj_loss, adj)
            reads states[t, world], adds the cotangent of its cost to every adj[f]

    with states (horizon + 1, nworld) and adj (fields,) of `State`, controls (horizon, nworld) and adj_u
    (fields,) of `Control`, and one or two gradient fields f. If `loss` or `loss_vjp` is None, that of
    `DeviceFunctions` is taken.
    """

    step: Any
    step_vjp: Any = None
    loss: Any = None
    loss_vjp: Any = None


class ParameterFunctions(NamedTuple):
    """Physical parameters: numbers that a rollout may be given as tensors, one for all worlds or one a world.

    `Values` is a vector type with as many numbers as there are names:

        step_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> Values
            cotangents of the numbers through one step, a `@wp.func`
        fields(numbers) -> numbers
            what the fields of `Params` are for numbers by name: a function of dictionaries of tensors, by
            arithmetic alone

    Without `fields` the names are names of fields of `Params`; with it each is an attribute of the system.

    Numbers may also be words of one array of `Params`, whose name is `array`. For each number `places` then
    holds the index of its word, followed by the indices of words that are sums which contain it; `fields` is
    None.
    """

    names: tuple[str, ...]
    Values: Any
    step_vjp: Any
    fields: Any = None
    array: str = ""
    places: tuple[tuple[int, ...], ...] = ()


class DeviceFunctions(NamedTuple):
    """Device functions of a system for one dtype. Cache the factory that makes them, because kernels are
    compiled for each object that it returns.

    With `State` and `Control` vectors of the system's sizes and of that dtype, and `Params` a Warp struct:

        step(x: State, u: Control, p: Params) -> State
            the next state
        step_vjp(x: State, u: Control, p: Params, adj_x_next: State) -> State, Control
            cotangents of x and u
        loss(x: State, p: Params) -> dtype
            cost of one state
        loss_vjp(x: State, p: Params, adj_loss: dtype) -> State
            cotangent of x

    All are `@wp.func`s without side effects. `loss` and `loss_vjp` come together or not at all. Without a
    `step_vjp` Warp generates the adjoints, that of the loss too. They are compared with finite differences in
    float64 before their first use, and a wrong one raises ValueError; see sweeps/generated_vjp.py.

    `parameters` says which numbers a rollout may be given as physical parameters, and how to compute their
    cotangents. Without it they are all scalars of `Params`, and Warp generates their cotangents, which are
    checked in the same way.

    `block` and `memory` are optional further forms of the step, for CPUs and for large states on GPUs. `wide`
    is a block form for `wide_worlds` worlds instead of `layout.BLOCK`, the number that a policy takes at
    once. Sweeps without a policy run it; it is worth having if the step gains from vectors of more lanes.
    """

    Params: Any
    State: Any
    Control: Any
    step: Any
    step_vjp: Any = None
    loss: Any = None
    loss_vjp: Any = None
    block: BlockFunctions | None = None
    memory: MemoryFunctions | None = None
    wide: BlockFunctions | None = None
    wide_worlds: int = 0
    parameters: ParameterFunctions | None = None
