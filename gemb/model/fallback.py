"""A backbone of any family that transformers knows, through transformers' own module.

Texts of equal length run as one batch under a mask of ones, so that nothing is padded and a text's states are
those it would have alone. Code of the folder's author is never run and pickles are never opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemb.errors import MismatchError, UnavailableError
from gemb.model.folder import ModelFolder
from gemb.model.kernels import Kernels, Linear
from gemb.model.layout import Layout


class TransformersBackbone:
    """The states that `AutoModel` gives, or the encoder alone of an encoder-decoder."""

    projection: Linear | None = None

    def __init__(self, folder: ModelFolder, kernels: Kernels) -> None:
        """Load the model of `folder`.

        Raises MismatchError if transformers does not know the family or tensors are missing,
        UnavailableError if the weights cannot be read.
        """
        self._model = _load(folder, kernels.dtype).to(kernels.device)
        self._rows_alone = kernels.device == "cpu"
        self.width = int(self._model.config.get_text_config().hidden_size)

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """int64 ids[filled] of packed texts -> fp32 states[filled, D]; filling tokens get zeros."""
        states = ids.new_zeros(layout.filled, self.width, dtype=torch.float32)
        for group in layout.groups:
            texts = ids[group.start : group.stop].view(group.rows, group.length)
            # A row of these products depends on their number of rows on a CPU: one text at a time.
            parts = torch.split(texts, 1) if self._rows_alone else (texts,)
            found = [self._states(part).flatten(0, 1) for part in parts]
            states[group.start : group.stop] = torch.cat(found)
        return states

    def _states(self, texts: Tensor) -> Tensor:
        """int64 texts[N, L] -> [N, L, D]."""
        output = self._model(input_ids=texts, attention_mask=torch.ones_like(texts))
        states: Tensor = output.last_hidden_state
        return states


def _load(folder: ModelFolder, dtype: torch.dtype) -> Any:  # noqa: ANN401  # transformers is untyped here
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    family = folder.family
    place = folder.transformer.folder
    if family not in CONFIG_MAPPING or family not in MODEL_MAPPING_NAMES:
        remote = (
            "; it needs code of its author (auto_map), which gemb never runs"
            if folder.config.get("auto_map")
            else ""
        )
        raise MismatchError(
            f"{place / 'config.json'}: the model type {family!r} is known neither to gemb nor to "
            f"the installed transformers{remote}; use a model of another family, or a newer transformers"
        )
    # An attention of the machine that saved the folder may not be here; transformers picks one that is.
    left_out = ("auto_map", "attn_implementation", "_attn_implementation")
    settings = {key: value for key, value in folder.config.items() if key not in left_out}
    config = CONFIG_MAPPING[family].from_dict(settings)
    encoder_class = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(family)
    if config.is_encoder_decoder and encoder_class is None:
        raise MismatchError(
            f"{place / 'config.json'}: the model type {family!r} is an encoder-decoder whose encoder "
            "transformers does not load alone; use a folder that holds the encoder only"
        )
    encoder_alone = config.is_encoder_decoder or encoder_class in (config.architectures or [])
    config.is_encoder_decoder = False
    loader = AutoModelForTextEncoding if encoder_alone else AutoModel
    # Refuses pickles and damaged files, too, with messages of their own.
    folder.weights().plain(f"transformers, which runs {family}, needs floats")
    with quiet():
        try:
            model, report = loader.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                f"{place} cannot be loaded by transformers: {_first_line(error)}; "
                "load it there by hand to see the whole message"
            ) from error
    missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    if missing:
        raise MismatchError(
            f"{place} lacks {len(missing)} tensors that the model type {family!r} needs: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download the model again"
        )
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from talking and drawing bars while it loads; what matters is checked afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
