"""Skips everything here where there is no C++ compiler, and says at the end what was executed."""

import pytest

from . import library
from .device import EXECUTED, Emulator


def pytest_collection_modifyitems(items):
    if library.compiler() is None:
        for item in items:
            if library.HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs g++ or clang++"))


@pytest.fixture(scope="session")
def emulator():
    """An emulated GPU; tests leave it as it is made."""
    return Emulator()


def pytest_terminal_summary(terminalreporter):
    if EXECUTED:
        kernels, orders = (len({key[i] for key in EXECUTED}) for i in (0, 1))
        terminalreporter.write_line(
            f"emulated: {kernels} kernels, {EXECUTED.total()} launches, {orders} orders of lanes"
        )
