"""Times providers of one operation against each other, and only if their results are right.

Providers run interleaved, so that whatever else the machine does falls on all of them alike; what is quoted
is the ratio to a reference measured in the same rounds. Memory is the growth of the peak resident set in a
process of its own, or of torch's allocator on a GPU. Results go to benchmarks/results/<machine>/ as CSV and
JSON with versions and commit.

The parts: `timing`, `memory`, `record`, `providers`. A `bench_<op>` module needs the names below only.
"""

from __future__ import annotations

from benchmarks.memory import peak_and_seconds, peak_mib
from benchmarks.providers import Provider, Registry, relative_error, wrong
from benchmarks.record import RESULTS, environment, machine_name, save
from benchmarks.timing import CacheFlusher, default_device, interleave, ratio_to, summarize

__all__ = [
    "RESULTS",
    "CacheFlusher",
    "Provider",
    "Registry",
    "default_device",
    "environment",
    "interleave",
    "machine_name",
    "peak_and_seconds",
    "peak_mib",
    "ratio_to",
    "relative_error",
    "save",
    "summarize",
    "wrong",
]
