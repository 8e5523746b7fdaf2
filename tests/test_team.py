"""Launches at once: programs of them, the threads that run these, and when threads are not worth calling."""

import functools
import threading
import time

import numpy as np
import pytest
import torch
import warp as wp
from warp_sims.bridge.runtime import compat, team, tracing
from warp_sims.bridge.runtime.launches import Launch, array
from warp_sims.bridge.runtime.team import Backoff, Program, Step, Team, in_parallel


@wp.kernel(module="unique", enable_backward=False)
def append(value: int, first: int, log: wp.array(dtype=wp.int32)):
    """Writes value * 100 + thread behind what is there; log[0] counts."""
    i = first + wp.tid()
    log[0] = log[0] + 1
    log[log[0]] = value * 100 + i


VALUE, FIRST = "value", "first"


class Log:
    """Memory that `append` writes, and launches over it."""

    def __init__(self):
        self.memory = np.zeros(64, dtype=np.int32)
        self.descriptor = array(4, 64)

    def launch(self, value=0, first=0, dim=1):
        return Launch(append, dim, {"value": value, "first": first, "log": self.descriptor}, "cpu")

    def take(self):
        """What was written since the last call."""
        found = self.memory[1 : 1 + self.memory[0]].tolist()
        self.memory[:] = 0
        return found

    def point(self):
        self.descriptor.data = self.memory.ctypes.data


def make_programs():
    """Two programs of launches that share an object each, what they write, and their logs."""
    logs = [Log(), Log()]
    programs, expected = [], []
    for i, log in enumerate(logs):
        launch = log.launch()
        steps = [(2, {VALUE: 1 + i, FIRST: 0}), (1, {VALUE: 1 + i, FIRST: 7}), (3, {VALUE: 5, FIRST: 2})]
        programs.append(Program([Step(launch, dim, values) for dim, values in steps]))
        expected.append([100 * v[VALUE] + v[FIRST] + k for dim, v in steps for k in range(dim)])
    return programs, expected, logs


ROADS = ["native", "one thread", "own threads", "python", "python, own threads", "another Warp"]


@pytest.mark.parametrize("road", ROADS)
def test_programs(monkeypatch, road):
    """Every launch runs once, in order, with its own integers, at the addresses of the moment, each time."""
    monkeypatch.setattr(team, "_backoff", backoff := Backoff())
    if road == "one thread":
        backoff.report(elapsed=10**9, work=0)
    if "own threads" in road:
        monkeypatch.setattr(team, "openmp", lambda: None)
    if road == "another Warp":
        monkeypatch.setattr(compat, "DIRECT_CALLS", "none")
    if "python" in road:
        monkeypatch.setattr(team, "_calls", lambda task: None)
    programs, expected, logs = make_programs()
    together = Team(programs)
    assert isinstance(together._run, team._Job) == (road in ROADS[:3])
    for _ in range(3):
        for log in logs:
            log.memory = np.zeros(64, dtype=np.int32)
            log.point()
        together()
        assert [log.take() for log in logs] == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_launches_and_programs_together(count):
    """Any number of tasks, more than there are threads too; a program may be a single launch."""
    logs = [Log() for _ in range(count)]
    tasks = [
        log.launch(3, i, 2) if i % 2 else Program([Step(log.launch(), 2, {VALUE: 3, FIRST: i})])
        for i, log in enumerate(logs)
    ]
    together = Team(tasks)
    for log in logs:
        log.point()
    for _ in range(2):
        together()
        assert [log.take() for log in logs] == [[300 + i, 301 + i] for i in range(count)]


def test_times_of_a_program():
    """A trace has every launch of a program, those of a thread one after the other."""
    programs, expected, logs = make_programs()
    together = Team(programs)
    for log in logs:
        log.point()
    before = time.perf_counter_ns()
    with tracing.trace(torch.device("cpu")) as tracer:
        together()
    events = tracer.events()
    length = time.perf_counter_ns() - before
    assert [log.take() for log in logs] == expected
    assert sorted(event.dim for event in events) == [1, 1, 2, 2, 3, 3]
    assert {event.name for event in events} == {"append"}
    assert all(0 <= event.start < event.end < length for event in events)
    for thread in {event.thread for event in events}:
        own = [event for event in events if event.thread == thread]
        assert all(a.end <= b.start for a, b in zip(own[:-1], own[1:]))
    together()
    assert len(tracer.events()) == 6
    assert [log.take() for log in logs] == expected


def test_programs_of_several_python_threads():
    """Teams that run at the same time do not meet."""
    made = [make_programs() for _ in range(4)]
    wrong = []

    def run(programs, expected, logs):
        together = Team(programs)
        for _ in range(50):
            for log in logs:
                log.point()
            together()
            if [log.take() for log in logs] != expected:
                wrong.append(expected)

    threads = [threading.Thread(target=run, args=each) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_backoff():
    """Twice as many calls alone after every bad one, up to a bound; good ones make up for them."""
    backoff = Backoff()

    def calls_alone():
        return next(i for i in range(10_000) if not backoff.alone())

    backoff.report(elapsed=1_000_000, work=1_900_000)
    assert calls_alone() == 0
    backoff.report(elapsed=100_000 + Backoff.TOLERANCE, work=100_000)
    assert calls_alone() == 0
    found = []
    for _ in range(10):
        backoff.report(elapsed=8_000_000, work=2_000_000)
        found.append(calls_alone())
    assert found == [8, 16, 32, 64, 128, 256, 512, 512, 512, 512]
    for _ in range(5):
        backoff.report(elapsed=1_000_000, work=1_900_000)
        assert calls_alone() == 0
    backoff.report(elapsed=8_000_000, work=2_000_000)
    assert calls_alone() == 32


def test_parallel_tasks():
    """All of them run, on several threads; what one raises arrives, the others still run."""
    threads, done = set(), []

    def task(i):
        threads.add(threading.get_ident())
        time.sleep(0.05)
        done.append(i)
        if i == 1:
            raise ArithmeticError("of task 1")

    with pytest.raises(ArithmeticError, match="of task 1"):
        in_parallel([functools.partial(task, i) for i in range(3)])
    assert sorted(done) == [0, 1, 2]
    assert len(threads) > 1
