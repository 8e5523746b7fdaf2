"""Robots beside MJX and MuJoCo: time of a world-step, open loop, forwards and with gradients, in one run.

    python -m benchmarks.robots [--models hopper ant] [--batch 64 1024] [--json FILE]

Needs gymnasium (its MJCF files), mujoco and mujoco-mjx: pip install "warp-sims[robots,bench]" gymnasium
mujoco-mjx.

All take the same file, start from the same states and follow the same controls for 32 steps in float32
(MuJoCo: in float64). "free" is without contact and limits. With contact each has its own model of it: MuJoCo
and MJX solve for constraint forces, MJX with one Newton iteration and four of its line search, without which
it has no reverse mode; warp-sims has springs, and takes as many substeps as these need (named in the table,
each counted within its step). Gradients are those of the sum of the last state with respect to the first
state and all controls. Contestants take turns, and the best turn of each counts (of seven, or of two where a
call takes more than a second). The first calls, with all that is compiled, are given in seconds.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warp as wp

import warp_sims as ws

STEPS = 32
ROUNDS = 7
SLOW = 1.0  # s: a contestant that takes longer has two turns only
SETTINGS = {
    "hopper": {},
    "ant": {"friction_stiffness": 50.0},  # with 1000 an ankle of 0.08 kg asks for 62 substeps
}


def mjcf_of(name: str) -> str:
    """Text of a gymnasium model with Euler's integrator, as all contestants take it."""
    import gymnasium

    text = (Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / f"{name}.xml").read_text()
    return text.replace('integrator="RK4"', 'integrator="Euler"')


def problem(robot: ws.Robot, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """States (batch, size) near rest, and controls (STEPS, batch, nu)."""
    states = robot.initial_states(batch, seed=1).numpy()
    random = np.random.RandomState(2)
    return states, random.uniform(-1, 1, (STEPS, batch, robot.control_size)).astype(np.float32)


def ours(robot: ws.Robot, states: np.ndarray, controls: np.ndarray) -> dict[str, Callable[[], Any]]:
    x0 = torch.tensor(states, requires_grad=True)
    u = torch.tensor(controls, requires_grad=True)
    ones = torch.zeros(STEPS + 1, *states.shape)
    ones[-1] = 1.0

    def forward() -> Any:
        with torch.no_grad():
            return ws.simulate(robot, x0, u)

    def gradient() -> Any:
        return torch.autograd.grad(ws.simulate(robot, x0, u), (x0, u), ones)

    return {"forward": forward, "gradient": gradient}


def mjx_contestant(
    text: str, contact: bool, states: np.ndarray, controls: np.ndarray
) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp
    import mujoco
    from mujoco import mjx

    # With as many threads as two cores, MJX's gradient through contact waits for itself for ever (jax 0.10).
    os.environ.setdefault("NPROC", "4")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    m = mujoco.MjModel.from_xml_string(text)
    if contact:
        m.opt.iterations, m.opt.ls_iterations = 1, 4
    else:
        m.opt.disableflags |= int(
            mujoco.mjtDisableBit.mjDSBL_CONSTRAINT | mujoco.mjtDisableBit.mjDSBL_CONTACT
        )
    model = mjx.put_model(m)
    data = mjx.make_data(model)

    def last(x: Any, u: Any) -> Any:
        def step(d: Any, c: Any) -> tuple[Any, None]:
            return mjx.step(model, d.replace(ctrl=c)), None

        d, _ = jax.lax.scan(step, data.replace(qpos=x[: m.nq], qvel=x[m.nq :]), u)
        return jnp.concatenate([d.qpos, d.qvel])

    many = jax.vmap(last, in_axes=(0, 1))
    forward = jax.jit(many)
    gradient = jax.jit(jax.grad(lambda x, u: many(x, u).sum(), argnums=(0, 1)))
    x, u = jnp.array(states), jnp.array(controls)
    return {
        "forward": lambda: jax.block_until_ready(forward(x, u)),
        "gradient": lambda: jax.block_until_ready(gradient(x, u)),
    }


def mujoco_contestant(
    text: str, contact: bool, states: np.ndarray, controls: np.ndarray
) -> dict[str, Callable[[], Any]]:
    import mujoco
    from mujoco import rollout

    m = mujoco.MjModel.from_xml_string(text)
    if not contact:
        m.opt.disableflags |= int(
            mujoco.mjtDisableBit.mjDSBL_CONSTRAINT | mujoco.mjtDisableBit.mjDSBL_CONTACT
        )
    threads = torch.get_num_threads()
    data = [mujoco.MjData(m) for _ in range(threads)]
    size = mujoco.mj_stateSize(m, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    first = np.zeros((len(states), size))
    first[:, 1 : 1 + states.shape[1]] = states
    u = controls.transpose(1, 0, 2).astype(np.float64)
    pool = rollout.Rollout(nthread=threads)
    return {"forward": lambda: pool.rollout(m, data, first, u)}


def measure(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of the first call, and of the best of the others, which take turns."""
    first, best = {}, {}
    for name, call in contestants.items():
        start = time.perf_counter()
        call()
        first[name], best[name] = time.perf_counter() - start, float("inf")
    for turn in range(rounds):
        for name, call in contestants.items():
            if turn > 1 and best[name] > SLOW:
                continue
            if best[name] < SLOW:
                call()  # after another contestant's turn
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: (first[name], best[name]) for name in contestants}


def rows(
    models: list[str], batches: list[int], contacts: list[bool], rounds: int, file: Path | None
) -> list[dict[str, Any]]:
    """Measures and prints one row after the other, and writes those so far to `file`."""
    found = []
    for name in models:
        text = mjcf_of(name)
        for contact in contacts:
            settings = {"contact": "ground", **SETTINGS.get(name, {})} if contact else {"contact": "none"}
            robot = ws.Robot.from_mjcf(text, limits=contact, **settings)
            for batch in batches:
                states, controls = problem(robot, batch)
                everyone = {
                    "warp-sims": ours(robot, states, controls),
                    "mjx": mjx_contestant(text, contact, states, controls),
                    "mujoco": mujoco_contestant(text, contact, states, controls),
                }
                for what in ("forward", "gradient"):
                    timed = measure({k: c[what] for k, c in everyone.items() if what in c}, rounds)
                    scale = 1e6 / (batch * STEPS)
                    row = {
                        "model": name,
                        "contact": contact,
                        "substeps": robot.substeps,
                        "batch": batch,
                        "what": what,
                        **{f"{k} us": best * scale for k, (_, best) in timed.items()},
                        **{f"{k} first s": first for k, (first, _) in timed.items()},
                        "mjx / warp-sims": timed["mjx"][1] / timed["warp-sims"][1],
                    }
                    found.append(row)
                    print(line(row), flush=True)
                    if file:
                        file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def line(r: dict[str, Any]) -> str:
    native = f"{r['mujoco us']:8.2f}" if "mujoco us" in r else " " * 8
    setting = f"contact, {r['substeps']} substeps" if r["contact"] else "free"
    return (
        f"{r['model']:8} {setting:20} {r['batch']:5} {r['what']:9} {r['warp-sims us']:9.3f} "
        f"{r['mjx us']:8.2f} {native} {r['mjx / warp-sims']:8.1f} "
        f"{r['warp-sims first s']:9.1f} {r['mjx first s']:7.1f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["hopper", "ant"], metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1024], metavar="N")
    parser.add_argument("--only", choices=("free", "contact"), help="leave the other out")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wp.config.log_level = wp.LOG_ERROR
    with tempfile.TemporaryDirectory() as cache:  # so that first calls compile
        wp.config.kernel_cache_dir = cache
        print(
            f"{'model':8} {'setting':20} {'batch':>5} {'what':9} {'warp-sims':>9} {'mjx':>8} "
            f"{'mujoco':>8} {'ratio':>8} {'first s':>9} {'mjx':>7}    [us a world-step]"
        )
        contacts = [
            contact for contact, name in ((False, "free"), (True, "contact")) if options.only in (None, name)
        ]
        rows(options.models, options.batch, contacts, options.rounds, options.json)


if __name__ == "__main__":
    main()
