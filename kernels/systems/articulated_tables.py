"""A model as the kernels of articulated.py take it: its structure as tables in their text, its numbers in one
array.

A link is one joint and what moves with it: a hinge about or a slide along the third axis of the link, three
slides along the axes of the world (of a free joint), or a ball. A body with several joints is a chain of
links, the last of which has its mass. The origin of a link's frame is the anchor of its joint. Links, and
degrees of freedom, are numbered from the root to the leaves; link 0 is the world.
"""

from collections.abc import Sequence
from typing import NamedTuple

HINGE, SLIDE, SLIDES, BALL = range(4)
QPOS_SIZE = {HINGE: 1, SLIDE: 1, SLIDES: 3, BALL: 4}
DOF_SIZE = {HINGE: 1, SLIDE: 1, SLIDES: 3, BALL: 3}

# Words of the array of numbers, by what they are of.
GLOBAL_WORDS = (
    "DT GRAVITY - - CONTACT_KE CONTACT_KD CONTACT_KF CONTACT_VS LIMIT_KE LIMIT_KD GROUND"  # DT: of a substep
)
LINK_NAMES = "TURN - - - - - - - - OFFSET - - Q0 MASS CENTRE - - INERTIA - - - - - SUBTREE_MASS"
DOF_NAMES = "ARMATURE DAMPING"
SPRING_NAMES = "STIFFNESS REST"
LIMIT_NAMES = "LOW HIGH"
ACTUATOR_NAMES = "GEAR GAIN BIAS - - CTRL_LOW CTRL_HIGH FORCE_LOW FORCE_HIGH"
POINT_NAMES = "X - - RADIUS FRICTION"
PAIR_NAMES = "X - - RADIUS FRICTION SECOND - - -"  # the second sphere's centre and radius behind the first
FLUID_NAMES = "X - - AXES - - - - - - - - LINEAR - - - - - SQUARE - - - - -"


class Structure(NamedTuple):
    """What the text of the kernels depends on. In tuples over links, entry i is that of link i + 1."""

    kinds: tuple[int, ...]
    parents: tuple[int, ...]
    """Links, 0 for the world."""
    turned: tuple[bool, ...]
    """Whether the axes of a link at rest are turned against those of the link before it."""
    massive: tuple[bool, ...]
    """Whether anything with mass belongs to a link."""
    origin: int
    """Link whose position is the origin of the spatial vectors: the last one of the first body."""
    springs: tuple[int, ...] = ()
    """Links with a spring."""
    limits: tuple[int, ...] = ()
    """Links with a limit."""
    actuators: tuple[int, ...] = ()
    """Degrees of freedom."""
    affine: bool = False
    """Whether actuators depend on position and velocity, or their force is limited."""
    points: tuple[int, ...] = ()
    """Links of spheres that touch the ground."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Links of spheres that touch each other."""
    fluid: tuple[int, ...] = ()
    """Links of boxes on which a fluid drags."""
    substeps: int = 1
    implicit: bool = False
    """Whether the damping acts on the velocity after a substep."""
    smooth: bool = True
    """Regularised friction; else linear, then constant."""
    approach: bool = False
    """Whether contact damps what comes nearer only."""

    @property
    def first_qpos(self) -> list[int]:
        """First component of qpos of every link, and their number."""
        return _sums(QPOS_SIZE[kind] for kind in self.kinds)

    @property
    def first_dof(self) -> list[int]:
        """First degree of freedom of every link, and their number."""
        return _sums(DOF_SIZE[kind] for kind in self.kinds)

    @property
    def qpos_size(self) -> int:
        return self.first_qpos[-1]

    @property
    def dofs(self) -> int:
        return self.first_dof[-1]

    def dof_parents(self) -> list[int]:
        """The degree of freedom above each one, -1 at a root."""
        first, above = self.first_dof, []
        for i, parent in enumerate(self.parents):
            before = first[parent] - 1 if parent else -1
            for k in range(first[i], first[i + 1]):
                above.append(before)
                before = k
        return above

    def depths(self) -> list[int]:
        """How many degrees of freedom are above each one."""
        depths: list[int] = []
        for before in self.dof_parents():
            depths.append(depths[before] + 1 if before >= 0 else 0)
        return depths

    def words(self) -> dict[str, int]:
        """Where the numbers of each kind begin in the array, and where they end."""
        counts = {
            "GLOBAL": (GLOBAL_WORDS, 1),
            "LINK": (LINK_NAMES, len(self.kinds)),
            "DOFS": (DOF_NAMES, self.dofs),
            "SPRING": (SPRING_NAMES, len(self.springs)),
            "LIMIT": (LIMIT_NAMES, len(self.limits)),
            "ACTUATOR": (ACTUATOR_NAMES, len(self.actuators)),
            "POINT": (POINT_NAMES, len(self.points)),
            "PAIR": (PAIR_NAMES, len(self.pairs)),
            "FLUID": (FLUID_NAMES, len(self.fluid)),
        }
        found, at = {}, 0
        for name, (names, count) in counts.items():
            found[name] = at
            at += count * len(names.split())
        found["END"] = at
        return found

    def number_places(self) -> tuple[tuple[int, ...], ...]:
        """Words of the array that hold the physical parameters; each is followed by the words that are sums
        which contain it. The parameters are armature and damping of every degree of freedom, gear of every
        actuator, and mass, centre (3) and inertia (6) of every link with mass.
        """
        words, link = self.words(), offsets(LINK_NAMES)
        places: list[tuple[int, ...]] = [(words["DOFS"] + k,) for k in range(2 * self.dofs)]
        size = len(ACTUATOR_NAMES.split())
        places += [(words["ACTUATOR"] + size * a,) for a in range(len(self.actuators))]
        size = len(LINK_NAMES.split())
        for i, massive in enumerate(self.massive, 1):
            if not massive:
                continue
            at, above, sums = words["LINK"] + size * (i - 1), i, []
            while above:
                sums.append(words["LINK"] + size * (above - 1) + link["SUBTREE_MASS"])
                above = self.parents[above - 1]
            places.append((at + link["MASS"], *sums))
            places += [(at + link["CENTRE"] + k,) for k in range(3)]
            places += [(at + link["INERTIA"] + k,) for k in range(6)]
        return tuple(places)


def _sums(sizes) -> list[int]:
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


def offsets(names: str) -> dict[str, int]:
    """Offset of each named word; "-" continues the word before it."""
    return {name: i for i, name in enumerate(names.split()) if name != "-"}


def source(s: Structure, kept: int) -> str:
    """The tables and sizes as the first lines of a native function; `kept` is the number of substeps whose
    results are kept.
    """
    links, depths = len(s.kinds), s.depths()
    rows = _sums(depth + 1 for depth in depths)
    qpos, dofs = s.first_qpos, s.first_dof
    numbers = s.words()
    enums = {
        "NL": links, "NQ": s.qpos_size, "NV": s.dofs, "NM": rows[-1], "ORIGIN": s.origin,
        "NU": len(s.actuators), "NSPRING": len(s.springs), "NLIMIT": len(s.limits),
        "NPOINT": len(s.points), "NPAIR": len(s.pairs), "NFLUID": len(s.fluid),
        "TOUCHES": int(bool(s.points or s.pairs)),
        "SUBSTEPS": s.substeps, "KEPT": kept, "RECORD": int(0 < kept < s.substeps),
        "IMPLICIT": int(s.implicit), "SMOOTH": int(s.smooth), "APPROACH": int(s.approach),
        "AFFINE": int(s.affine),
        "HINGE": HINGE, "SLIDE": SLIDE, "SLIDES": SLIDES, "BALL": BALL,
        **{name: at for name, at in numbers.items() if name != "END"},
        **{name + "_WORDS": len(names.split()) for name, names in (
            ("LINK", LINK_NAMES), ("DOF", DOF_NAMES), ("ACTUATOR", ACTUATOR_NAMES), ("POINT", POINT_NAMES),
            ("PAIR", PAIR_NAMES), ("FLUID", FLUID_NAMES))},
        **{name: at for names in (GLOBAL_WORDS, LINK_NAMES, DOF_NAMES, ACTUATOR_NAMES, POINT_NAMES)
           for name, at in offsets(names).items() if name != "X"},
        "SECOND": offsets(PAIR_NAMES)["SECOND"],
        **{name: at for name, at in offsets(FLUID_NAMES).items() if name != "X"},
    }  # fmt: skip
    tables = {
        "KIND": [-1, *s.kinds],
        "PARENT": [0, *s.parents],
        "TURNED": [0, *s.turned],
        "MASSIVE": [0, *s.massive],
        "QPOS": [0, *qpos],
        "DOF": [0, *dofs],
        "ABOVE": s.dof_parents(),
        "DEPTH": depths,
        "ROW": rows,
        "SPRING_QPOS": [qpos[i - 1] for i in s.springs],
        "SPRING_DOF": [dofs[i - 1] for i in s.springs],
        "LIMIT_QPOS": [qpos[i - 1] for i in s.limits],
        "LIMIT_DOF": [dofs[i - 1] for i in s.limits],
        "ACTUATOR_DOF": s.actuators,
        "ACTUATOR_QPOS": [qpos[_link_of(dofs, k)] for k in s.actuators],
        "POINT_LINK": s.points,
        "PAIR_A": [a for a, _ in s.pairs],
        "PAIR_B": [b for _, b in s.pairs],
        "FLUID_LINK": s.fluid,
    }
    lines = [f"  enum {{ {', '.join(f'{name} = {value}' for name, value in enums.items())} }};"]
    lines += [_table(name, values) for name, values in tables.items()]
    return "\n".join(lines) + "\n"


def _link_of(first_dof: list[int], k: int) -> int:
    return max(i for i, first in enumerate(first_dof[:-1]) if first <= k)


def _table(name: str, values: Sequence[int]) -> str:
    entries = ", ".join(str(int(v)) for v in values) or "0"
    return f"  static const int {name}[] = {{{entries}}};"


KEPT_BYTES = 256 << 10
"""Bytes that the substeps of a step may keep on a CPU thread's stack for the backward pass; with more, they
are computed again.
"""
KEPT_BYTES_ONE = 8 << 10
"""The same for one world: a GPU reserves as much for every thread that it can hold."""


def slot_bytes(s: Structure, itemsize: int, worlds: int) -> int:
    """Bytes of the results of one substep, for so many worlds."""
    links, dofs = len(s.kinds) + 1, s.dofs
    words = s.qpos_size + 2 * dofs + 3 + links * (9 + 3 + 6 + 3 + 6) + 6 * dofs
    words += sum(d + 1 for d in s.depths()) + dofs
    return words * itemsize * worlds


def kept_substeps(s: Structure, itemsize: int, worlds: int) -> int:
    """Number of substeps whose results the backward pass keeps: all, or one."""
    most = KEPT_BYTES if worlds > 1 else KEPT_BYTES_ONE
    return s.substeps if s.substeps * slot_bytes(s, itemsize, worlds) <= most else 1
