"""Stored vectors of any origin as the teacher of a distillation, found by the text that they belong to.

`teacher: {vectors: FILE, texts: FILE}`: the vectors in any format that gemb reads (.npy with NAME.ids.txt,
.parquet with a column of vectors, .safetensors, .jsonl, .fbin, a folder of parts), and rows of id and text. A
row may have a field `role`, `query` or `passage`, where a text has one vector as a query and another as a
passage.

    teacher/vectors-1f3a.../
      texts.sqlite   the row of the vector of each text, by a hash of role and text
      vectors.npy    float32 [N, E], only where the format gives no rows out of the middle quickly
      stored.json    what was prepared, from which files; written last

R rows (texts) of a batch, N vectors, E their width.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from gemb.errors import GembError, MachineError, MismatchError
from gemb.files import Lock, file_digest, os_errors_explained, read_json, write_json
from gemb.text.inputs import InputFile, resolve_inputs
from gemb.text.records import ReadOptions, Record, read_records
from gemb.training.batches import TrainingBatch
from gemb.vectors import bad_rows, ids_path, kind_of, open_vectors
from gemb.vectors.readers import VectorFile

if TYPE_CHECKING:
    from gemb.device import Device
    from gemb.training.data_recipe import DataSet
    from gemb.training.run_folder import RunFolder
    from gemb.training.teacher_recipe import VectorSource
    from gemb.training.teaching import OpenTeacher, Teaching

ROLES = ("query", "passage")
_MAPPED = ("npy", "safetensors", "fbin")
"""Formats whose rows are mapped where they lie."""
_FORMAT = 1
_KEYS_A_QUERY = 900  # below SQLite's classical limit of 999 parameters
_ROWS_AT_ONCE = 4096
_WAIT_SECONDS = 24 * 3600.0  # for another process of this run that prepares the same teacher


def opener(settings: VectorSource) -> OpenTeacher:
    """What opens the stored vectors of a recipe as a teacher of its run."""
    if settings.vectors is None or settings.texts is None:
        raise ValueError("the recipe's teacher is not stored vectors")
    vectors, texts = settings.vectors, settings.texts

    @contextmanager
    def opened(folder: RunFolder, device: Device, held_out: Sequence[DataSet]) -> Iterator[Teaching]:
        from gemb.training.teaching import Teaching

        with StoredTeacher.open(Path(vectors), texts, folder.partial / "teacher") as teacher:
            yield Teaching(
                name=vectors,
                fingerprint=teacher.fingerprint,
                dims=teacher.dims,
                vectors=teacher.vectors,
                measure=lambda: None,  # it has no vectors for what the student is evaluated on
                notes=list(teacher.notes),
            )

    return opened


class StoredTeacher:
    """Vectors by role and text. For one thread."""

    def __init__(self, folder: Path, source: VectorFile, name: str, notes: Sequence[str]) -> None:
        self.fingerprint: str = read_json(folder / "stored.json")["fingerprint"]
        """Of the vectors and of the texts that they belong to."""
        self.dims = source.dims
        """E."""
        self.notes = tuple(notes)
        self._name = name
        self._source = source
        self._database = sqlite3.connect(f"file:{folder / 'texts.sqlite'}?mode=ro", uri=True)

    @classmethod
    def open(cls, vectors: Path, texts: str, cache: Path) -> StoredTeacher:
        """The vectors of a file, with the texts of another; what is looked up is prepared below `cache`.

        Of a text that stands twice in a role the first vector counts.

        Raises GembError for a file or row that cannot be read, an id that stands twice among the vectors, and
        where no vector has a text.
        """
        (rows,) = resolve_inputs([texts])
        fingerprint = blake2b(
            f"{_FORMAT} {_content(vectors)} {rows.fingerprint()}".encode(), digest_size=16
        ).hexdigest()
        folder = cache / f"vectors-{fingerprint}"
        with os_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder / "lock", f"the teacher {vectors}", _WAIT_SECONDS):
            if not (folder / "stored.json").is_file():
                with open_vectors(vectors) as source:
                    counts = _prepare(source, rows, folder)
                    if kind_of(vectors) not in _MAPPED:
                        _copy(source, folder / "vectors.npy")
                write_json(folder / "stored.json", {"fingerprint": fingerprint, **counts})
        copy = folder / "vectors.npy"
        kept = read_json(folder / "stored.json")
        notes = [
            f"{vectors} has {kept['vectors']:,} vectors, for {kept['texts']:,} different texts of {texts}"
        ]
        if kept["without"]:
            notes.append(f"{kept['without']:,} texts of {texts} have no vector")
        # Its content was compared with the fingerprint just now.
        source = open_vectors(copy if copy.exists() else vectors, verify=False)
        return cls(folder, source, str(vectors), notes)

    def vectors(self, batch: TrainingBatch) -> NDArray[np.float32]:
        """float32[R, E] of the texts of a batch: first the queries, then all passages.

        Raises GembError for a text that has no vector, MismatchError for a vector that is none.
        """
        if batch.texts is None:
            raise ValueError(f"a batch of {batch.dataset} has no texts for the teacher")
        roles = [ROLES[row >= batch.pairs] for row in range(len(batch.texts))]
        return self.of(batch.texts, roles, batch.dataset)

    def of(self, texts: Sequence[str], roles: Sequence[str], dataset: str) -> NDArray[np.float32]:
        """float32[R, E] of texts in their roles, titles before them; see `vectors`."""
        keys = [[_key(text, role), _key(text, None)] for text, role in zip(texts, roles, strict=True)]
        found = self._rows([key for pair in keys for key in pair])
        rows = np.empty(len(texts), dtype=np.int64)
        for number, pair in enumerate(keys):
            row = next((found[key] for key in pair if key in found), None)
            if row is None:
                raise GembError(
                    f"{self._name} has no vector of the {roles[number]} {texts[number][:60]!r} of {dataset}; "
                    "embed that text, too, or name a model as the teacher"
                )
            rows[number] = row
        different, place = np.unique(rows, return_inverse=True)
        vectors = np.concatenate([self._source.block(row, row + 1) for row in different.tolist()])
        if len(bad := bad_rows(vectors)):
            row = int(different[bad[0]])
            raise MismatchError(
                f"{self._name}: the vector of row {row} (from 0) is not finite or all zeros; "
                "embed its text again"
            )
        return vectors[place]

    def close(self) -> None:
        """Closes the files."""
        self._database.close()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """The rows of the keys that are known."""
        found: dict[bytes, int] = {}
        for start in range(0, len(keys), _KEYS_A_QUERY):
            some = keys[start : start + _KEYS_A_QUERY]
            marks = ",".join("?" * len(some))
            found.update(self._database.execute(f"SELECT key, row FROM texts WHERE key IN ({marks})", some))
        return found


def _key(text: str, role: str | None) -> bytes:
    return blake2b(f"{role or ''}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _content(vectors: Path) -> str:
    """A digest of a file of vectors with its ids, or of all files of a folder of parts."""
    files = sorted(vectors.iterdir()) if vectors.is_dir() else [vectors, ids_path(vectors)]
    return " ".join(file_digest(path) for path in files if path == vectors or path.is_file())


def _prepare(source: VectorFile, texts: InputFile, folder: Path) -> dict[str, int]:
    """Writes the table of texts; gives how many vectors, texts with one, and texts without there are."""
    path = folder / "texts.sqlite"
    with ExitStack() as stack:
        with os_errors_explained(path):
            path.unlink(missing_ok=True)
        stack.enter_context(_explained(path))
        database = sqlite3.connect(path, isolation_level=None)
        stack.callback(database.close)
        database.execute("PRAGMA journal_mode=OFF")  # a run that is killed here begins this anew
        database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE texts (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        database.execute("BEGIN")
        for row, identifier in enumerate(source.iter_ids()):
            try:
                database.execute("INSERT INTO ids VALUES (?, ?)", (identifier, row))
            except sqlite3.IntegrityError as error:
                raise GembError(f'{source.path}: the id "{identifier}" stands there twice') from error
        without = 0
        for record in read_records([texts], ReadOptions(keep_fields=True)):
            if not isinstance(record, Record):
                raise GembError(str(record))
            without += not _add(database, record)
        known = int(database.execute("SELECT COUNT(*) FROM texts").fetchone()[0])
        if not known:
            raise GembError(
                f"no id of {texts.name} is among those of {source.path}; the vectors belong to other texts"
            )
        database.execute("DROP TABLE ids")
        database.execute("COMMIT")
    return {"vectors": source.rows, "texts": known, "without": without}


def _add(database: sqlite3.Connection, record: Record) -> bool:
    """Adds a text to the table; False if it has no vector."""
    found = database.execute("SELECT row FROM ids WHERE id = ?", (record.id,)).fetchone()
    if found is None:
        return False
    role = record.fields.get("role")
    if role not in (None, *ROLES):
        raise GembError(f'{record.source}:{record.line}: "role" is {role!r}, not {" or ".join(ROLES)}')
    text = f"{record.title} {record.text}" if record.title and record.title.strip() else record.text
    database.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (_key(text, role and str(role)), found[0]))
    return True


def _copy(source: VectorFile, target: Path) -> None:
    """The vectors as float32[N, E], for formats whose rows cannot be taken out of the middle."""
    with os_errors_explained(target):
        matrix = np.lib.format.open_memmap(
            target, mode="w+", dtype=np.float32, shape=(source.rows, source.dims)
        )
        first = 0
        for _, block in source.blocks(_ROWS_AT_ONCE):
            matrix[first : first + len(block)] = block
            first += len(block)
        matrix.flush()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what SQLite cannot do in the block into a MachineError."""
    try:
        yield
    except sqlite3.Error as error:
        raise MachineError(f"{path}: {error}; free some space, then run the command again") from error
