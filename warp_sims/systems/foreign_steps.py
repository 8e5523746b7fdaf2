"""Steps of foreign simulators as users give them, and the physical parameters that they take by name."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_numbers", "check_step", "with_columns"]


def check_step(system: Any, step: Any) -> None:
    """Raises TypeError unless a step is a function."""
    if not callable(step):
        raise TypeError(
            f"{type(system).__name__}: step is {step!r}, expected a function of (x, u) that returns the next "
            "states"
        )


def check_numbers(name: str, parameters: Any) -> dict[str, float]:
    """Numbers by name."""
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise TypeError(
            f"{name}: parameters is {parameters!r}, expected a dictionary of numbers by name or None"
        )
    for key, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: parameters[{key!r}] is {value!r}, expected a number, its own value")
    return {key: float(value) for key, value in parameters.items()}


def with_columns(
    step: Callable[..., Any], control_size: int, parameters: Mapping[str, float] | None
) -> Callable[..., Any]:
    """Makes a step of (x, u) that finds its parameters after the controls; without such columns it takes its
    own numbers.
    """
    if not parameters:
        return step
    numbers = dict(parameters)

    def bound(x: Any, u: Any) -> Any:
        if u.shape[1] == control_size:
            # ones of the states' kind, so that a step sees columns in either case
            one = x[:, :1] * 0 + 1
            return step(x, u, **{name: one * value for name, value in numbers.items()})
        columns = {name: u[:, control_size + i : control_size + i + 1] for i, name in enumerate(numbers)}
        return step(x, u[:, :control_size], **columns)

    return bound
