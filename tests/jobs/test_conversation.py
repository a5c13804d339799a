"""The prompt: one model for all queries, and no mistake that ends it."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemb.errors import GembError, UnavailableError
from gemb.jobs.conversation import HELP, converse
from gemb.jobs.search import SearchRecipe
from gemb.retrieval.queries import QueryEncoder
from tests.indexes import FILMS, embedded, make_films, needs_minilm

pytestmark = needs_minilm


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_films(tmp_path_factory.mktemp("made") / "films.gemb")


def talk(
    index: Path, *lines: str | BaseException, others: tuple[Path, ...] = (), **settings: object
) -> list[str]:
    """What the prompt says to each line, the greeting first; an exception is raised in place of a line."""
    output = io.StringIO()
    said: list[str] = []
    given: Iterator[str | BaseException] = iter(lines)

    def ask(prompt: str) -> str:
        assert prompt == "search: "
        said.append(output.getvalue())
        output.seek(0)
        output.truncate()
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    fast = {"device": "cpu", "precision": "fp32", "threads": 1}
    converse(SearchRecipe(indexes=(index, *others), **(fast | settings)), ask=ask, output=output)  # type: ignore[arg-type]
    return said


def ids(table: str) -> list[str]:
    """The ids in a table, in order."""
    names = {film.id for film in FILMS}
    rows = [line.split() for line in table.splitlines()[3:]]  # after query, empty line and head
    return [next(word for word in row if word in names) for row in rows if row]


def test_queries_are_answered_until_the_input_ends(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[QueryEncoder] = []
    load = QueryEncoder.load

    def counted(self: QueryEncoder) -> None:
        loaded.append(self)
        load(self)

    monkeypatch.setattr(QueryEncoder, "load", counted)
    greeting, whale, nothing, rat = talk(films, "a white whale", "", "  a rat that cooks ")
    assert greeting == f"{films}: 5 documents; :help explains, Ctrl-D ends\n"
    assert (ids(whale)[0], nothing, ids(rat)[0]) == ("whale", "", "cook")
    assert len(loaded) == 1


def test_settings_hold_for_the_queries_that_follow(films: Path) -> None:
    said = talk(films, ":k 2", "the sea", ":where year < 1990", "the sea", ":where", "the sea")
    assert [len(ids(table)) for table in said[2::2]] == [2, 2, 2]
    assert set(ids(said[4])) <= {"metropolis", "android", "whale"}
    said = talk(films, ":lexical", "restaurant", ":hybrid", "restaurant", ":vector", "restaurant")
    assert ids(said[2]) == ["cook"]
    assert "words" in said[4]
    assert "words" not in said[6]
    assert ids(said[6])[0] == "cook"


def test_the_neighbours_of_a_document(films: Path) -> None:
    said = talk(films, ":like whale")
    assert sorted(ids(said[1])) == sorted(film.id for film in FILMS if film.id != "whale")


def test_a_mistake_is_told_and_changes_nothing(films: Path) -> None:
    said = talk(
        films, ":k none", ":k " + "9" * 5000, ":where yaer = 1", ":nosuch", ":like nosuch", "\ud800",
        KeyboardInterrupt(), ":help", "a white whale",
    )  # fmt: skip
    assert said[1:] == [
        ":k none: not a number of documents; write one such as :k 20\n",
        f":k {'9' * 5000}: not a number of documents; write one such as :k 20\n",
        "--where: no field yaer; did you mean year?\n  yaer = 1\n  ^\n",
        ":nosuch: no such command; :help lists them\n",
        f"{films} has no document 'nosuch'\n",
        "the query is not UTF-8 text (character 0)\n",
        "\n",
        HELP,
        said[-1],
    ]
    assert len(ids(said[-1])) == len(FILMS)


def test_several_indexes_are_talked_to_as_one(films: Path, tmp_path: Path) -> None:
    other = make_films(tmp_path / "other.gemb", FILMS[:1])
    said = talk(films, "a white whale", ":like whale", others=(other,))
    assert said[0] == f"{films}, {other}: 6 documents; :help explains, Ctrl-D ends\n"
    assert ids(said[1])[0] == "whale"
    assert said[2] == "like looks for the neighbours of a document in its own index; name one index\n"


def test_indexes_of_two_models_can_only_be_asked_by_words(films: Path, tmp_path: Path) -> None:
    other = make_films(tmp_path / "other.gemb", FILMS[:1], fingerprint="0" * 64, model="other")
    _, by_words, refused, again = talk(films, "whale", ":vector", "whale", others=(other,), lexical=True)
    assert ids(by_words) == ids(again) == ["whale"]
    assert "their scores cannot be compared" in refused


def test_what_a_writer_adds_is_found_at_the_next_query(tmp_path: Path) -> None:
    from gemb.store import Writer

    path = make_films(tmp_path / "films.gemb", FILMS[:2])

    class Late(str):
        """A line during whose writing a document is added."""

        def strip(self, chars: str | None = None, /) -> str:
            with Writer.open(path) as writer:
                writer.put([FILMS[3]], embedded([FILMS[3].text]))
            return "a white whale"

    assert ids(talk(path, Late())[1])[0] == "whale"


def test_nothing_to_search_ends_it_before_the_first_prompt(tmp_path: Path, films: Path) -> None:
    with pytest.raises(UnavailableError):
        talk(tmp_path / "gone.gemb")
    with pytest.raises(GembError, match="hybrid and lexical"):
        talk(films, hybrid=True, lexical=True)
