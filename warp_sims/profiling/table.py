"""A profile as lines of text."""

import textwrap
from collections.abc import Iterator

from .resources import NO_PTXAS
from .result import AgainstRow, FlowProfile, KernelProfile, Profile, Row, Spread

__all__ = ["lines_of"]

_WIDTH = 110
_HEAD = (
    f"{'':25}{'calls':>6}{'thr':>4}{'ms':>21}{'share':>6}{'MFLOP':>8}{'GFLOP/s':>9}{'of max':>8}{'MB':>8}"
    f"{'GB/s':>7}{'of max':>8}"
)


def lines_of(profile: Profile) -> Iterator[str]:
    """Returns everything of a profile, 110 columns wide."""
    yield from _about(profile)
    for flow in profile.flows:
        yield ""
        yield from _flow(profile, flow)
    yield ""
    yield from _memory(profile)
    if profile.kernels:
        yield ""
        yield from _kernels(profile)
    if profile.against:
        yield ""
        yield from _against(profile.against)
    if profile.notes:
        yield ""
        for note in profile.notes:
            yield from textwrap.wrap(f"note: {note}", _WIDTH, subsequent_indent="  ")


def _about(profile: Profile) -> Iterator[str]:
    yield from textwrap.wrap(profile.system, _WIDTH, subsequent_indent="  ")
    path = "inside the sweeps" if profile.fused else "evaluated by torch"
    yield (
        f"policy {profile.policy} {path}, {profile.dtype}, batch {profile.batch}, horizon {profile.horizon}, "
        f"loss {profile.loss}"
    )
    versions = ", ".join(f"{name} {number}" for name, number in profile.versions.items())
    yield f"{profile.device}: {profile.machine}, {profile.threads} threads of torch's; {versions}"
    yield (
        f"ceilings measured in this run: {_number(profile.ceilings.flops / 1e9)} GFLOP/s (large matrix "
        f"product), {_number(profile.ceilings.bytes / 1e9)} GB/s (large copy)"
    )
    yield f"times are medians [quartiles] of {profile.repeats} repeats, flows in turns"


def _flow(profile: Profile, flow: FlowProfile) -> Iterator[str]:
    yield (
        f"flow {flow.flow}: forward {_ms(flow.forward.time)} ms, backward {_ms(flow.backward.time)} ms, "
        f"backward / forward {_ratio(flow.ratio.median)} [{_ratio(flow.ratio.low)} {_ratio(flow.ratio.high)}]"
    )
    if flow.flops is not None:
        needed = ((flow.forward.needed or 0) + (flow.backward.needed or 0)) / 1e6
        yield (
            f"  matrix products needed: {_number(needed)} MFLOP, {_number(flow.flops / 1e9)} GFLOP/s over "
            f"both passes, {_share(flow.flops / profile.ceilings.flops)} of the ceiling"
        )
    for name, one in (("forward", flow.forward), ("backward", flow.backward)):
        yield f"  {name}, traced: {_ms(one.traced)} ms"
        if name == "forward":
            yield _HEAD
        yield from (_row(profile, row) for row in one.rows)


def _row(profile: Profile, row: Row) -> str:
    name = row.name if len(row.name) <= 21 else row.name[:20] + "…"
    flops, rate = row.flops, row.byte_rate
    return (
        f"    {name:21}{row.calls or '':>6}{row.threads or '':>4}{_ms(row.time):>21}{_share(row.share):>6}"
        f"{_scaled(row.operations, 1e6):>8}{_scaled(flops, 1e9):>9}{_of(flops, profile.ceilings.flops):>8}"
        f"{_scaled(row.bytes, 1e6):>8}{_scaled(rate, 1e9):>7}{_of(rate, profile.ceilings.bytes):>8}"
    ).rstrip()


def _memory(profile: Profile) -> Iterator[str]:
    whole = sum(memory.bytes for memory in profile.memory)
    yield f"memory kept from forward to backward: {_number(whole / 1e6)} MB"
    for memory in profile.memory:
        shape = ", ".join(map(str, memory.shape))
        yield f"    {memory.name:24}{_number(memory.bytes / 1e6):>10} MB   ({shape})"


def _kernels(profile: Profile) -> Iterator[str]:
    yield f"kernels, compiled cold; what they take of a GPU of sm_{profile.arch}, without a GPU"
    yield (
        f"    {'':24}{'cpu [s]':>9}{f'sm_{profile.arch} [s]':>11}{'registers':>11}{'shared [B]':>12}"
        f"{'stack [B]':>11}{'spill stores / loads [B]':>26}"
    )
    yield from (_kernel(profile, kernel) for kernel in profile.kernels)
    if not profile.ptxas:
        yield f"    registers, shared memory and spills are unknown: {NO_PTXAS}"


def _kernel(profile: Profile, kernel: KernelProfile) -> str:
    line = f"    {kernel.name:24}{_seconds(kernel.cpu_seconds):>9}"
    r = kernel.resources
    if r is None:
        return line + ("   (on CPUs only)" if profile.ptxas else "")
    spills = f"{r.spill_stores} / {r.spill_loads}"
    return line + (
        f"{_seconds(r.ptx_seconds + r.ptxas_seconds):>11}{r.registers:>11}{r.shared_bytes:>12}"
        f"{r.stack_bytes:>11}{spills:>26}"
    )


def _against(rows: tuple[AgainstRow, ...]) -> Iterator[str]:
    yield "gradients beside Warp's generated adjoints, errors relative to those in float64 (see the notes)"
    yield (f"    {'':42}{'forward [ms]':>20}{'backward [ms]':>20}{'times':>8}{'error':>10}")
    for row in rows:
        own = next(other for other in rows if other.what == row.what)
        yield (
            f"    {row.what + ': ' + row.way:42}{_ms(row.forward):>20}{_ms(row.backward):>20}"
            f"{row.backward.median / own.backward.median:>8.1f}{row.error:>10.1e}"
        )


# Numbers


def _number(value: float) -> str:
    """Three significant digits, from 0.1 downwards fewer."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 0.1:
        return f"{value:#.3g}"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def _ms(spread: Spread) -> str:
    low, high = _number(1e3 * spread.low), _number(1e3 * spread.high)
    return f"{_number(1e3 * spread.median)} [{low} {high}]"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else _number(value)


def _share(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.01 else f"{100 * value:.1f}%"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _scaled(value: float | None, unit: float) -> str:
    return "" if not value else _number(value / unit)


def _of(rate: float | None, ceiling: float) -> str:
    return "" if not rate else _share(rate / ceiling)
