"""Checks of arguments that several calls share."""

from typing import Any

import torch


def check_count(call: str, name: str, value: Any, least: int = 1) -> None:
    """Raises TypeError unless `value` is an int, ValueError where it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{call}: {name} is {value!r} of type {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{call}: {name} is {value}, expected at least {least}")


def usable_device(call: str, device: torch.device | str) -> torch.device:
    """Returns a CPU, or a GPU that is there with its number.

    Raises:
        ValueError: it is neither.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{call}: device {device!r} is none ({error}); give cpu, cuda or cuda:INDEX"
        ) from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"{call}: device is {str(place)!r}, expected cpu, cuda or cuda:INDEX")
    if place.type == "cpu":
        return place
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= count:
        raise ValueError(
            f"{call}: device {str(place)!r} cannot be used, torch finds {count} CUDA devices; give cpu, or "
            "use a machine with a GPU and a torch with CUDA"
        )
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
