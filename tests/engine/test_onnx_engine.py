"""The engine without torch, against the torch engine; when it is chosen, and what it says then."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from gemb.engine import Engine, onnx_engine, opening
from gemb.engine.encoder import Encoder, load_tokeniser
from gemb.engine.onnx_engine import (
    PRECISION,
    OnnxEngine,
    cached_graph,
    find_graph,
    open_session,
    write_cached_graph,
)
from gemb.engine.opening import arithmetic, open_engine, options_of
from gemb.errors import GembError, MachineError, MismatchError, UnavailableError
from gemb.model.folder import ModelFolder, fingerprint, read_folder
from gemb.model.onnx import NO_CHECKSUM, OWN_CHECKSUM, SAME_VECTORS, entry, sealed
from gemb.model.onnx.encoder import write_graph
from gemb.text.batches import Batch, token_batches
from tests.models import random_texts, tiny_folder

LENGTHS = (1, 30, 7, 7, 12, 2, 7, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMB_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def folder_of(place: Path, name: str = "gemma3") -> ModelFolder:
    return read_folder(tiny_folder(place / "model", name, dense=[{"out_features": 96}]))


def batch_of(folder: ModelFolder, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    encoded = load_tokeniser(folder).encode(random_texts(lengths))
    (batch,) = token_batches(encoded, 100_000)
    return batch


def opened(folder: ModelFolder, engine: opening.EngineName = "onnx", **settings: object) -> Engine:
    given: dict[str, object] = {
        "device": "auto",
        "precision": "auto",
        "threads": 1,
        "batch_tokens": None,
        "notice": lambda _: None,
        **settings,
    }
    return open_engine(folder, engine=engine, **given)  # type: ignore[arg-type]


def kinds_of(batch: Batch, rows: list[int]) -> Batch:
    """Only these rows of a batch."""
    ends = np.cumsum(batch.lengths)
    ids = np.concatenate([batch.ids[ends[row] - batch.lengths[row] : ends[row]] for row in rows])
    return Batch(ids, batch.lengths[rows], batch.rows[rows], batch.prompt_tokens)


# --- equivalence


@pytest.mark.parametrize("name", ["bert", "gemma3", "qwen3"])
def test_it_gives_the_vectors_of_the_torch_engine(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name)
    batch = batch_of(folder)
    torch, onnx = opened(folder, "torch", device="cpu", precision="fp32"), opened(folder)
    np.testing.assert_allclose(onnx.forward(batch), torch.forward(batch), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["bert", "qwen3 without causality"])  # the latter has texts of one token
def test_a_vector_does_not_depend_on_its_batch(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name)
    engine, batch = opened(folder), batch_of(folder)
    together = engine.forward(batch)
    for rows in (*([row] for row in range(len(LENGTHS))), [0, 3, 4], [2, 3], [5, 6, 7]):
        found = engine.forward(kinds_of(batch, rows))
        np.testing.assert_array_equal(found, together[rows])  # promised to 1e-6, and so to the bit here


def test_the_encoder_embeds_with_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    texts = random_texts(LENGTHS)
    torch = Encoder.load(folder.path, device="cpu", precision="fp32")
    onnx = Encoder.load(folder.path, engine="onnx")
    np.testing.assert_allclose(onnx.embed(texts), torch.embed(texts), atol=1e-6, rtol=0)


# --- which engine, and why


def device_line_of(engine: Engine) -> str:
    return engine.device_line.partition("; ")[2]


def test_auto_takes_it_for_few_texts_where_there_is_a_graph(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert opened(folder, "auto", few_texts=True).precision != PRECISION
    write_cached_graph(folder)
    engine = opened(folder, "auto", few_texts=True)
    assert engine.precision == PRECISION
    assert device_line_of(engine) == (
        "fp32 because onnxruntime runs it: for a few texts it is there before torch is"
    )
    for settings in (
        {"few_texts": False},
        {"few_texts": True, "precision": "bf16"},
        {"few_texts": True, "device": "cpu,cpu"},
    ):
        engine = opened(folder, "auto", **settings)
        engine.close()
        assert engine.precision != PRECISION, settings
    assert opened(folder, "torch", few_texts=True).precision != PRECISION


def test_a_device_of_the_environment_counts_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    write_cached_graph(folder)
    monkeypatch.setenv("GEMB_DEVICE", "cuda:7")
    with pytest.raises(GembError, match="cuda:7"):
        opened(folder, "auto", few_texts=True)
    with pytest.raises(GembError) as caught:
        opened(folder, "onnx")
    assert str(caught.value) == (
        "--engine onnx computes in fp32 on the cpu, not with --device cuda:7; leave one of them out"
    )


def test_it_computes_in_fp32_only(tmp_path: Path) -> None:
    with pytest.raises(GembError) as caught:
        opened(folder_of(tmp_path), precision="bf16")
    assert str(caught.value) == (
        "--engine onnx computes in fp32 on the cpu, not with --precision bf16; leave one of them out"
    )


def test_asked_for_it_writes_the_graph_once_and_says_so(tmp_path: Path, cache: Path) -> None:
    folder, told = folder_of(tmp_path), list[str]()
    engine = opened(folder, notice=told.append)
    opened(folder, notice=told.append)
    assert told == [f"writing the ONNX graph of {folder.path} into the cache, once"]
    assert device_line_of(engine) == "fp32 because onnxruntime runs it: --engine onnx asks for it"
    (made,) = (cache / "onnx").iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["model.onnx", "model.onnx_data"]


def test_a_family_without_a_graph_is_run_by_torch_unless_onnx_is_asked_for(tmp_path: Path) -> None:
    folder = read_folder(tiny_folder(tmp_path / "model", "mpnet"))
    assert opened(folder, "auto", few_texts=True).precision != PRECISION
    with pytest.raises(MismatchError, match="no ONNX graph is written for the model type 'mpnet'"):
        opened(folder)


def test_without_onnxruntime_auto_is_torch_and_onnx_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    write_cached_graph(folder)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(opening, "is_installed", lambda: False)
    assert opened(folder, "auto", few_texts=True).precision != PRECISION
    with pytest.raises(MachineError) as caught:
        opened(folder)
    assert str(caught.value).endswith("; pip install 'gemb[onnx]', or pass --engine torch")


def test_where_onnxruntime_cannot_be_imported_auto_goes_on_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = folder_of(tmp_path), list[str]()
    write_cached_graph(folder)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(
        opening, "is_installed", lambda: True
    )  # it is there, and a library that it needs is not
    assert opened(folder, "auto", few_texts=True, notice=told.append).precision != PRECISION
    (line,) = told
    assert line.startswith("torch runs the model instead: onnxruntime cannot be imported (")


def test_what_rows_were_computed_in_names_the_options_that_do_it_again() -> None:
    assert [options_of(name) for name in (PRECISION, "fp32", "bf16")] == [
        "--engine onnx",
        "--engine torch --precision fp32",
        "--precision bf16",
    ]


def test_a_cache_of_vectors_keeps_the_engines_apart() -> None:
    assert arithmetic("cpu", "fp32", "onnx") == ["cpu", PRECISION]
    assert arithmetic("cpu", "fp32", "auto") == arithmetic("cpu", "fp32", "torch") == ["cpu", "fp32"]


# --- which graph


def test_the_graph_of_the_folder_comes_before_that_of_the_cache(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert find_graph(folder) is None
    cached = write_cached_graph(folder)
    assert find_graph(folder) == cached == cached_graph(fingerprint(folder))
    own = folder.path / "onnx" / "model.onnx"
    own.parent.mkdir()
    write_graph(folder, own)
    assert find_graph(folder) == own


def test_a_graph_that_gives_other_vectors_is_left_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder.path / "onnx").mkdir()
    write_graph(folder, folder.path / "onnx" / "model_q4.onnx", "int4")  # the folder's weights are not on it
    assert find_graph(folder) is None
    other = read_folder(tiny_folder(tmp_path / "other", "bert"))
    write_graph(other, folder.path / "onnx" / "model.onnx")
    assert find_graph(folder) is None
    (folder.path / "onnx" / "model.onnx").write_bytes(b"made by another program")
    assert find_graph(folder) is None


def damaged_data(place: Path) -> None:
    data = place.with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:5000])


def lost_data(place: Path) -> None:
    place.with_name("model.onnx_data").unlink()


def no_graph(place: Path) -> None:
    metadata = onnx.load(place, load_external_data=False).metadata_props
    (identity,) = (one.value for one in metadata if one.key == SAME_VECTORS)
    place.write_bytes(b"\1" + entry(SAME_VECTORS, identity))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damaged_data, "{graph}_data is damaged: its checksum is not the one in model.onnx"),
        (lost_data, "{graph} is damaged: its weights model.onnx_data are not beside it"),
        (no_graph, "{graph} is damaged: it is no ONNX graph, or is cut short"),
    ],
)
def test_a_damaged_graph_is_told_by_name_and_auto_goes_on_with_torch(
    damage: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path)
    graph = write_cached_graph(folder)
    damage(graph)
    with pytest.raises(UnavailableError) as caught:
        open_session(graph)
    next_step = f"; remove {graph.parent} and make it again, or pass --engine torch"
    assert str(caught.value) == what.format(graph=graph) + next_step
    told: list[str] = []
    assert opened(folder, "auto", few_texts=True, notice=told.append).precision != PRECISION
    assert told == [f"torch runs the model instead: {caught.value}"]


def test_a_graph_that_onnxruntime_does_not_know_is_told_without_its_own_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    graph = write_cached_graph(folder)
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[3].op_type = "OfTheFuture"
    (own,) = (one for one in model.metadata_props if one.key == OWN_CHECKSUM)
    own.value = NO_CHECKSUM
    graph.write_bytes(sealed(model.SerializeToString()))
    with pytest.raises(MachineError) as caught:
        open_session(graph)
    assert str(caught.value) == (
        f"onnxruntime {onnxruntime.__version__} cannot run {graph}: it has operators or a layout that this "
        "version does not know; pip install -U onnxruntime, or pass --engine torch"
    )
    told: list[str] = []
    assert opened(folder, "auto", few_texts=True, notice=told.append).precision != PRECISION
    assert told == [f"torch runs the model instead: {caught.value}"]


@pytest.mark.parametrize("place", [0.2, 0.5, 0.99])
def test_a_flipped_bit_of_a_graph_is_found(place: float, tmp_path: Path) -> None:
    graph = write_cached_graph(folder_of(tmp_path))
    content = bytearray(graph.read_bytes())
    content[int(place * len(content))] ^= 1
    graph.write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        open_session(graph)
    assert str(caught.value) == (
        f"{graph} is damaged: its checksum is not the one in model.onnx; remove {graph.parent} and make it "
        "again, or pass --engine torch"
    )


def test_a_graph_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    graph = write_cached_graph(folder)
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    assert find_graph(folder) is None
    opened(folder)
    assert graph.read_bytes() == content


def test_a_flipped_bit_of_the_weights_is_found_and_a_whole_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = write_cached_graph(folder_of(tmp_path))
    open_session(graph)
    with monkeypatch.context() as patched:
        patched.setattr(onnx_engine, "file_digest", lambda _: pytest.fail("read again"))
        open_session(graph)
    data = graph.with_name("model.onnx_data")
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        open_session(graph)
    assert str(caught.value) == (
        f"{data} is damaged: its checksum is not the one in model.onnx; remove {graph.parent} and make it "
        "again, or pass --engine torch"
    )


def test_what_was_left_of_a_killed_write_is_replaced(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    place = cached_graph(fingerprint(folder))
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    assert write_cached_graph(folder) == place
    assert opened(folder, "auto", few_texts=True).precision == PRECISION
    assert [path.name for path in place.parent.parent.iterdir()] == [place.parent.name]


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemb.model.onnx.encoder.write_graph", full)
    with pytest.raises(MachineError, match="no space left"):
        write_cached_graph(folder)
    assert list((cache / "onnx").iterdir()) == []


# --- failures while it runs


def test_a_token_that_the_table_lacks_is_a_failure_of_the_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    batch = batch_of(folder, (3,))
    batch.ids[1] = 1_000_000
    with pytest.raises(RuntimeError, match="indices element out of data bounds"):
        opened(folder).forward(batch)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    engine = opened(folder)
    assert isinstance(engine, OnnxEngine)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.forward(batch_of(folder))
