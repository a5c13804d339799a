"""The join of a job that was divided over shards: one output, as if it had not been divided."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gemb.engine.opening import options_of
from gemb.errors import Exit, GembError, MismatchError
from gemb.files import Lock, check_writable, os_errors_explained, read_json, readable_bytes
from gemb.jobs.record import done_already, keep_record, record_path
from gemb.jobs.request import Request
from gemb.jobs.seen import SeenIds
from gemb.jobs.watch import Watch
from gemb.jobs.writing import Counts
from gemb.recipe import resolved
from gemb.report import Report, counted
from gemb.vectors.layout import output_files
from gemb.vectors.shards import ShardPart, find_parts, layout_of
from gemb.vectors.shards import join as append_parts
from gemb.vectors.sinks import Position, Sink, open_sink

if TYPE_CHECKING:
    from gemb.jobs.embed import EmbedRecipe

SUMMED = tuple(field.name for field in fields(Counts))
OF_ONE_RUN = (
    "device", "notes", "rows_before", "rows_per_second", "tokens_per_second", "writing_share", "rejects_file",
)  # fmt: skip
"""What a shard's report says of its last run, which is nothing of the whole."""


def join(recipe: EmbedRecipe, watch: Watch, *, overwrite: bool) -> Report:
    """Join the shards beside the recipe's output to that output, in the order of the input.

    All shards must be there, complete and of one job. They are left where they are.

    Raises GembError if they are not, or if an id stands in two shards; MismatchError if they are of
    different jobs; and as `gemb.jobs.embed.run` for what is there already.
    """
    if recipe.output is None or str(recipe.output) == "-":
        raise GembError("--join needs the output that the shards were made for; pass -o docs.npy")
    output = recipe.output
    parts = find_parts(output)
    layout = layout_of(parts)
    records = [read_json(record_path(part.path)) for part in parts]
    request = Request.from_json(records[0].get("request"), record_path(parts[0].path)).unsharded()
    _check_precision(parts, [record["report"]["precision"] for record in records])
    lock = Lock(output.with_name(output.name + ".lock"), str(output), recipe.wait_lock, watch.note)
    with ExitStack() as stack:
        check_writable(output)
        stack.enter_context(lock)
        if not overwrite:
            done = done_already(output, output_files(output, layout), lambda known: request)
            if done is not None:
                return done
        work = output.with_name(output.name + ".joining")
        with os_errors_explained(work):
            if work.exists():  # of a join that was killed; it is quick to do again
                shutil.rmtree(work)
            work.mkdir()
        seen = SeenIds(work / "seen.sqlite")
        stack.callback(seen.close)
        sink = open_sink(output, work, layout)
        stack.callback(sink.close)
        rows = append_parts(parts, _WithoutRepeats(sink, seen, parts))
        record_path(output).unlink(missing_ok=True)
        files = sink.finish()
        shared = {name: value for name, value in records[0]["report"].items() if name not in OF_ONE_RUN}
        rejects = [record["report"]["rejects_file"] for record in records if record["report"]["rejects_file"]]
        data: dict[str, Any] = {
            **shared,
            "output": str(output),
            "shards": len(parts),
            "rejects_files": rejects,
        }
        data |= {name: sum(record["report"][name] for record in records) for name in SUMMED}
        data["files"] = [str(file.path) for file in files]
        rejected = counted(data["rejected"], "row")
        report = Report(
            title=f"joined {counted(len(parts), 'shard')}: {counted(rows, 'row')} in {output}",
            rows=[
                ("files", "\n".join(f"{file.path} ({readable_bytes(file.bytes)})" for file in files)),
                *([("rejected", f"{rejected}; see {', '.join(rejects)}")] if rejects else []),
                ("shards", "they are left where they are, and may be removed"),
            ],
            data=data,
            outputs=[file.path for file in files],
            exit_code=Exit.REJECTED if data["rejected"] else Exit.DONE,
        )
        keep_record(output, request, report, files, resolved(recipe))
        with os_errors_explained(work):
            shutil.rmtree(work)
    return report


def _check_precision(parts: Sequence[ShardPart], precisions: Sequence[str | None]) -> None:
    """Raises MismatchError unless all shards that have rows were computed in one precision."""
    known = [(part, precision) for part, precision in zip(parts, precisions, strict=True) if precision]
    for part, precision in known:
        first, usual = known[0]
        if precision != usual:
            raise MismatchError(
                f"{part.path} was computed in {precision}, but {first.path} in {usual}; "
                f"run --shard {part.table.shard}/{part.table.of} again with {options_of(usual)} --overwrite"
            )


class _WithoutRepeats:
    """A sink that refuses an id which another shard has too; each shard has looked at its own."""

    def __init__(self, sink: Sink, seen: SeenIds, parts: Sequence[ShardPart]) -> None:
        self._sink = sink
        self._seen = seen
        self._parts = parts
        self._rows = 0

    @property
    def position(self) -> Position:
        return self._sink.position

    def append(self, ids: Sequence[str], vectors: NDArray[Any]) -> None:
        raise NotImplementedError("a join appends stored rows only")

    def append_stored(self, ids: Sequence[str], stored: NDArray[Any]) -> None:
        numbers = range(self._rows, self._rows + len(ids))
        repeats = self._seen.add(ids, numbers, [f"row {number}" for number in numbers])
        if repeats:
            first = repeats[0]
            raise GembError(
                f"id {ids[first.position]!r} stands in two shards: at {first.first_place} of the joined "
                f"output and again at row {numbers[first.position]}; mend the input and run the shards again"
            )
        self._rows += len(ids)
        self._sink.append_stored(ids, stored)

    def sync(self) -> Position:
        return self._sink.sync()

    def finish(self) -> list[Any]:
        return self._sink.finish()

    def close(self) -> None:
        self._sink.close()
