"""One run of a job: what is there already, the work, and how it ends.

A job goes on from the last line of its journal. See docs/architecture.md, "A resumable job".
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path

from gemb.engine import Engine
from gemb.engine.ahead import ReadAhead
from gemb.engine.cache import ARITHMETIC, VectorCache
from gemb.engine.opening import arithmetic, options_of, stdout_guarded
from gemb.engine.windows import Pace, Rules, Windows, compute, in_shard, pausing
from gemb.errors import Exit, GembError, Interrupted, MismatchError
from gemb.files import Journal, os_errors_explained, read_json, write_json
from gemb.jobs.calibration import RowSink
from gemb.jobs.interrupts import Interrupts
from gemb.jobs.record import done_already, keep_record, record_path, versions
from gemb.jobs.reporting import make_report
from gemb.jobs.request import InputIdentity, Request, other_version, refuse
from gemb.jobs.seen import SeenIds
from gemb.jobs.setup import STDOUT, OpenEngine, Setup, any_ranges
from gemb.jobs.watch import Watch
from gemb.jobs.writing import Counts, Destination, Rejects, State, Writer
from gemb.model.folder import fingerprint
from gemb.recipe import resolved
from gemb.report import Report, counted
from gemb.text.records import Record, Reject, read_records
from gemb.vectors.layout import OutputFile, output_files
from gemb.vectors.shards import BLOCK_RECORDS, BlockTable, write_table

WINDOWS_AHEAD = 1
IDS_AT_ONCE = 10_000  # when the table of ids is made again
FIRST_WINDOW_SECONDS = 0.5  # to wait for it before the model is loaded
FORMATS_WITHOUT_IDS = frozenset({"text", "document", "folder"})
"""Formats whose ids are places, made by gemb, so that no two are the same."""


class Run:
    """One run of a job, from its state to its report."""

    def __init__(self, setup: Setup, watch: Watch, interrupts: Interrupts, open_engine: OpenEngine) -> None:
        self._setup = setup
        self._interrupts = interrupts
        self._open_engine = open_engine
        self._watch = watch
        self._began = time.monotonic()
        self._notes = list(setup.notes)
        self._device_line = ""
        self._before = Counts()  # of earlier runs

    def to_stream(self) -> Report:
        """Rows to stdout in input order, as they are ready."""
        setup = self._setup
        with seen_ids(setup, None) as seen:
            sink = RowSink(STDOUT, Path(), setup.layout, None, dims=setup.dims, int8=False)
            rejects = Rejects(None, Path(), State().rejects, self._watch.note)
            state, _, more = self._embed(sink, rejects, None, seen, State())
            if state.counts.records == 0 and not more:
                raise GembError(f"{self._names()}: no rows")
            self._limits_at_end(state.counts, "above")
            return self._report(state, more=more)

    def to_file(self, *, overwrite: bool) -> Report:
        """Rows to a file or folder, going on where an earlier run of the same request stopped."""
        setup = self._setup
        with self._interrupts.at_once():
            request, done = self._begin(overwrite)
        if done is not None:
            return done
        try:
            return self._write_file(request)
        except BaseException:
            # A pipe cannot be read again, and before the first journal line there is nothing to go on with.
            if setup.reads_pipe or _is_unbegun(setup.work):
                shutil.rmtree(setup.work, ignore_errors=True)
            raise

    def _write_file(self, request: Request) -> Report:
        """The work from the last journal line on, up to the finished files."""
        setup = self._setup
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(setup.work / "journal.jsonl"))
            state = State.from_entry(journal.last) if journal.last else State()
            complete = bool(journal.last and journal.last.get("complete"))
            self._before = replace(state.counts)
            sink = RowSink(
                setup.output,
                setup.work,
                setup.layout,
                state.sink,
                dims=setup.dims,
                int8=setup.recipe.dtype == "int8",
            )
            stack.callback(sink.close)
            rejects = Rejects(setup.rejects_file, setup.work, state.rejects, self._watch.note)
            stack.callback(rejects.close)
            more = False
            if not complete:
                seen = stack.enter_context(seen_ids(setup, setup.work / "seen.sqlite"))
                state, read, more = self._embed(sink, rejects, journal, seen, state)
                if more and not setup.reads_pipe:
                    return self._report(state, more=True)
                if state.counts.rows == 0 and setup.shard is None:
                    raise self._no_rows(state.counts)
                self._limits_at_end(state.counts, str(setup.rejects_file))
                self._check_unchanged(request)
                state = replace(state, sink=sink.settle())
                journal.append({**state.as_entry(), "read": read, "complete": True})
            table = self._block_table(request, journal)
            # The record of what stood there before is no record of what comes in its place.
            record_path(setup.output).unlink(missing_ok=True)
            files = sink.finish()
            rejects.finish()
            clipped = sink.clipped_values
        report = self._report(state, files, more=more, clipped_values=clipped)
        keep_record(setup.output, request, report, files, resolved(setup.recipe))
        if table is not None:
            write_table(setup.output, table)
        with os_errors_explained(setup.work):
            # In one step, so that no part of it can be taken for a job that is to be gone on with.
            setup.work.rename(setup.finished_work)
            shutil.rmtree(setup.finished_work)
        return report

    # --- what is there already --------------------------------------------------------------------------

    def _begin(self, overwrite: bool) -> tuple[Request, Report | None]:
        """The request, with its work folder made or found again; or the report of a job that is done."""
        setup = self._setup
        work = setup.work
        with os_errors_explained(setup.finished_work):
            if setup.finished_work.exists():  # of a run that was killed while it tidied up
                shutil.rmtree(setup.finished_work)
        begun = self._begun(overwrite)
        request = setup.request(begun.inputs if begun else ())
        if begun is not None and setup.reads_pipe:
            self._notes.append(f"what an earlier run left in {work} is dropped: a pipe cannot be read again")
            begun = None
        elif begun is not None and _is_unbegun(work):
            begun = None  # killed before its first rows were on the disk: nothing is lost
        elif begun is not None and (differences := begun.differences(request)):
            if not overwrite:
                raise refuse(
                    f"{work} was begun by another request",
                    differences,
                    "run that request again to finish it, or pass --overwrite to start anew",
                )
            begun = None
        if begun is not None:
            return request, None
        if not overwrite:
            layout = setup.layout(any_ranges(setup.dims) if setup.recipe.dtype == "int8" else None)
            request_for = None if setup.reads_pipe else setup.request
            done = done_already(setup.output, output_files(setup.output, layout), request_for)
            if done is not None:
                return request, done
        self._make_work_folder(request)
        return request, None

    def _begun(self, overwrite: bool) -> Request | None:
        """The request of the unfinished job that is there, if any; one that cannot be read is overwritten."""
        path = self._setup.work / "job.json"
        if not path.exists():
            return None
        try:
            job = read_json(path)
            if job.get("format") != State.FORMAT:
                raise other_version(path)
            return Request.from_json(job.get("request"), path)
        except GembError:
            if overwrite:
                return None
            raise

    def _make_work_folder(self, request: Request) -> None:
        """A new work folder that holds the request."""
        setup = self._setup
        work = setup.work
        with os_errors_explained(work):
            if work.exists():
                strange = not work.is_dir() or any(not path.name.startswith(".") for path in work.iterdir())
                if strange and not (work / "job.json").exists():
                    raise GembError(
                        f"{work} is in the way and is not gemb's; move it, or choose another output"
                    )
                shutil.rmtree(work)
            work.mkdir()
        write_json(
            work / "job.json",
            {
                "format": State.FORMAT,
                "request": request.as_json(),
                "recipe": resolved(setup.recipe),
                "versions": versions(),
            },
        )

    # --- the work ---------------------------------------------------------------------------------------

    def _embed(
        self,
        sink: RowSink,
        rejects: Rejects,
        journal: Journal | None,
        seen: SeenIds | None,
        state: State,
    ) -> tuple[State, int, bool]:
        """Embed from `state` on as far as the input or a limit goes.

        Returns where it then stands, how many records were read, and whether more are left.
        """
        setup, recipe, stop = self._setup, self._setup.recipe, self._interrupts.stop
        if seen is not None:
            state = self._ids_again(seen, state)
        open_cache = None
        if recipe.cache is not None:
            computed = arithmetic(recipe.device, recipe.precision, recipe.engine)
            context = [fingerprint(setup.folder), *computed, str(ARITHMETIC)]
            open_cache = partial(VectorCache, recipe.cache, context=context, dims=setup.folder.dims)
            with self._interrupts.at_once():
                open_cache().close()  # a folder that cannot be a cache shows now
        pace = Pace() if recipe.max_seconds is None else Pace(recipe.max_seconds / 8)
        windows = Windows(
            self._records(state.next_record),
            setup.tokeniser,
            setup.template,
            Rules(
                on_long=recipe.on_long,
                skip_empty=recipe.empty == "skip",
                stop_at_refusal=setup.limits.stop_at_first,
                shard=setup.shard,
                limit_records=recipe.limit_rows,
                deadline=None if recipe.max_seconds is None else self._began + recipe.max_seconds,
            ),
            pace,
            start=state.next_record,
            dims=setup.folder.dims,
            prompt_tokens=setup.prompt_tokens,
            open_cache=open_cache,
        )
        ahead = ReadAhead(iter(windows), depth=WINDOWS_AHEAD, stop=stop, name="gemb-reader")
        try:
            with self._interrupts.at_once():
                # What is wrong with the first rows shows before the model is loaded.
                first = ahead.take(timeout=FIRST_WINDOW_SECONDS)
                with stdout_guarded():
                    engine = self._open_engine(setup, self._watch.note)
        except StopIteration:  # not one record is left
            self._check_whole(windows, state)
            return state, windows.read, windows.more
        except BaseException:
            ahead.close()
            raise
        if state.precision is not None and state.precision != engine.precision:
            ahead.close()
            engine.close()
            raise self._other_precision(state.precision, engine)
        state = replace(state, precision=engine.precision)
        self._device_line = engine.device_line
        self._notes += engine.notes
        self._watch.begin(state.counts, setup.inputs, setup.shard[1] if setup.shard else 1)
        destination = Destination(
            sink,
            rejects,
            journal,
            seen,
            open_cache,
            dims=setup.dims,
            normalise=setup.normalise,
            sharded=setup.shard is not None,
            has_id_lines=setup.has_id_lines,
        )
        writer = Writer(destination, state, setup.limits, stop=stop, on_written=self._watch.written)
        try:
            compute(
                chain(first or (), ahead),
                engine,
                writer.deliver,
                pace=pace,
                stop=stop,
                notice=self._watch.note,
                on_piece=self._watch.computed,
            )
        except BaseException:
            writer.close_quietly()  # what is complete is kept; the reason to stop is this one
            raise
        else:
            writer.close()
        finally:
            ahead.close()
            engine.close()
        if self._interrupts.exit_code is not None:
            raise self._interrupted(writer.state.counts, self._interrupts.exit_code)
        self._check_whole(windows, writer.state)
        return writer.state, windows.read, windows.more

    def _check_whole(self, windows: Windows, state: State) -> None:
        """Raises RuntimeError if not all that was to be read is done: a part must not pass for the whole."""
        if not windows.ended or state.next_record != windows.end:
            raise RuntimeError(f"{self._names()}: done up to record {state.next_record:,}, not to the end")

    def _records(self, start: int) -> Iterator[Record | Reject | None]:
        setup = self._setup
        records = read_records(setup.inputs, setup.read_options(start))
        return pausing(records, self._interrupts.stop) if setup.reads_pipe else records

    def _ids_again(self, seen: SeenIds, state: State) -> State:
        """The state with a table of ids that is as long as the journal says; made again where it is not."""
        if seen.keep_before(state.next_record) == state.seen:
            return state
        # A power failure took what was never synced. The input still tells.
        self._watch.note("the table of ids is made again, by reading the input from its start")
        seen.keep_before(0)
        setup = self._setup
        records = takewhile(
            lambda record: record.index < state.next_record and not self._interrupts.stop.is_set(),
            (
                record
                for record in read_records(setup.inputs, setup.read_options(0))
                if isinstance(record, Record) and (not setup.shard or in_shard(record.index, setup.shard))
            ),
        )
        while some := list(islice(records, IDS_AT_ONCE)):
            seen.add(
                [record.id for record in some],
                [record.index for record in some],
                [f"{record.source}:{record.line}" for record in some],
            )
        return replace(state, seen=seen.keep_before(state.next_record))

    def _check_unchanged(self, request: Request) -> None:
        """Raises GembError if an input is no longer what it was when the job began."""
        files = [file for file in self._setup.inputs if not file.is_stream]
        for file, before in zip(files, request.inputs, strict=True):
            if file.path is None or not file.path.is_file():
                continue  # a folder, or removed after it was read
            with os_errors_explained(file.path, "read"):
                status = file.path.stat()
                present = replace(file, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
                now = InputIdentity.of(present, (before,))
            if (now.bytes, now.digest) != (before.bytes, before.digest):
                raise GembError(
                    f"{file.name} changed while it was read; "
                    "once it is at rest, pass --overwrite to start anew"
                )

    def _block_table(self, request: Request, journal: Journal) -> BlockTable | None:
        """The rows that each block of a shard became, from the whole journal; None if this is no shard."""
        if self._setup.shard is None or journal.last is None:
            return None
        part, count = self._setup.shard
        blocks = -(-journal.last["read"] // BLOCK_RECORDS)
        rows = dict.fromkeys(range(part, blocks, count), 0)
        for entry in journal.entries():
            for block, some in entry.get("blocks", ()):
                rows[block] += some
        return BlockTable(part, count, request.shared_digest(), blocks, list(rows.values()))

    # --- how it ends ------------------------------------------------------------------------------------

    def _names(self) -> str:
        return ", ".join(file.name for file in self._setup.inputs)

    def _interrupted(self, counts: Counts, exit_code: Exit) -> Interrupted:
        setup, rows = self._setup, counted(counts.rows, "row")
        if setup.is_stream:
            return Interrupted(
                f"interrupted after {rows}; rows on stdout cannot be gone on with",
                exit_code,
            )
        if setup.reads_pipe:
            return Interrupted(
                f"interrupted after {rows}, which are lost: the input is a pipe and cannot be "
                "read again; save it to a file first for jobs that may be interrupted",
                exit_code,
            )
        return Interrupted(
            f"interrupted; {rows} kept in {setup.work}, run the same command again to go on",
            exit_code,
        )

    def _no_rows(self, counts: Counts) -> GembError:
        if counts.records == 0:
            return GembError(f"{self._names()}: no rows")
        why = (
            f"{counts.rejected:,} rejected, {counts.empty_skipped:,} empty, {counts.long_skipped:,} too long"
        )
        place = f"; see {self._setup.rejects_file}" if counts.rejected else ""
        return GembError(
            f"{self._names()}: of {counted(counts.records, 'row')} none can be embedded ({why}){place}"
        )

    def _other_precision(self, before: str, engine: Engine) -> MismatchError:
        work = self._setup.work
        return MismatchError(
            f"{work} holds rows computed in {before}, but here it would be {engine.precision} "
            f"({engine.device_line}); pass {options_of(before)}, or remove {work} to start anew"
        )

    def _limits_at_end(self, counts: Counts, place: str) -> None:
        self._setup.limits.check_at_end(counts, place)

    def _report(
        self,
        state: State,
        files: Sequence[OutputFile] = (),
        *,
        more: bool,
        clipped_values: int = 0,
    ) -> Report:
        return make_report(
            self._setup,
            state,
            before=self._before,
            device_line=self._device_line,
            files=files,
            clipped_values=clipped_values,
            more=more,
            notes=self._notes,
        )


def _is_unbegun(work: Path) -> bool:
    """Whether no row of a job is on the disk yet, so that nothing is lost with its work folder."""
    journal = work / "journal.jsonl"
    return not journal.exists() or journal.stat().st_size == 0


@contextmanager
def seen_ids(setup: Setup, path: Path | None) -> Iterator[SeenIds | None]:
    """The table of ids, for inputs that have ids of their own."""
    if all(file.format in FORMATS_WITHOUT_IDS for file in setup.inputs):
        yield None
        return
    seen = SeenIds(path)
    try:
        yield seen
    finally:
        seen.close()
