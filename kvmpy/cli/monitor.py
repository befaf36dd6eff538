"""The monitor of ``kvmpy run -i``: a few commands to look at a guest and to hold it, opened by Ctrl-A c.

Opening it pauses nothing: the guest runs on, and prints on. The terminal is raw, so the monitor edits its own line.
"""

from collections import Counter

from kvmpy.cli.messages import show
from kvmpy.cli.trace import record_line
from kvmpy.kvm import Vcpu
from kvmpy.kvm.state import GENERAL_REGISTERS, SEGMENT_REGISTERS
from kvmpy.pc import Pc

PROMPT = "(kvmpy) "
LONGEST_LINE = 72
LAST_EXITS = 8

HELP = """\
  regs [N]   registers of vCPU N (0)
  exits      exits by reason, and the last of each vCPU
  pause      take the guest's vCPUs out of it
  resume     let them run on
  cont       resume, and go back to the guest (as Ctrl-A c, which does not resume)
  stop       ask the guest to stop: press the power button (ACPI), and set
             the parameter page's request; it may ignore both
  quit       end the run
"""

RETURN, LINE_FEED, BACKSPACE, DELETE, CTRL_C, CTRL_D, CTRL_U = 0x0D, 0x0A, 0x08, 0x7F, 0x03, 0x04, 0x15


class Monitor:
    """A command line on the terminal, for the guest in ``pc``; used from the loop's thread."""

    def __init__(self, pc: Pc) -> None:
        self.is_open = False
        self._pc = pc
        self._line = ""
        self._paused = False

    def toggle(self) -> None:
        """Open, or go back to the guest."""
        self.is_open = not self.is_open
        self._line = ""
        if self.is_open:
            show(f"\nmonitor: help lists the commands, Ctrl-A c goes back\n{PROMPT}")
        else:
            show("\nback to the guest" + (", which is paused\n" if self._paused else "\n"))

    def type(self, keys: bytes) -> None:
        """Take keys: edit the line, and obey it at Return."""
        for key in keys:
            if self.is_open:
                self._key(key)

    def _key(self, key: int) -> None:
        match key:
            case _ if key in (RETURN, LINE_FEED):
                show("\n")
                self._obey(self._line)
                self._line = ""
                if self.is_open:
                    show(PROMPT)
            case _ if key in (BACKSPACE, DELETE) and self._line:
                self._line = self._line[:-1]
                show("\b \b")
            case _ if key in (CTRL_C, CTRL_U):
                self._line = ""
                show(f"\n{PROMPT}")
            case _ if key == CTRL_D:
                self.toggle()
            case _ if 0x20 <= key < 0x7F and len(self._line) < LONGEST_LINE:
                self._line += chr(key)
                show(chr(key))

    def _obey(self, line: str) -> None:
        try:
            match line.split():
                case []:
                    pass
                case ["help" | "?" | "h"]:
                    show(HELP)
                case ["regs"]:
                    self._regs("0")
                case ["regs", number]:
                    self._regs(number)
                case ["exits"]:
                    self._exits()
                case ["pause"]:
                    self._pc.pause()
                    self._paused = True
                    show("paused\n")
                case ["resume"]:
                    self._resume()
                case ["cont" | "c"]:
                    self._resume()
                    self.toggle()
                case ["stop"]:
                    self._pc.request_stop()
                    show("asked\n")
                case ["quit" | "q"]:
                    self._pc.stop()
                    self.is_open = False
                case [word, *_]:
                    show(f"no command {word!r}: help lists them\n")
        except RuntimeError:  # a vCPU's thread has ended
            show("the run is over\n")

    def _resume(self) -> None:
        self._pc.resume()
        self._paused = False

    def _regs(self, number: str) -> None:
        threads = self._pc.machine.threads
        if not number.isdecimal() or int(number) >= len(threads):
            show(f"no vCPU {number}: there are 0 to {len(threads) - 1}\n")
            return
        show(threads[int(number)].call(registers_text))

    def _exits(self) -> None:
        vcpus = list(self._pc.machine.vcpus())
        counts: Counter[str] = Counter()
        for vcpu in vcpus:
            counts.update(vcpu.exits_by_reason())
        lines = [f"  {reason:<16} {count:>12}" for reason, count in counts.most_common()]
        lines += [f"  {'total':<16} {counts.total():>12}"]
        for vcpu in vcpus:
            lines += [f"  vcpu{vcpu.vcpu_id} {record_line(record)}" for record in vcpu.last_exits()[-LAST_EXITS:]]
        show("\n".join(lines) + "\n")


def registers_text(vcpu: Vcpu) -> str:
    """Return the registers of ``vcpu`` for people, in lines; from the vCPU's thread."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    general = [f"{name:<6} {getattr(regs, name):016x}" for name in GENERAL_REGISTERS]
    control = [f"{name:<6} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    segments = [f"{name} {getattr(sregs, name).selector:04x}" for name in SEGMENT_REGISTERS]
    rows = [general[i : i + 4] for i in range(0, len(general), 4)] + [control[:3], control[3:], segments]
    return "".join("  " + "  ".join(row) + "\n" for row in rows)
