"""What gemb computes beyond the real tokens, and whether a vector depends on its neighbours.

Padding: every product with a weight inside the forward pass is counted (rows x inputs x outputs) and
divided by the least the real tokens need. Invariance: the vectors of a text alone, among all texts, in
reversed order, in small batches and on two threads must be the same to the bit; sentence-transformers'
largest difference between a text alone and in a batch stands beside it.

    python -m benchmarks.padding_and_invariance --model minilm
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import corpus as corpora
from benchmarks.encode import MODEL_HELP, draw_sample, show_bars
from benchmarks.harness import Bar, write_result
from benchmarks.machine import this_machine
from benchmarks.models import MODELS, REPOSITORY, Model, token_counts
from benchmarks.peers import Contestant, SentenceTransformers
from gemb import Encoder

PADDING_BAR = 1.01
TEXTS = {"minilm": 256, "gemma300m": 64}
SMALL_BATCH_TOKENS = 128


def computed_per_real_token(model: Model, precision: str, texts: Sequence[str]) -> float:
    """Multiply-adds of gemb's products with weights over the least that the texts' tokens need.

    The head's own products count as computed and not as needed, so 1.0 can't be reached exactly.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from gemb.engine.encoder import load_tokeniser
    from gemb.engine.torch_engine import TorchEngine
    from gemb.model.folder import read_folder
    from gemb.text.batches import token_batches

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        """Adds up the multiply-adds of matrix products with a two-dimensional weight."""

        multiply_adds: int = 0

        def __torch_dispatch__(
            self,
            func: Any,  # noqa: ANN401  # an operator, torch gives it no type
            types: Any,  # noqa: ANN401
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:  # noqa: ANN401
            result = func(*args, **(kwargs or {}))
            name = func.name()
            if name.startswith(("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::linear")):
                rows = args[1] if name == "aten::addmm" else args[0]
                self.multiply_adds += rows.numel() * result.shape[-1]
            return result

    folder = read_folder(model.folder())
    encoded = load_tokeniser(folder).encode(list(texts))
    engine = TorchEngine.load(folder, device="cpu", precision=precision, threads=1)
    counter = Counter()  # type: ignore[no-untyped-call]
    with counter:
        for batch in token_batches(encoded, engine.batch_tokens):
            engine.forward(batch)
    needed = model.work.linear_flops() // 2 * int(encoded.lengths.sum())
    return float(counter.multiply_adds / needed)


def unequal_texts(model: Model, precision: str, texts: Sequence[str]) -> dict[str, int]:
    """By situation, how many texts get other bits than among all texts in one thread."""
    folder = model.folder()
    one = Encoder.load(folder, precision=precision, threads=1)
    small = Encoder.load(folder, precision=precision, threads=1, batch_tokens=SMALL_BATCH_TOKENS)
    two = Encoder.load(folder, precision=precision, threads=2)
    together = one.embed(texts, as_="none")
    situations = {
        "alone": np.concatenate([one.embed([text], as_="none") for text in texts]),
        "in reversed order": one.embed(texts[::-1], as_="none")[::-1],
        f"in batches of {SMALL_BATCH_TOKENS} tokens": small.embed(texts, as_="none"),
        "on two threads": two.embed(texts, as_="none"),
    }
    return {
        situation: int((vectors.view(np.uint32) != together.view(np.uint32)).any(axis=1).sum())
        for situation, vectors in situations.items()
    }


def largest_difference_of_peer(model: Model, texts: Sequence[str]) -> float:
    """The most a number of sentence-transformers fp32 differs between a text alone and in a batch."""
    peer = SentenceTransformers(Contestant("st-fp32", "sentence-transformers", str(model.folder()), "fp32"))
    together = peer.embed(texts)
    alone = np.concatenate([peer.embed([text]) for text in texts])
    return float(np.abs(together - alone).max())


def run(model_name: str, precisions: Sequence[str], console: Console) -> dict[str, object]:
    """Measure each precision, print the verdicts, and give the result as JSON values."""
    model = MODELS[model_name]
    texts = list(draw_sample(model, "docs", TEXTS[model_name]).texts)
    queries = list(draw_sample(model, "queries", TEXTS[model_name]).texts)
    verdicts: list[Bar] = []
    for precision in precisions:
        for name, chosen in (("docs", texts), ("queries", queries)):
            padding = computed_per_real_token(model, precision, chosen)
            verdicts.append(
                Bar(f"{precision}, {name}: computed over real tokens", padding, PADDING_BAR, at_most=True)
            )
        mixed = [*texts[::4], *queries[::4]]
        for situation, unequal in unequal_texts(model, precision, mixed).items():
            claim = f"{precision}: of {len(mixed)} texts, those with other bits {situation}"
            verdicts.append(Bar(claim, unequal, 0, at_most=True))
    peer = largest_difference_of_peer(model, texts[::4])
    show_bars(console, verdicts)
    console.print(f"sentence-transformers fp32, alone or in a batch: largest difference {peer:.1e}")
    return {
        "settings": {"model": model_name, "corpora": [corpora.NAMES[0], "queries"], "texts": len(texts)},
        "tokens": sum(token_counts(model.folder(), texts)),
        "sentence_transformers_largest_difference": peer,
        "bars": [bar.as_dict() for bar in verdicts],
    }


def main(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "minilm",
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 or bf16, repeatable; both where the processor has bf16.")
    ] = None,
    store: Annotated[bool, typer.Option(help="Write the result under benchmarks/results.")] = True,
) -> None:
    """Count padding and check batch invariance."""
    console, machine = Console(width=110), this_machine()
    for line in machine.lines():
        console.print(line, highlight=False)
    chosen = precision or (["fp32", "bf16"] if machine.has_bf16 else ["fp32"])
    result = run(model, chosen, console)
    if store:
        path = write_result(f"padding-and-invariance-{model}", machine, result)
        console.print(f"stored in {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    typer.run(main)
