"""What Debian's stock kernel is told on its command line, word by word, and why.

No host needs more than `PLAIN`. Where KVM emulates ring 0, an instruction of the kernel takes half a microsecond or
more, and a kernel made for everything does a great deal at its start: `SLOW` lets it do less. Nothing of this changes
the kernel, and what it leaves out no guest here misses.

Source: Linux 6.1, Documentation/admin-guide/kernel-parameters.txt; what an initcall does, in the file named.
"""

import re
from typing import NamedTuple


class Word(NamedTuple):
    """A word of the command line, and why it stands there."""

    text: str
    why: str


PLAIN = (
    Word("console=ttyS0", "its messages, and the shell"),
    Word("earlyprintk=ttyS0", "its first messages when they are written, and not when the console is ready"),
    Word("panic=-1", "a panic ends the machine at once"),
    Word("reboot=k", "by the keyboard controller"),
)

FEATURES = {
    59: "rdtscp: an exit at each look at the clock",
    131: "monitor and mwait: an exit each time it is idle",
    137: "ssse3: BLAKE2s of the random numbers would use it, and AVX-512, which is not completed (EVEX)",
    128: "sse3, and the next five: the same for other ciphers and sums",
    129: "pclmulqdq",
    147: "sse4.1",
    148: "sse4.2",
    153: "aes",
    151: "popcnt: an exit each; without it, a dozen instructions",
    141: "cmpxchg16b: an exit at each allocation",
    297: "erms: rep movsb would go byte by byte",
    580: "fsrm: the same for short copies",
    298: "invpcid: an exit at each flush of the TLB",
    308: "smap: two exits at each access to a program's memory",
    517: "waitpkg: tpause in each delay",
    590: "serialize: an exit at each piece of code that is patched",
}
"""X86_FEATURE_* (arch/x86/include/asm/cpufeatures.h: 32 times the word, and the bit) that is worth hiding, and why."""

INITCALLS = {
    "load_system_certificate_list": "checks the signatures of Debian's keys: 58 s (certs/system_keyring.c)",
    "trace_eval_init": "writes names into the formats of 1,500 trace events (kernel/trace/trace.c)",
    "ftrace_check_for_weak_functions": "asks for the names of 38,000 functions: 21 s (kernel/trace/ftrace.c)",
    "tracer_init_tracefs": "makes a folder for each trace event: 7 s (kernel/trace/trace.c)",
    "btf_module_init": "reads the types of all the kernel at the first module: 15 to 30 s (kernel/bpf/btf.c)",
    "cubictcp_register": "reads them, if nothing has yet; so would each of the next five (net/ipv4/tcp_cubic.c)",
    "bpf_tcp_ca_kfunc_init": "net/ipv4/bpf_tcp_ca.c",
    "bpf_prog_test_run_init": "net/bpf/test_run.c",
    "bpf_key_sig_kfuncs_init": "kernel/trace/bpf_trace.c",
    "bpf_rstat_kfunc_init": "kernel/cgroup/rstat.c",
    "kfunc_init": "kernel/bpf/helpers.c",
    "slab_sysfs_init": "makes fifty files for each kind of kernel memory: 3 s (mm/slub.c)",
    "crypto_kdf108_init": "tests itself, whatever is said of tests: 2 s (crypto/kdf_sp800108.c)",
    "blake2s_mod_init": "the same: 2 s (lib/crypto/blake2s.c)",
}
"""What the kernel shall not call at its start, by the name of the function, and what that would do."""

SLOW = (
    Word(
        "cryptomgr.notests", "no self-tests of ciphers: those of Diffie-Hellman and RSA take longer than all the rest"
    ),
    Word(f"initcall_blacklist={','.join(INITCALLS)}", "see INITCALLS"),
    Word(f"clearcpuid={','.join(map(str, FEATURES))}", "see FEATURES"),
    Word("mitigations=off", "no detours at each system call"),
    Word("rodata=off", "no split of the kernel's large pages, no search for writable code"),
    Word("noreplace-smp", "LOCK prefixes stay: ten thousand places are not patched"),
    Word("init_on_alloc=0", "memory is not cleared at each allocation"),
    Word("highres=off", "a plain periodic tick: at 250 Hz each costs a millisecond"),
    Word("nohz=off", "the same"),
    Word("psi=0", "less to do at each tick and switch"),
    Word("noautogroup", "the same"),
    Word("idle=halt", "no search for the best way to be idle"),
    Word("tsc=reliable", "no watch on the clock, which a late tick would discredit"),
    Word("nowatchdog", "what takes long here is no lockup"),
    Word("rcupdate.rcu_cpu_stall_suppress=1", "the same"),
    Word("audit=0", "nobody reads it"),
    Word("lsm=yama", "AppArmor, TOMOYO and the rest have no policy here"),
    Word("pci=off", "there is no PCI: no search of 256 buses"),
    Word("numa=off", "one node"),
    Word("swiotlb=noforce", "no bounce buffers"),
    Word("mce=off", "no machine checks"),
    Word("ipv6.disable=1", "no network"),
    Word("8250.nr_uarts=1", "no search for three more serial ports"),
    Word("i8042.noaux", "no mouse, no wait for one"),
    Word("i8042.nokbd", "no keyboard"),
)


def words(*, slow: bool) -> tuple[Word, ...]:
    """Return the words; ``slow``: this host's KVM emulates ring 0."""
    return (*PLAIN, *(SLOW if slow else ()))


def explained(*, slow: bool) -> str:
    """Return each word with its reason, a line each, and what stands in the long ones."""
    lines = [f"{re.sub('=.*,.*', '=...', word.text):40} {word.why}" for word in words(slow=slow)]
    if slow:
        lines += ["FEATURES", *(f"  {number:<38} {why}" for number, why in FEATURES.items())]
        lines += ["INITCALLS", *(f"  {name:38} {why}" for name, why in INITCALLS.items())]
    return "\n".join(lines)


def command_line(*, slow: bool, command: str = "") -> str:
    """Return the command line; ``command`` is what init shall run in place of a shell."""
    texts = [word.text for word in words(slow=slow)]
    return " ".join([*texts, "--", command] if command else texts)
