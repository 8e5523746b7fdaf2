"""Several policies that are simulated and differentiated in one batch of work, each on its own."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..bridge.runtime.compat import is_changed
from .networks import MLP, FusedNetwork, WaveCNN, fused_network

__all__ = ["Ensemble", "fused_ensemble"]

_KINDS = (MLP, WaveCNN, nn.Sequential)
"""Types of members: their layers are children of their own, and nothing else of theirs has values."""
_REMEDY = "take the members that do fit, or roll each policy out alone"


class _Stacked(nn.Module):
    """Weights and biases of one layer of all members; computes nothing itself."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, parameter in members[0]._parameters.items():
            assert parameter is not None
            stacked = torch.stack([m._parameters[name].detach() for m in members])  # type: ignore[union-attr]
            self.register_parameter(name, nn.Parameter(stacked, parameter.requires_grad))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(q.shape)}" for name, q in self._parameters.items() if q is not None)


class Ensemble(nn.Module):
    """K policies of one architecture that share nothing but the launches they run in.

        ensemble = ws.Ensemble([ws.MLP(10, (100, 100), 1) for seed in range(4)])
        out = ws.rollout(system, ensemble, x0, horizon=100)     # x0 (4, nworld, 10) or (nworld, 10)
        out.loss.sum().backward()                               # out.loss is (4,)

    Under `rollout` and `gradient_pair` every member has the trajectories, the loss and the gradients that it
    would have alone, on a CPU to the last bit.

    Args:
        policies: At least one `MLP`, `WaveCNN`, or `nn.Sequential` of layers that run fused (see `explain`),
            all of one type, with the same sizes, dtype, device and frozen parameters. Their values are
            copied.

    Parameters have the names and the order of a member's, and its shapes with K in front: `0.weight` is (K,
    hidden[0], in_size). torch's optimizers act component by component, so one of them over these parameters
    is K independent ones. Only what mixes components does not carry over: clip norms member by member.

    Called on states (n, in_size), the same for all members, or (K, n, in_size), it gives controls (K, n,
    out_size), evaluated by torch. `len(ensemble)` is K; `ensemble[k]`, `ensemble[a:b]` and iterating give
    policies and ensembles of their own with copies of the parameters.

    Raises:
        TypeError: a policy is none of these, not one that the fused sweeps serve, or of another type or
            dtype than the first.
        ValueError: there is no policy, or its sizes, device or frozen parameters are not those of the first.
    """

    def __init__(self, policies: Sequence[nn.Module]) -> None:
        super().__init__()
        members = _check_members(policies)
        # what the members have in common, without their values, and no part of this module's tree
        self._template = (copy.deepcopy(members[0]).to("meta"),)
        self._size = len(members)
        for name, layer in members[0]._modules.items():
            assert layer is not None
            if layer._parameters:
                self.add_module(name, _Stacked([m._modules[name] for m in members]))  # type: ignore[misc]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int | slice) -> Any:
        """A member as a policy of its own, or some of them as an ensemble of their own, with copies of the
        parameters.
        """
        if isinstance(index, slice):
            return Ensemble([self[k] for k in range(self._size)[index]])
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"Ensemble: index {index!r} is of type {type(index).__name__}, expected an int")
        if not -self._size <= index < self._size:
            raise IndexError(f"Ensemble: index {index} is out of range, there are {self._size} members")
        policy = copy.deepcopy(self._template[0])
        stacked = dict(self.named_parameters())
        policy.load_state_dict({n: q[index].detach().clone() for n, q in stacked.items()}, assign=True)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(stacked[name].requires_grad)
        return policy

    def members(self) -> list[Any]:
        """All members as policies of their own, with copies of the parameters."""
        return [self[k] for k in range(self._size)]

    def forward(self, x: Tensor) -> Tensor:
        """Controls (K, n, out_size) of states (K, n, in_size), or (n, in_size) for all members."""
        if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != self._size):
            raise ValueError(
                f"Ensemble: states have shape {tuple(x.shape)}, expected (n, in_size) or ({self._size}, n, "
                f"in_size)"
            )

        def member(parameters: dict[str, Tensor], states: Tensor) -> Tensor:
            return functional_call(self._template[0], parameters, (states,))

        return vmap(member, in_dims=(0, 0 if x.ndim == 3 else None))(dict(self.named_parameters()), x)

    def extra_repr(self) -> str:
        return f"{self._size} x {type(self._template[0]).__name__}"


def _check_members(policies: Any) -> list[nn.Module]:
    if isinstance(policies, nn.Module) or not isinstance(policies, Sequence):
        raise TypeError(
            f"Ensemble: policies is of type {type(policies).__name__}, expected a list of policies"
        )
    members = list(policies)
    if not members:
        raise ValueError("Ensemble: policies is empty, expected at least one policy")
    networks = []
    for k, policy in enumerate(members):
        network = fused_network(policy) if type(policy) in _KINDS else None
        if network is None or any(name.count(".") != 1 for name in network.parameters):
            what = f"of type {type(policy).__name__}"
            if type(policy) in _KINDS:
                what = f"a changed {type(policy).__name__} (hook, parametrization, replaced or shared layer)"
            raise TypeError(
                f"Ensemble: policy {k} is {what}, expected a plain MLP, WaveCNN or nn.Sequential of layers; "
                f"{_REMEDY}: policies that torch evaluates cannot be stacked"
            )
        if type(policy) is not type(members[0]):
            raise TypeError(
                f"Ensemble: policy {k} is of type {type(policy).__name__}, expected "
                f"{type(members[0]).__name__} like policy 0; {_REMEDY}"
            )
        networks.append(network)
    first = networks[0]
    for k, network in enumerate(networks):
        if network.description != first.description:
            raise ValueError(
                f"Ensemble: policy {k} has the operations {network.description}, expected "
                f"{first.description} like policy 0; {_REMEDY}"
            )
        for name, parameter in network.parameters.items():
            like = first.parameters[name]
            if parameter.dtype != like.dtype:
                raise TypeError(
                    f"Ensemble: parameter {name!r} of policy {k} is {parameter.dtype}, expected {like.dtype} "
                    f"like policy 0; convert one with .to()"
                )
            if parameter.device != like.device:
                raise ValueError(
                    f"Ensemble: parameter {name!r} of policy {k} is on {parameter.device}, expected "
                    f"{like.device} like policy 0; move one with .to()"
                )
            if parameter.requires_grad != like.requires_grad:
                raise ValueError(
                    f"Ensemble: parameter {name!r} of policy {k} has requires_grad="
                    f"{parameter.requires_grad}, expected {like.requires_grad} like policy 0; freeze it in "
                    f"all policies or in none"
                )
    return members


def fused_ensemble(call: str, ensemble: Ensemble) -> FusedNetwork:
    """Describes an ensemble to the fused sweeps; its parameters are stacked.

    Raises:
        TypeError: the ensemble has been changed: torch would have to evaluate it.
    """
    common = fused_network(ensemble._template[0])
    layers = ensemble._modules
    names = [name for name, layer in ensemble._template[0]._modules.items() if layer and layer._parameters]
    parameters: dict[str, Tensor] = {}
    plain = type(ensemble) is Ensemble and not is_changed(ensemble) and list(layers) == names
    for name in names if plain else ():
        layer = layers[name]
        plain = plain and type(layer) is _Stacked and not is_changed(layer)
        for key, value in layer._parameters.items() if plain and layer is not None else ():
            plain = plain and value is not None and not any(value is other for other in parameters.values())
            if value is not None:
                parameters[f"{name}.{key}"] = value
    if common is None or not plain or not _stacked_shapes(parameters, common.parameters, len(ensemble)):
        raise TypeError(
            f"{call}: policy is a changed Ensemble (subclass, hook, parametrization, replaced or shared "
            f"parameters), expected a plain one: torch does not evaluate ensembles in a rollout; roll its "
            f"members() out one by one"
        )
    return common._replace(parameters=parameters)


def _stacked_shapes(stacked: dict[str, Tensor], single: dict[str, Tensor], members: int) -> bool:
    return list(stacked) == list(single) and all(
        q.shape == (members, *like.shape) for q, like in zip(stacked.values(), single.values())
    )
