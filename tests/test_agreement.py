"""The component-wise comparison of two gradients, and the pairs that carry them until they are compared."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import all_reduce
import pytest
import torch
import warp as wp
from cases import ROADS, Evaluated, assert_close, error_of, make_net, make_states, on_road
from reference import rollout as oracle
from warp_sims.bridge.runtime.arrays import WARP_DTYPE
from warp_sims.kernels.agreement import CHUNK, NSTATS, chunks, make_combine

import warp_sims as ws

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64]
SYSTEM = all_reduce.SYSTEM

# Relative. Means over worlds taken in parts sum in another order; cosines are sums of up to 10000 products in
# float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def pair_of(base, check, worlds=1):
    """A pair of two given gradients of one parameter."""
    return ws.GradientPair(torch.zeros(()), worlds, ("w",), (base.shape,), torch.stack((base, check)))


def same_bits(a, b):
    """Signed zeros and NaN count."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(integer) == b.view(integer))).all())


# base, check, what is left of base, what is left of check
TABLE = [
    (1.0, 0.1, 1.0, 0.1),
    (-2.0, -9.0, -2.0, -9.0),
    (3.0, -3.0, 0.0, 0.0),
    (-4.0, 4.0, 0.0, 0.0),
    # sign(0) = sign(0), whichever zero it is; else 0 differs from both signs
    (0.0, 0.0, 0.0, 0.0),
    (-0.0, 0.0, -0.0, 0.0),
    (0.0, -0.0, 0.0, -0.0),
    (-0.0, -0.0, -0.0, -0.0),
    (0.0, 1.0, 0.0, 0.0),
    (-0.0, -1.0, 0.0, 0.0),
    (5.0, 0.0, 0.0, 0.0),
    (-5.0, -0.0, 0.0, 0.0),
    # the smallest numbers have a sign as well
    (1e-45, 1e-45, 1e-45, 1e-45),
    (1e-45, -1e-45, 0.0, 0.0),
    (-1e-45, -1e38, -1e-45, -1e38),
    (1e-45, 0.0, 0.0, 0.0),
    # a NaN that would be kept stays; one to compare with gives 0
    (NAN, 1.0, NAN, 0.0),
    (NAN, -INF, NAN, -INF),
    (NAN, 0.0, NAN, 0.0),
    (1.0, NAN, 0.0, NAN),
    (0.0, NAN, 0.0, NAN),
    (-INF, NAN, -INF, NAN),
    (NAN, NAN, NAN, NAN),
    # so does an infinity, whose sign is none
    (INF, 2.0, INF, 0.0),
    (INF, INF, INF, INF),
    (-INF, -1e-45, -INF, 0.0),
    (-INF, 2.0, -INF, 0.0),
    (INF, -INF, INF, -INF),
    (INF, 0.0, INF, 0.0),
    (2.0, INF, 0.0, INF),
    (0.0, -INF, 0.0, -INF),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_table(dtype):
    base, check, kept_base, kept_check = torch.tensor(TABLE, dtype=dtype).T.contiguous()
    pair = pair_of(base, check)
    assert same_bits(pair.combine()["w"], kept_base)
    assert same_bits(pair.combine(keep="base")["w"], kept_base)
    assert same_bits(pair.combine(keep="check")["w"], kept_check)
    assert torch.equal(oracle.combine(base, check).isnan(), kept_base.isnan())
    assert pair.nonfinite == 15 and pair.nonfinite.dtype == torch.int64
    assert [int(n) for n in pair.nonfinite_fields] == [11, 9]
    assert pair.zeros == (kept_base == 0).double().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_rows(dtype):
    """Each row alone: its count and its share of agreement."""
    for base, check, kept_base, _ in TABLE:
        pair = pair_of(torch.tensor([base], dtype=dtype), torch.tensor([check], dtype=dtype))
        b, c, kept = torch.tensor([base, check, kept_base], dtype=dtype)
        assert same_bits(pair.combine()["w"], kept[None])
        assert pair.nonfinite == int(not (b.isfinite() and c.isfinite()))
        if b == 0 and c == 0:
            assert pair.agreement.isnan() and pair.cosine.isnan()
        else:
            agrees = bool(b.sign() == c.sign()) and bool(b.isfinite() and c.isfinite())
            assert pair.agreement == float(agrees), (base, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10000])
def test_sums(dtype, size):
    """At the borders of what one thread compares."""
    draw = torch.Generator().manual_seed(size)
    base, check = torch.randn(2, size, generator=draw, dtype=torch.float64).to(dtype)
    base[torch.rand(size, generator=draw) < 0.1] = 0.0
    check[torch.rand(size, generator=draw) < 0.1] = 0.0
    pair = pair_of(base, check, worlds=3)

    assert same_bits(pair.combine()["w"], oracle.combine(base, check))
    assert same_bits(pair.combine("check")["w"], oracle.combine(check, base))
    assert pair.nonfinite == 0
    zeros = (oracle.combine(base, check) == 0).double().mean()
    assert pair.zeros.isnan() if size == 0 else pair.zeros == zeros
    b, c = base.double(), check.double()
    either = (b != 0) | (c != 0)
    if size > 1:
        assert_close(pair.agreement, ((b.sign() == c.sign()) & either).sum() / either.sum(), 1e-7)
        assert_close(pair.cosine, (b @ c) / (b.norm() * c.norm()), TOLERANCE[torch.float64])
    if size == 0:
        assert pair.agreement.isnan() and pair.cosine.isnan()
    for norm, expected in zip(pair.norms, (b.norm(), c.norm()), strict=True):
        assert_close(norm, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 513, 3000])
def test_forms(dtype, size):
    """A CPU's form in vector lanes beside that of GPU threads: the same bits, sums in another order."""
    draw = torch.Generator().manual_seed(size)
    members, special = 3, torch.tensor(TABLE, dtype=dtype)[:, :2].reshape(-1)
    pair = torch.randn(2, members, size, generator=draw, dtype=torch.float64).to(dtype)
    finite = pair.clone()
    odd = torch.rand(pair.shape, generator=draw) < 0.3
    pair[odd] = special[torch.randint(len(special), (int(odd.sum()),), generator=draw)]
    for base, check in pair, finite:
        for keep_check in 0, 1:
            found = []
            for in_lanes in False, True:
                combined = torch.full_like(base, -7.0)
                stats = torch.full((members * chunks(size, CHUNK), NSTATS), -7.0, dtype=torch.float64)
                before = [wp.from_torch(base), wp.from_torch(check), size, CHUNK, keep_check, 1]
                kernel = make_combine(WARP_DTYPE[dtype], in_lanes)
                after = [wp.from_torch(combined), wp.from_torch(stats)]
                wp.launch(kernel, len(stats) - 1, inputs=before, outputs=after, device="cpu")
                found.append((combined, stats))
            (one, sums), (other, sums_other) = found
            assert same_bits(one, other)
            assert bool((sums[0] == -7.0).all()) and bool((one.reshape(-1)[: min(size, CHUNK)] == -7.0).all())
            assert torch.equal(sums[:, 3:], sums_other[:, 3:])
            torch.testing.assert_close(sums, sums_other, rtol=1e-13, atol=1e-12, equal_nan=True)


def test_cosine_is_taken_in_double_precision():
    """Squares of single precision would overflow and vanish."""
    for scale in (1e30, 1e-30):
        base, check = scale * torch.tensor([3.0, 4.0]), scale * torch.tensor([4.0, 3.0])
        pair = pair_of(base, check)
        assert pair.cosine.dtype == torch.float64
        assert pair.cosine.item() == pytest.approx(24 / 25, rel=1e-6)
        assert pair.norms[0].item() == pytest.approx(5 * scale, rel=1e-6)


def test_cosine_of_a_zero_gradient_is_nan():
    pair = pair_of(torch.zeros(3), torch.ones(3))
    assert pair.cosine.isnan() and pair.agreement == 0.0


# Pairs of rollouts


def gradient_pair(policy, x0, **options):
    return ws.gradient_pair(SYSTEM, policy, x0, **{"horizon": 12, "loss": "running"} | options)


def mean_loss(states, controls):
    return states[-1].square().mean() + controls.sin().mean()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("loss", ["final", "running", mean_loss])
def test_pair_is_two_rollouts(road, loss):
    policy, x0 = on_road(road, make_net(SYSTEM)), make_states(SYSTEM, 5)
    options = {"loss": loss, "control_cost": 0.3, "window": 5, "decay": 0.7}
    for base, check in (("modified", "regular"), ("S", "N"), (ws.Flow.REGULAR, list("RMNSRMNSRMNS"))):
        pair = gradient_pair(policy, x0, base=base, check=check, **options)
        assert pair.worlds == 5 and set(pair.base) == {name for name, _ in policy.named_parameters()}
        for flow, gradients in ((base, pair.base), (check, pair.check)):
            policy.zero_grad()
            out = ws.rollout(SYSTEM, policy, x0, horizon=12, flow=flow, **options)
            out.loss.backward()
            assert_close(pair.loss, out.loss, TOLERANCE[x0.dtype])
            expected = {name: p.grad for name, p in policy.named_parameters()}
            assert_close(gradients, expected, TOLERANCE[x0.dtype])
    assert not pair.loss.requires_grad and not pair.flat.requires_grad


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_micro_batches_equal_the_whole_batch(road, dtype):
    policy, x0 = on_road(road, make_net(SYSTEM, dtype=dtype)), make_states(SYSTEM, 17, dtype)
    for loss in ("final", "running", mean_loss):
        whole = gradient_pair(policy, x0, loss=loss, control_cost=0.1)
        total = gradient_pair(policy, x0[:3], loss=loss, control_cost=0.1)
        before = total
        for part in x0[3:].split([1, 0, 13] if loss != mean_loss else [1, 13]):
            total += gradient_pair(policy, part, loss=loss, control_cost=0.1)
        assert before.worlds == 3 and total.worlds == whole.worlds == 17
        assert_close(total.loss, whole.loss, TOLERANCE[dtype])
        assert_close(total.flat, whole.flat, TOLERANCE[dtype])
        if dtype == torch.float64:
            assert_close(total.combine(), whole.combine(), TOLERANCE[dtype])


def test_the_comparison_comes_after_the_sum():
    """C(a) + C(b) is not C(a + b)."""
    policy, x0 = make_net(SYSTEM), make_states(SYSTEM, 2)
    a, b = (gradient_pair(policy, x) for x in x0.split(1))
    apart = torch.cat([0.5 * (x + y).flatten() for x, y in zip(a.combine().values(), b.combine().values())])
    together = torch.cat([x.flatten() for x in (a + b).combine().values()])
    assert error_of(apart, together) > 1e-3


def test_a_pair_of_no_worlds_has_no_say():
    policy, x0 = make_net(SYSTEM), make_states(SYSTEM, 3)
    some = gradient_pair(policy, x0)
    for none in (
        gradient_pair(policy, x0[:0]),
        gradient_pair(policy, x0[:0], loss=lambda states, controls: states.mean()),  # NaN
    ):
        assert none.worlds == 0
        for total in (some + none, none + some):
            assert total.worlds == 3
            assert torch.equal(total.flat, some.flat) and torch.equal(total.loss, some.loss)
    empty = none + none
    assert empty.worlds == 0 and empty.flat.shape == some.flat.shape
    assert not gradient_pair(policy, x0[:0]).flat.any()


def test_only_trained_parameters_are_compared():
    net, x0 = make_net(SYSTEM), make_states(SYSTEM, 3)
    everything = gradient_pair(net, x0)
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    for policy in (net, Evaluated(net)):
        pair = gradient_pair(policy, x0)
        found = {name.removeprefix("net."): gradient for name, gradient in pair.combine().items()}
        assert set(found) == set(everything.base) - {"0.bias", "2.weight"}
        assert_close(found, {name: everything.combine()[name] for name in found}, TOLERANCE[x0.dtype])
    nothing = gradient_pair(net.requires_grad_(False), x0)
    assert nothing.base == {} and nothing.combine() == {} and nothing.cosine.isnan()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("keep", ["base", "check"])
def test_assign(road, keep):
    policy, x0 = on_road(road, make_net(SYSTEM)), make_states(SYSTEM, 5)
    pair = gradient_pair(policy, x0)
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    pair.assign(policy, keep=keep)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter.grad, pair.combine(keep)[name])


def test_what_becomes_of_assigned_gradients_does_not_change_the_pair():
    """Clipping, accumulation and zeroing write into `.grad`."""
    policy, other, x0 = make_net(SYSTEM), make_net(SYSTEM), make_states(SYSTEM, 5)
    pair = gradient_pair(policy, x0)
    before = {name: gradient.clone() for name, gradient in pair.combine().items()}
    for spoil in (
        lambda: torch.nn.utils.clip_grad_value_(policy.parameters(), 1e-9),
        lambda: ws.rollout(SYSTEM, policy, x0, horizon=12).loss.backward(),
        lambda: policy.zero_grad(set_to_none=False),
    ):
        pair.assign(policy)
        pair.assign(other)
        spoil()
        assert_close(pair.combine(), before, 0.0)
        assert_close({name: p.grad for name, p in other.named_parameters()}, before, 0.0)
    next(iter(pair.combine().values())).zero_()
    assert_close(pair.combine(), before, 0.0)


def test_errors():
    policy, x0 = make_net(SYSTEM), make_states(SYSTEM, 3)
    pair = gradient_pair(policy, x0)
    other = gradient_pair(make_net(SYSTEM, (9, 8)), x0)
    with pytest.raises(
        ValueError, match="cannot add pairs of different policies.*expected the same parameter"
    ):
        pair + other
    with pytest.raises(TypeError):
        pair + 1
    with pytest.raises(ValueError, match="'0.weight' has shape none in this policy, expected"):
        pair.assign(Evaluated(policy))
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(8, 9\) in this policy, expected \(7, 9\)"):
        pair.assign(make_net(SYSTEM, (9, 8)))
    with pytest.raises(ValueError, match='keep is \'both\', expected "base" or "check"'):
        pair.combine("both")
    with pytest.raises(RuntimeError, match="torch.distributed is not initialised.*init_process_group"):
        pair.all_reduce()
    assert all(p.grad is None for p in policy.parameters())


def test_copies():
    pair = gradient_pair(make_net(SYSTEM), make_states(SYSTEM, 3))
    cosine = pair.cosine
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert torch.equal(twin.flat, pair.flat) and twin.worlds == 3 and torch.equal(twin.cosine, cosine)
        assert_close(twin.combine(), pair.combine(), 0.0)


def test_all_reduce(tmp_path):
    """Two processes with shares of different size, and with no share at all, arrive at the whole batch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(all_reduce.__file__))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for i, (_, loss_of) in enumerate(all_reduce.ROUNDS):
        whole = all_reduce.pair_of(0, 5, loss_of)
        for rank in range(2):
            worlds, loss, flat, cosine = torch.load(tmp_path / f"{i}_{rank}.pt")
            assert worlds == 5
            assert_close(loss, whole.loss, TOLERANCE[loss.dtype])
            assert_close(flat, whole.flat, TOLERANCE[loss.dtype])
            assert_close(cosine, whole.cosine, TOLERANCE[loss.dtype])
