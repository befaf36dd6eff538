"""``kvmpy lessons [NAME]``: what there is to learn, and how to run it."""

from argparse import Namespace

from kvmpy.cli.messages import UsageError
from kvmpy.cli.parser import Parser
from kvmpy.lessons import STOP_REQUEST, Lesson, find, lessons


def configure(parser: Parser) -> None:
    """Say what the command line may hold."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this lesson's header and how to run it")


def execute(arguments: Namespace) -> int:
    """List the lessons, or show one."""
    if arguments.name is None:
        print(table(lessons()))
        return 0
    try:
        lesson = find(arguments.name)
    except LookupError as error:
        raise UsageError(str(error), "kvmpy lessons") from error
    print(header(lesson))
    print(f"Run it:\n  {command(lesson)}")
    return 0


def table(found: list[Lesson]) -> str:
    """Return a line for each lesson: its name, its mode, and what it teaches, without the source of that."""
    rows = [(lesson.name, lesson.mode.partition(",")[0], lesson.teaches.partition("   (")[0]) for lesson in found]
    names, modes = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return "\n".join(f"{name:{names}}  {mode:{modes}}  {teaches}" for name, mode, teaches in rows)


def header(lesson: Lesson) -> str:
    """Return the header of the lesson's source, without its comment signs."""
    lines = []
    for line in lesson.source.read_text().splitlines():
        if not line.startswith("#") or line.startswith("#include"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).rstrip() + "\n"


def command(lesson: Lesson) -> str:
    """Return the command that runs the lesson, with its input where it has one."""
    run = f"kvmpy run lesson:{lesson.name}"
    if lesson.disk:
        return f"kvmpy blob create disk.blob --size {lesson.disk}\n  {run} --disk disk.blob"
    if not lesson.input or lesson.input == STOP_REQUEST:
        return run
    typed = "".join(c if c.isprintable() and c not in "\\'%" else f"\\{ord(c):03o}" for c in lesson.input)
    return f"printf '{typed}' | {run}"
