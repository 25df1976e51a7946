"""What a compiled program keeps on each device, and what it sends between devices.

Read from XLA's optimized program of one device: its memory analysis, and the collectives in its
text. Nothing runs, so that the arguments may be shapes alone.

Counted are the bytes that one device sends in one call, by the algorithms that use every link of a
ring evenly. Of G devices that work together, each sends

    all-gather                            (G - 1)/G of the gathered array
    reduce-scatter                        (G - 1)/G of the array before it is scattered
    all-reduce                          2 (G - 1)/G of the array: reduce-scatter, then all-gather
    all-to-all                            (G - 1)/G of the array
    collective-permute, -broadcast        the array

once for every iteration of the loops around it; XLA writes down their trip counts. All branches of
a conditional are counted, which is an upper bound."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(
    rf" = (?P<type>.+?) (?P<kind>{_KINDS}|ragged-all-to-all)(?P<start>-start)?\("
)
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # s32[8,4], f8e4m3[4], pred[]


class Memory(NamedTuple):
    """Bytes on each device."""

    arguments: int
    outputs: int
    temporaries: int


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    kind: str
    elements: int
    """Of all its arrays together: of what is gathered after it, of what is scattered before it."""
    sent: float
    """Bytes that a device sends each time."""
    times: int
    """How often one call of the program runs it."""


def memory(compiled: Any) -> Memory:
    """XLA's own analysis of a compiled program."""
    analysis = compiled.memory_analysis()
    return Memory(
        analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
    )


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program.

    Raises:
      ValueError: one stands in a loop whose trip count XLA does not know, or works in groups that
        are not understood.
    """
    return list(_walk(*_computations(compiled.as_text()), times=1))


def sent(found: list[Collective], *, scatter: bool = False) -> float:
    """Bytes that a device sends in one call.

    Args:
      found: the program's collectives.
      scatter: count an all-reduce as a reduce-scatter, half of it. XLA's compilers for GPUs and
        TPUs make it one where every device keeps its own shard alone of the sum, as it does of a
        sharded gradient; that for CPUs does not.
    """
    halved = [c.sent / 2 if scatter and c.kind == "all-reduce" else c.sent for c in found]
    return math.fsum(one * collective.times for one, collective in zip(halved, found, strict=True))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations[header["name"]] = []
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line)
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int | None) -> Iterator[Collective]:
    """Collectives of a computation and of all that it calls; ``times`` is None where nobody knows
    how often."""
    for line in computations[name]:
        if found := _COLLECTIVE.search(line):
            if times is None:
                raise ValueError(f"a collective in a loop of unknown length: {line.strip()[:200]}")
            group = _group_size(line)
            yield _collective(found["kind"], found["type"], bool(found["start"]), group, times)
            continue  # what it calls is the sum of two scalars
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.-]+", branches)
        inner = times
        if called and " while(" in line:
            trips = _TRIPS.search(line)
            inner = times * int(trips[1]) if trips and times is not None else None
        for other in called if "-done(" not in line and "-update(" not in line else ():
            yield from _walk(computations, other, inner)


def _collective(kind: str, type_: str, start: bool, group: int, times: int) -> Collective:
    arrays = [
        (_length(shape), 1 if name == "pred" else int(bits) / 8)
        for name, bits, shape in _ARRAY.findall(type_)
    ]
    if start and kind == "collective-permute":  # (operands, results, two tokens)
        arrays = arrays[:-2][len(arrays[:-2]) // 2 :]
    if start and kind == "all-gather":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    whole = group if kind == "reduce-scatter" else 1  # written down is what comes out
    rounds = {
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    share = rounds.get(kind, (group - 1) / group)
    elements = sum(length for length, _ in arrays)
    total = sum(length * width for length, width in arrays)
    return Collective(kind, elements * whole, total * whole * share, times)


def _length(shape: str) -> int:
    return math.prod(int(axis) for axis in shape.split(",") if axis)


def _group_size(line: str) -> int:
    """How many devices work together, in any of the three notations."""
    if "source_target_pairs=" in line:
        return 1  # each sends to one other, however many they are
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):  # [groups,size]<=[devices]
        return int(counted[1])
    # mesh['x'=2,'y'=4], device_ids=(...) {'x','y':(1)2}: whole axes, and parts of axes
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", line):
        axes = dict(re.findall(r"('\w+')=(\d+)", meshed[1]))
        return math.prod(
            int(part or axes[name])
            for name, part in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", meshed[2])
        )
    raise ValueError(f"a collective in groups that are not understood: {line.strip()[:200]}")
