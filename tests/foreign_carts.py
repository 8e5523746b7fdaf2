"""The cart-pole as a torch step, a JAX step and launches on a Warp tape, as a user would write them."""

import functools
from typing import Any

import warp as wp
from reference import cartpole

import warp_sims as ws


def sizes(cart: ws.CartPole) -> dict[str, int]:
    return {"state_size": cart.state_size, "control_size": cart.control_size}


def numbers(cart: ws.CartPole) -> dict[str, float]:
    names = ("dt", "gravity", "pole_mass", "total_mass")
    return {name: getattr(cart, name) for name in names} | {"length": cart.pole_length}


def torch_cart(cart: ws.CartPole, **options: Any) -> ws.TorchSystem:
    step = functools.partial(cartpole.step, **numbers(cart))
    return ws.TorchSystem(step, loss=cartpole.loss, **sizes(cart), **options)


def jax_cart(cart: ws.CartPole, **options: Any) -> ws.JaxSystem:
    import jax.numpy as jnp

    own = numbers(cart)

    def step(x, u, **given):
        p = own | {name.replace("pole_length", "length"): value for name, value in given.items()}
        moment = p["pole_mass"] * p["length"]
        angle, rate = x[:, 2::2], x[:, 3::2]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        push = (u + moment * sin * rate**2) / p["total_mass"]
        inertia = p["length"] * (4.0 / 3.0 - p["pole_mass"] * cos**2 / p["total_mass"])
        acceleration = (p["gravity"] * sin - cos * push) / inertia
        pull = (sin * rate**2 - acceleration * cos).sum(axis=1, keepdims=True)
        rate_next = rate + p["dt"] * acceleration
        velocity_next = x[:, 1:2] + p["dt"] * (u + moment * pull) / p["total_mass"]
        poles = jnp.stack((angle + p["dt"] * rate_next, rate_next), axis=2).reshape(x.shape[0], -1)
        return jnp.concatenate((x[:, :1] + p["dt"] * velocity_next, velocity_next, poles), axis=1)

    def cost(x):
        return 1.0 - jnp.cos(x[:, 2::2]).mean(axis=1)

    return ws.JaxSystem(step, loss=cost, **sizes(cart), **options)


@functools.cache
def cart_kernels(poles: int, dtype: Any) -> tuple[wp.Kernel, wp.Kernel]:
    """Accelerations of a cart with `poles` poles, then the step, as two kernels with an array between."""

    @wp.kernel(module="unique", module_options={"max_unroll": 16})
    def accelerate(
        x: wp.array2d(dtype=dtype),
        u: wp.array2d(dtype=dtype),
        gravities: wp.array(dtype=dtype),
        pole_masses: wp.array(dtype=dtype),
        total_masses: wp.array(dtype=dtype),
        lengths: wp.array(dtype=dtype),
        acc: wp.array2d(dtype=dtype),
    ):
        world = wp.tid()
        gravity = gravities[world]
        pole_mass = pole_masses[world]
        total_mass = total_masses[world]
        length = lengths[world]
        moment = pole_mass * length
        pull = dtype(0.0)
        for i in range(wp.static(poles)):
            s = wp.sin(x[world, 2 + 2 * i])
            c = wp.cos(x[world, 2 + 2 * i])
            w = x[world, 3 + 2 * i]
            push = (u[world, 0] + moment * s * w * w) / total_mass
            a = (gravity * s - c * push) / (
                length * (dtype(4.0) / dtype(3.0) - pole_mass * c * c / total_mass)
            )
            acc[world, 1 + i] = a
            pull = pull + s * w * w - a * c
        acc[world, 0] = (u[world, 0] + moment * pull) / total_mass

    @wp.kernel(module="unique", module_options={"max_unroll": 16})
    def integrate(
        x: wp.array2d(dtype=dtype),
        acc: wp.array2d(dtype=dtype),
        dt: dtype,
        cart_next: wp.array2d(dtype=dtype),
        poles_next: wp.array2d(dtype=dtype),
    ):
        world = wp.tid()
        v = x[world, 1] + dt * acc[world, 0]
        cart_next[world, 0] = x[world, 0] + dt * v
        cart_next[world, 1] = v
        for i in range(wp.static(poles)):
            w = x[world, 3 + 2 * i] + dt * acc[world, 1 + i]
            poles_next[world, 2 * i] = x[world, 2 + 2 * i] + dt * w
            poles_next[world, 2 * i + 1] = w

    return accelerate, integrate


def tape_cart(
    cart: ws.CartPole, nworld: int, dtype: Any = wp.float64, parameters: Any = (), **options: Any
) -> ws.TapeSystem:
    """For `nworld` worlds; the next state in two arrays, the cart's and the poles'."""
    accelerate, integrate = cart_kernels(cart.poles, dtype)
    p = numbers(cart)

    def array(size):
        return wp.zeros((nworld, size), dtype=dtype, requires_grad=True)

    x, u, acc = array(cart.state_size), array(1), array(1 + cart.poles)
    outputs = [array(2), array(2 * cart.poles)]
    constants = {
        name: wp.full(
            nworld,
            p[name.removeprefix("pole_") if name == "pole_length" else name],
            dtype=dtype,
            requires_grad=True,
        )
        for name in ("gravity", "pole_mass", "total_mass", "pole_length")
    }
    options["parameters"] = {name: constants[name] for name in parameters}

    def launch():
        wp.launch(accelerate, dim=nworld, inputs=[x, u, *constants.values()], outputs=[acc])
        wp.launch(integrate, dim=nworld, inputs=[x, acc, p["dt"]], outputs=outputs)

    arrays = {"inputs": [x], "controls": [u], "outputs": outputs}
    return ws.TapeSystem(launch, loss=cartpole.loss, **arrays, **sizes(cart), **options)
