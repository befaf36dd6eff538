"""One engine and one kind of ring, in a process of its own, which a hostile driver may bring down.

``python -m kvmpy.conformance.worker ENGINE RING CASE:VARIANT...`` prints a JSON line for each, in order: verdict,
answer, detail. Whoever started it (`kvmpy.conformance.runner`) knows by the lines which one it did not survive.
"""

import json
import resource
import sys

from kvmpy.conformance.bench import Bench
from kvmpy.conformance.cases.table import CASES
from kvmpy.conformance.judge import judge
from kvmpy.conformance.world import World
from kvmpy.devices.block import MakeEngine
from kvmpy.units import GiB

ADDRESS_SPACE = 3 * GiB
"""Nobody here needs as much; whoever believes a length of 2^32 - 1 does."""


def make_engine_of(name: str) -> MakeEngine:
    """Return the class of an engine: "c" or "python"."""
    if name == "c":
        from kvmpy.devices.block_c import CBlock

        return CBlock
    from kvmpy.devices.block_python import PythonBlock

    return PythonBlock


def main(engine: str, ring: str, *wanted: str) -> None:
    """Judge the wanted variants."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cases = {case.number: case for case in CASES}
    make_engine = make_engine_of(engine)
    packed = ring == "packed"
    with Bench(make_engine, packed=packed, world=World()) as other:
        other.start()
        for number, index in (map(int, each.split(":")) for each in wanted):
            judgement = judge(cases[number].variants[index], make_engine, other, packed=packed)
            print(json.dumps(judgement), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
