"""An ONNX graph while it is written: nodes in order, small constants inside, weights in a file beside it.

Weights go to disk as they come, so that no more than one of them is in memory besides the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gemb.model.onnx import CHECKSUM, NO_CHECKSUM, OWN_CHECKSUM, sealed

Value: TypeAlias = str
"""The name of a tensor in the graph."""
Axis: TypeAlias = int | str
"""A size, or the name of one that is only known when the graph runs."""

OPSET = 20
"""The first with Gelu; onnxruntime 1.17 and later run it."""
IR_VERSION = 10  # what onnxruntime 1.18 reads, too; onnx itself would write its newest
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators; a graph has it only where weights are whole numbers."""
ALIGNMENT = 4096  # a page, so that weights can be mapped from the file
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """Nodes and weights, written to `path` and `path`_data by `save`; a context for the latter file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data_path = path.with_name(f"{path.name}_data")
        self._data = self._data_path.open("wb")
        self._checksum = hashlib.sha256()
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._uses_microsoft = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def input(self, name: str, shape: Sequence[Axis]) -> Value:
        """An int64 tensor that whoever runs the graph gives."""
        self._inputs.append(helper.make_tensor_value_info(name, INT64, shape))
        return name

    def output(self, name: str, value: Value, shape: Sequence[Axis]) -> None:
        """Give `value` out as the fp32 tensor `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, FLOAT, shape))

    def op(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> Value:  # noqa: ANN401
        """The one output of an operator; an input "" is one that is left out."""
        return self.split(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def split(
        self,
        kind: str,
        *inputs: Value,
        outputs: int,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> list[Value]:
        """The outputs of an operator that has several."""
        name = f"{kind}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}/{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        self._uses_microsoft |= domain == MICROSOFT
        return names

    def constant(self, values: float | Sequence[int] | NDArray[Any]) -> Value:
        """A small tensor: a float as fp32, whole numbers as int64, an array as it is; each once."""
        if isinstance(values, np.ndarray):
            array = values
        elif isinstance(values, float):
            array = np.array(values, dtype=np.float32)
        else:
            array = np.array(values, dtype=np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._weights.append(onnx.numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, array: NDArray[Any]) -> Value:
        """A tensor of the model, which goes to the data file now."""
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        self._write(bytes(-self._data.tell() % ALIGNMENT))
        where = {"location": self._data_path.name, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._weights.append(tensor)
        return name

    def _write(self, content: bytes | memoryview) -> None:
        self._checksum.update(content)
        self._data.write(content)

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write the graph itself, with `metadata` that onnxruntime shows, and the checksums of both files."""
        self._data.flush()
        graph = helper.make_graph(self._nodes, "encoder", self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", OPSET)]
        if self._uses_microsoft:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gemb")
        checksums = {CHECKSUM: self._checksum.hexdigest(), OWN_CHECKSUM: NO_CHECKSUM}
        helper.set_model_props(model, {**metadata, **checksums})
        self._path.write_bytes(sealed(model.SerializeToString(deterministic=True)))
