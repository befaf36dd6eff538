"""The words that Linux is told beyond what the user says: devices, and what the host does wrong unseen."""

from collections.abc import Callable
from pathlib import Path

import pytest
from linux_images import linux_bzimage, plain_bzimage

from kvmpy import Disk
from kvmpy.machine.boot.plan import BootOptions
from kvmpy.machine.probe import Ability, Finding, Verdict, has, learn
from kvmpy.pc import Announcement, MachineSpec, Pc, linux
from kvmpy.pc.linux import FEATURES, host_words
from kvmpy.units import KiB, MiB


def lacks(*abilities: str) -> Callable[[str], bool]:
    """Return the probe of a host that lacks ``abilities``."""
    return lambda ability: ability not in abilities


EVERYTHING = tuple(feature.ability for feature in FEATURES)


def test_the_abilities_are_some_that_are_probed() -> None:
    assert set(EVERYTHING) <= set(Ability)


def test_a_host_that_does_all_of_it_right_adds_nothing() -> None:
    assert host_words(lacks(), BootOptions(append="clearcpuid=141")) == ()


@pytest.mark.parametrize(
    ("ability", "number", "name"),
    [
        ("rdpid-cpl0", 534, "rdpid"),
        ("movbe-cpl0", 150, "movbe"),
        ("lzcnt-cpl0", 197, "lzcnt"),
        ("tzcnt-cpl0", 291, "tzcnt"),
        ("native-cpl0", 319, "avx512vl"),
    ],
)
def test_each_lack_is_a_number_with_its_reason(ability: str, number: int, name: str) -> None:
    """X86_FEATURE_RDPID, MOVBE, ABM, BMI1, AVX512VL: arch/x86/include/asm/cpufeatures.h."""
    (word,) = host_words(lacks(ability), BootOptions())
    assert word.text == f"clearcpuid={number}"
    assert name in word.why


@pytest.mark.parametrize(
    ("append", "expected"),
    [
        ("console=ttyS0", "534,150"),
        ("clearcpuid=141,308", "534,150,141,308"),
        ("quiet clearcpuid=150,141", "534,150,141"),
        ("clearcpuid=1 clearcpuid=2 quiet", "534,150,2"),
        ("clearcpuid= xclearcpuid=7", "534,150"),
        ("clearcpuid=smap", "534,150,smap"),
    ],
)
def test_what_the_user_masks_stays_masked(append: str, expected: str) -> None:
    """Linux obeys the last of several: cmdline_find_option in arch/x86/lib/cmdline.c."""
    (word,) = host_words(lacks("rdpid-cpl0", "movbe-cpl0"), BootOptions(append=append))
    assert word.text == f"clearcpuid={expected}"


# --- in a PC ----------------------------------------------------------------------------------------------------

DISK_WORD = "virtio_mmio.device=4K@0xd0000000:5"


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that emulates ring 0, and cannot do rdpid."""
    monkeypatch.setattr(linux, "_has", lacks("rdpid-cpl0", "native-cpl0"))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MachineSpec]:
    """Return a function that makes a spec with a disk, which boots ``image`` with "quiet"."""

    def make(image: bytes, **fields: object) -> MachineSpec:
        (tmp_path / "image").write_bytes(image)
        (tmp_path / "disk").write_bytes(bytes(64 * KiB))
        disk = Disk(tmp_path / "disk", format="raw")
        options = BootOptions(append="quiet")
        return MachineSpec(str(tmp_path / "image"), memory=64 * MiB, boot_options=options, disks=[disk], **fields)

    return make


def words_of(spec: MachineSpec) -> tuple[str, list[str]]:
    """Return the command line of a PC, and what of it was added."""
    with Pc(spec) as pc:
        assert all(word.why for word in pc.loaded.words)
        return pc.loaded.cmdline, [word.text for word in pc.loaded.words]


@pytest.mark.kvm
@pytest.mark.usefixtures("wrong")
def test_linux_is_told_of_disks_and_of_the_host(make: Callable[..., MachineSpec]) -> None:
    added = [DISK_WORD, "clearcpuid=534,319"]
    assert words_of(make(linux_bzimage())) == (f"quiet {' '.join(added)}", added)
    acpi = make(linux_bzimage(), virtio=Announcement.ACPI)
    assert words_of(acpi) == ("quiet clearcpuid=534,319", ["clearcpuid=534,319"])


@pytest.mark.kvm
@pytest.mark.usefixtures("wrong")
def test_another_kernel_is_told_of_disks_alone(make: Callable[..., MachineSpec]) -> None:
    assert words_of(make(plain_bzimage()))[1] == [DISK_WORD]


@pytest.mark.kvm
@pytest.mark.usefixtures("wrong")
def test_exact_is_what_the_user_said(make: Callable[..., MachineSpec]) -> None:
    assert words_of(make(linux_bzimage(), append_exact=True)) == ("quiet", [])


@pytest.mark.kvm
def test_on_this_host_the_words_are_what_the_probes_found(make: Callable[..., MachineSpec]) -> None:
    _, words = words_of(make(linux_bzimage()))
    numbers = [str(feature.number) for feature in FEATURES if not has(feature.ability)]
    assert words[1:] == ([f"clearcpuid={','.join(numbers)}"] if numbers else [])


@pytest.mark.kvm
def test_host_that_executes_ring_0_itself_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    native = Finding(Ability.NATIVE_CPL0, Verdict.OK)
    known = {Ability.NATIVE_CPL0: native}
    monkeypatch.setattr("kvmpy.machine.probe._known", known)
    assert not linux.ring_0_is_slow()
    assert known == {Ability.NATIVE_CPL0: native}


@pytest.mark.kvm
def test_several_abilities_are_found_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [has(ability) for ability in EVERYTHING]
    monkeypatch.setattr("kvmpy.machine.probe._known", {})
    learn(EVERYTHING)
    assert [has(ability) for ability in EVERYTHING] == before
