"""All of a reading at once: what a healthy probe on Linux does instead of asking part after part."""

from __future__ import annotations

import os

from wiseflow_nb.records import NAN
from wiseflow_nb.resources._container import PRESSURES, Container
from wiseflow_nb.resources._disk import Disks
from wiseflow_nb.resources._files import Batch, KeptFiles
from wiseflow_nb.resources._host import LinuxHost
from wiseflow_nb.resources._part import Values
from wiseflow_nb.resources._tree import LinuxTree, Totals

_UNKNOWN: Values = (NAN, NAN)
_NOT_OFFERED: Values = (NAN,) * len(PRESSURES)

#: What the parts would return: load, memory, ticks, the group's CPU and memory, pressure, disk counters,
#: network, the reading process' memory, the tree, its descriptors, and the space of disks.
Figures = tuple[
    Values,
    Values,
    tuple[float, float, float, float],
    Values,
    Values,
    Values,
    Values,
    Values,
    float,
    Totals,
    Values,
    Values,
]


class Together:
    """Read in one go what the parts read one by one, as they read it last.

    Made after a reading in which nothing failed and nothing was dear; to be made anew when the limits,
    the disks, or whose network it is have changed. It tells nothing of a failure: then the parts are to
    be asked, who find out which it is, and go on without it.

    Parameters
    ----------
    host, container, tree
        What knows the files, and what is made of their values.
    files
        The kept files.
    own_memory
        Whether the memory of the reading process is wanted.
    """

    __slots__ = (
        "_batch",
        "_container",
        "_descriptors",
        "_ends",
        "_files",
        "_generation",
        "_host",
        "_opened",
        "_own_memory",
        "_tree",
    )

    def __init__(
        self, host: LinuxHost, container: Container, tree: LinuxTree, files: KeptFiles, own_memory: bool
    ) -> None:
        self._host, self._container, self._tree = host, container, tree
        self._files, self._own_memory = files, own_memory
        self._generation = -1  # gathered at the first reading

    def _gather(self) -> None:
        host, container, tree = self._host, self._container, self._tree
        # Before the processes: the load, which names the newest one.
        sources, ends = host.general, []
        for more in (
            *(container.cpu_files, container.memory_files, container.pressure_files, host.disks),
            *([host.interfaces], [host.own] if self._own_memory else [], tree.stats),
        ):
            sources += more
            ends.append(len(sources))
        self._ends = tuple(ends[:5])
        self._batch = Batch(self._files, sources)
        # Without the way along its path, at half the cost.
        self._descriptors = self._files.descriptor(tree.counted_fds) if tree.counted_fds else None
        self._generation, self._opened = tree.generation, self._files.generation

    def read(self, disks: Disks) -> Figures:
        """Return all of it.

        Raises
        ------
        OSError, ValueError, LookupError
            If something cannot be read or understood.
        """
        if self._generation != self._tree.generation or self._opened != self._files.generation:
            self._gather()
        values = self._batch.values()
        space = disks.now()
        directory = self._descriptors
        descriptors = self._tree.descriptors() if directory is None else (float(os.fstat(directory).st_size),)
        (load, newest), memory, ticks = values[:3]
        cpu_end, memory_end, pressure_end, disk_end, network_end = self._ends
        totals = self._tree.totals(newest)
        return (
            (load,),
            memory,
            ticks,
            self._container.cpu_of(values[3:cpu_end]) if cpu_end > 3 else _UNKNOWN,
            self._container.memory_of(values[cpu_end:memory_end]) if memory_end > cpu_end else _UNKNOWN,
            values[memory_end:pressure_end] or _NOT_OFFERED,
            values[pressure_end] if disk_end - pressure_end == 1 else self._host.disk_of(values[pressure_end:disk_end]),
            values[disk_end],
            values[network_end] if self._own_memory else NAN,
            totals,
            descriptors,
            space,
        )
