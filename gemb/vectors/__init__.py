"""Vectors without torch: check, cut, store smaller; writers and readers of every output format."""

from gemb.vectors.checks import bad_rows, cut
from gemb.vectors.layout import (
    Layout,
    OutputFile,
    check_output,
    estimated_bytes,
    ids_path,
    kind_of,
    output_files,
    ranges_path,
)
from gemb.vectors.quantise import (
    Int8Ranges,
    calibrate,
    from_bfloat16,
    from_binary,
    from_int8,
    to_bfloat16,
    to_binary,
    to_float16,
    to_int8,
)
from gemb.vectors.readers import VectorFile, open_vectors
from gemb.vectors.sinks import Position, Sink, open_sink

__all__ = [
    "Int8Ranges",
    "Layout",
    "OutputFile",
    "Position",
    "Sink",
    "VectorFile",
    "bad_rows",
    "calibrate",
    "check_output",
    "cut",
    "estimated_bytes",
    "from_bfloat16",
    "from_binary",
    "from_int8",
    "ids_path",
    "kind_of",
    "open_sink",
    "open_vectors",
    "output_files",
    "ranges_path",
    "to_bfloat16",
    "to_binary",
    "to_float16",
    "to_int8",
]
