"""docs/linux.md says what happens: its sessions are typed as they stand, its other commands and names are checked."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import linux_guest
import linux_runs
import pytest
from linux_runs import CAMPAIGN, ext4, initramfs, kernel
from linux_terminal import PROMPT, Terminal

from kvmpy.cli import main, parser

pytestmark = linux_runs.pytestmark

DOCUMENT = linux_guest.ROOT / "docs" / "linux.md"
linux_kernel = linux_guest.module("kernel")
HOST = "$ "
UNTOLD = ("mke2fs",)
"""Commands whose output the page leaves out."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


class Line(NamedTuple):
    """What is typed, where, and what stands below it."""

    prompt: str
    typed: str
    shown: str


def session(text: str) -> list[Line]:
    parts = re.split(rf"^({re.escape(HOST)}|{re.escape(PROMPT)})(.*)\n", text, flags=re.MULTILINE)
    return [Line(*parts[at : at + 3]) for at in range(1, len(parts), 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what ``make linux-guest`` builds, as far as the sessions want it."""
    built = tmp_path / "build" / "linux"
    built.mkdir(parents=True)
    (built / "vmlinux").symlink_to(kernel("vmlinux"))
    initramfs(built / "initramfs-busybox.cpio", "busybox")
    ext4(built / "rootfs.ext4", with_shell=True)
    return tmp_path


def try_session(lines: list[Line], folder: Path) -> None:
    terminal = None
    with ExitStack() as stack:
        for line in lines:
            if line.prompt == HOST:
                assert terminal is None
                words = [sys.executable, "-m", *shlex.split(line.typed)]
                if words[-1] == "-i":
                    terminal = stack.enter_context(Terminal(words, folder=folder))
                    terminal.until(PROMPT)
                else:
                    environment = os.environ | {"PYTHONPATH": str(linux_guest.ROOT)}
                    done = subprocess.run(
                        words, cwd=folder, env=environment, capture_output=True, text=True, check=True
                    )
                    assert done.stdout + done.stderr == line.shown
                continue
            assert terminal is not None
            if line.typed == "exit":
                terminal.type("exit\r")
                terminal.end()
                assert terminal.screen.replace("\r", "").endswith("\n" + line.shown)
                terminal = None
            else:
                shown = terminal.obey(line.typed)
                assert shown == line.shown or line.typed.split()[0] in UNTOLD, line
    assert terminal is None


@pytest.mark.skipif(not CAMPAIGN, reason="a part of make campaign-linux")
@pytest.mark.parametrize("number", range(len(blocks("console"))))
def test_sessions_are_what_happens(folder: Path, number: int) -> None:
    try_session(session(blocks("console")[number]), folder)


def commands() -> list[str]:
    """Return every command of kvmpy's on the page."""
    typed = [line.typed for text in blocks("console") for line in session(text) if line.prompt == HOST]
    typed += [line for text in blocks("sh") for line in text.splitlines() if not line.startswith("#")]
    return [found[1] for line in typed if (found := re.search(r"(?:^|\| )(kvmpy .*)", line.partition("#")[0]))]


def test_every_command_is_one() -> None:
    """Its options are, with their values; and each file is one that is built."""
    outputs = {f"build/linux/{name}" for group in ("", "-smp", "-full") for name in linux_kernel.outputs(group)}
    outputs |= {f"build/linux/{name}" for name in linux_runs.programs.outputs()}
    for line in commands():
        name, *rest = shlex.split(line)[1:]
        module = main.import_module(main.COMMANDS[name][0])
        reader = parser.Parser(prog=name, description="")
        module.configure(reader)
        reader.parse_args(rest)
        assert {word for word in rest if word.startswith("build/")} <= outputs
    assert len(commands()) > 8


def test_names_on_the_page_are_those_of_the_sources() -> None:
    text = DOCUMENT.read_text()
    fragments = "".join(path.read_text() for path in linux_guest.SOURCES.glob("*.config"))
    assert set(re.findall(r"CONFIG_\w+", text)) <= set(re.findall(r"^(CONFIG_\w+)=", fragments, re.MULTILINE))
    targets = re.findall(r"^([\w-]+):", (linux_guest.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w[\w-]+)", " ".join([*blocks("sh"), *re.findall(r"`(.*?)`", text)]))) <= set(
        targets
    )
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (DOCUMENT.parent / link).exists(), link
    for code in blocks("python"):
        imports = [line for line in code.splitlines() if re.match(r"import |from ", line)]
        exec("\n".join(imports), {})
        compile(code, str(DOCUMENT), "exec")
