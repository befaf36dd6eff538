"""Boot protocols: from a file on the host to RAM that holds a kernel, and the state in which the first vCPU starts.

`boot` does it; `kvmpy.machine.boot.inspection` tells what a file is without booting it. Reading order: plan, image,
place, then one module a protocol (bootsector and flat first), then detect. Beside them: linux (is it Linux, and which),
packed, unpack and lz4 (packed files, and the packed kernel in a bzImage).
"""

from kvmpy.machine.boot.detect import PROTOCOLS, boot
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Module, Segment

__all__ = ["PROTOCOLS", "BootOptions", "CpuMode", "Entry", "Module", "Segment", "boot"]
