"""When bars move and colours show."""

import io

import pytest

from gemb.report import terminal


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "environment", "interactive", "colour"),
    [
        (True, {}, True, True),
        (False, {}, False, False),
        (True, {"NO_COLOR": "1"}, True, False),
        (True, {"NO_COLOR": ""}, True, True),
        (True, {"TERM": "dumb"}, False, False),
        (True, {"CI": "true"}, False, False),
        (True, {"CI": "true", "FORCE_COLOR": "1"}, False, True),
        (False, {"FORCE_COLOR": "1"}, False, True),
        (False, {"CLICOLOR_FORCE": "1"}, False, True),
        (False, {"CLICOLOR_FORCE": "0"}, False, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_the_environment_decides_what_a_stream_shows(
    is_terminal: bool,
    environment: dict[str, str],
    interactive: bool,
    colour: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Stream(is_terminal=is_terminal)
    assert terminal.is_interactive(stream) is interactive
    assert terminal.has_colour(stream) is colour
    console = terminal.console(stream)
    assert (console.is_interactive, not console.no_color) == (interactive, colour)
