"""How far a run is, told to whoever watches it."""

from __future__ import annotations

from gemb.report import Event, OnProgress


class Watch:
    """The progress of a run as events: steps with their loss, notes, and other stages."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._last = Event("training", 0, None, "steps")
        self.total_steps: int | None = None
        """Of the run; None while nobody knows, or where its length is in tokens."""

    def note(self, line: str) -> None:
        """Tell people one line at once."""
        last = self._last
        self._on_progress(Event(last.stage, last.done, last.total, last.unit, note=line))

    def stage(self, name: str) -> None:
        """Something else than training is done now."""
        self._last = Event(name, 0, None, "texts")
        self._on_progress(self._last)

    def step(self, step: int, tokens: int, loss: float, share: float | None = None) -> None:
        """A step is done; `tokens` are those of this run of the command, `share` that of the peak."""
        detail = f"loss {loss:.4f}"
        if share is not None:
            detail += f", {share * 100:.0f} % of the processor's peak"
        self._last = Event("training", step, self.total_steps, "steps", tokens=tokens, detail=detail)
        self._on_progress(self._last)
