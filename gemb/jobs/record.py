"""What is kept of a job when it is done: NAME.gemb.json beside a file, gemb.json inside a folder.

It holds the request, the report and the checksums; a rerun of the same command finds it and does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from gemb.engine.onnx_engine import PRECISION as ONNX_PRECISION
from gemb.errors import Exit, GembError
from gemb.files import read_json, write_json
from gemb.jobs.request import AUTO, InputIdentity, Request, refuse
from gemb.report import Report, counted
from gemb.vectors.layout import RECORD, OutputFile, kind_of


def record_path(output: Path) -> Path:
    """Where the record of an output is."""
    if kind_of(output) == "shards":
        return output / RECORD
    return output.with_name(output.name + ".gemb.json")


def keep_record(
    output: Path,
    request: Request,
    report: Report,
    files: Sequence[OutputFile],
    recipe: Mapping[str, object],
) -> None:
    """Write the record of an output that is in its place."""
    path = record_path(output)
    write_json(
        path,
        {
            "request": request.as_json(),
            "recipe": recipe,
            "report": report.data,
            "files": [{**file.as_json(), "file": str(file.path.relative_to(path.parent))} for file in files],
            "versions": versions(),
        },
    )


def done_already(
    output: Path,
    paths: Sequence[Path],
    request_for: Callable[[tuple[InputIdentity, ...]], Request] | None,
) -> Report | None:
    """The report of a finished output, if it is what is asked for; None if none of its `paths` exists.

    `request_for` gives the present request; inputs that look like those it is given need not be read
    again. It is None for a job that cannot be told to be the same, because it reads a pipe.

    Raises GembError if there is an output of another request or of another program, or a damaged one.
    """
    there = [path for path in paths if path.exists()]
    if not there or (output.is_dir() and not any(output.iterdir())):
        return None
    path = record_path(output)
    if not path.exists() or request_for is None:
        needed = "" if there[-1] == output else f", which {output} would write,"
        raise GembError(
            f"{there[-1]}{needed} exists; pass --overwrite to replace it, or choose another output"
        )
    kept = read_json(path)
    made = Request.from_json(kept.get("request"), path)
    wanted = request_for(made.inputs)
    differences = made.differences(wanted)
    computed_in, precision = kept["report"].get("precision"), wanted.settings["precision"]
    if made.settings["precision"] == AUTO and precision not in (AUTO, str(computed_in).removesuffix(" onnx")):
        differences.append(("precision", f"was {computed_in}, now {precision}"))
    engine = wanted.settings.get("engine", AUTO)
    if made.settings.get("engine", AUTO) == AUTO != engine and computed_in is not None:
        made_by = "onnx" if computed_in == ONNX_PRECISION else "torch"
        if made_by != engine:
            differences.append(("engine", f"was {made_by}, now {engine}"))
    if differences:
        raise refuse(
            f"{output} exists and was made by another request",
            differences,
            "pass --overwrite to replace it, or choose another output",
        )
    changed = [
        entry["file"]
        for entry in kept["files"]
        if not (path.parent / entry["file"]).is_file()
        or (path.parent / entry["file"]).stat().st_size != entry["bytes"]
    ]
    if changed:
        raise GembError(
            f"{output} is not what was written: {', '.join(changed)} changed or gone; "
            "pass --overwrite to make it again"
        )
    report = kept["report"]
    return Report(
        title=f"already done: {output} holds {counted(report['rows'], 'row')}",
        data={**report, "already_done": True},
        outputs=[output],
        exit_code=Exit.REJECTED if report["rejected"] else Exit.DONE,
    )


def versions() -> dict[str, str]:
    """What may change numbers in their last digits: the versions of gemb and of what computes."""
    return {name: metadata.version(name) for name in ("gemb", "torch", "tokenizers", "numpy")}
