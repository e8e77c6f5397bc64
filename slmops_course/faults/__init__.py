"""Faults on purpose: the pipeline is killed, its disk filled, its files damaged; the service gets storms of bad clients.

Every trial says how often it tried what, and what was lost. `python -m slmops_course.soak` carries them all out.
"""

from dataclasses import dataclass, field


@dataclass
class Trial:
    """What was tried, how often each kind of it, and each thing that was lost, in a sentence. Nothing lost is the aim."""

    name: str
    tried: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was measured on the way

    def count(self, kind: str) -> None:
        """One more of a kind."""
        self.tried[kind] = self.tried.get(kind, 0) + 1

    def __str__(self):
        counts = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.tried.items()))
        lines = [f"{self.name}: {counts or 'nothing was tried'}", *(f"  {note}" for note in self.notes)]
        lost = [f"  LOST: {sentence}" for sentence in self.lost]
        return "\n".join([*lines, *(lost or ["  nothing was lost"])])
