"""Guest memory that remembers who looked where."""

from kvmpy.machine.memory import GuestMemory


class WatchedMemory(GuestMemory):
    """Guest memory with a list of all (gpa, size) that were looked at or written, in order."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.touched: list[tuple[int, int]] = []

    def view(self, gpa: int, size: int) -> memoryview:
        self.touched.append((gpa, size))
        return super().view(gpa, size)

    def touched_in(self, gpa: int, size: int) -> list[int]:
        """Return where in [gpa, gpa+size) something was touched: the gpas, in order."""
        return [at for at, _ in self.touched if gpa <= at < gpa + size]
