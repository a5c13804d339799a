"""What is proved of an encoder-decoder before it is kept, through transformers' own classes, in fp32.

Each half is the decoder that it was made of, once what is new is taken away: the encoder under the decoder's
mask, the decoder without the encoder. Then who sees whom, how far each layer sees, and that neither
padding, nor a cache, nor saving changes what comes out (T5Gemma, arXiv 2504.06225, section 3).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemb.errors import GateError
from gemb.model.adapting.encoder_decoder_maps import Pair
from gemb.model.adapting.key_maps import adapted_config, text_config
from gemb.model.adapting.proofs import (
    OTHER_ORDER,
    SAME_CLASS,
    TOKENS,
    Compared,
    check_difference,
    compared,
    difference_of,
    measured_reaches,
    padded_beside,
    probe_ids,
    seen_by_implementation,
    source_model,
    states_of,
)
from gemb.model.attention import Reach, layer_types, reach_of_layers
from gemb.model.fallback import quiet


@dataclass(frozen=True)
class EncoderDecoderProofs:
    """What was seen; differences are a share of the largest number. All of it passed."""

    encoder_source_difference: float
    """Of the encoder's states under the causal mask, to the states of the decoder that it was made of."""
    decoder_source_difference: float
    """Of the logits of the decoder that sees no encoder, to those of the decoder that it was made of."""
    route_tokens: int | None
    """The longest text for which the next figure holds, where windows differ; else None."""
    route_difference: float
    """Of the encoder's states, to those of the encoder that `gemb adapt` makes of the same decoder."""
    route_difference_beyond: float | None
    """The same for a text twice the window, then."""
    implementations: Mapping[str, str]
    """What the encoder is, by implementation of attention, or why that cannot be asked for."""
    padding_difference: float
    """Of the encoder's states, between a text alone and beside a longer one, padded on either side."""
    decoder_padding_difference: float
    """The same of what the decoder says of that text."""
    encoder_reaches: tuple[str, ...]
    """Of each layer, as measured."""
    decoder_reaches: tuple[str, ...]
    """The same, among the decoder's own tokens."""
    cache_difference: float
    """Of the logits token by token with a cache, to those of all tokens at once."""
    saved_difference: float
    """After the loaded model is saved by transformers and loaded again."""
    by_layer: bool = False
    """Whether each layer was proved alone; a difference is then the largest of all."""

    def as_json(self) -> dict[str, object]:
        """For adapt_report.json."""
        return asdict(self)


def prove(folder: Path, pair: Pair) -> EncoderDecoderProofs:
    """The proofs of the encoder-decoder in `folder`, made of `pair`. Raises GateError for one that fails."""
    with torch.inference_mode(), quiet():
        model = load_encoder_decoder(folder)
        said, text = _texts(model)
        encoder_source, route = _encoder_against_source(model, pair, text)
        decoder_source = _decoder_against_source(model, pair, said, text)
        reaches = reach_of_layers(_text_encoder(model).config.to_dict())
        implementations, padding = seen_by_implementation(
            lambda **options: load_encoder_decoder(folder, **options).get_encoder(),
            text,
            reaches,
            causal=False,
        )
        decoder_padding = _who_the_decoder_sees(model, said, text)
        cache = _with_a_cache(model, said, text)
        expected = logits_of(model, said, text)
        with tempfile.TemporaryDirectory(prefix=".gemb-", dir=folder.parent) as again:
            model.save_pretrained(again)
            saved = difference_of(logits_of(load_encoder_decoder(Path(again)), said, text), expected)
        check_difference(saved, 0.0, "saved and loaded again, its logits are others")
        states = states_of(model.get_encoder(), text)
    with quiet():
        encoder_reaches = measured_reaches(_text_encoder(model), reaches)
        decoder_reaches = measured_reaches(
            model.get_decoder(),
            reach_of_layers({**model.get_decoder().config.to_dict(), "model_type": pair.kind}),
            lambda decoder, ids: decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False),
        )
    return EncoderDecoderProofs(
        encoder_source_difference=encoder_source,
        decoder_source_difference=decoder_source,
        route_tokens=route.tokens,
        route_difference=route.difference,
        route_difference_beyond=route.beyond,
        implementations=implementations,
        padding_difference=padding,
        decoder_padding_difference=decoder_padding,
        encoder_reaches=encoder_reaches,
        decoder_reaches=decoder_reaches,
        cache_difference=cache,
        saved_difference=saved,
    )


def load_encoder_decoder(folder: Path, **options: Any) -> Any:  # noqa: ANN401  # transformers is untyped here
    """The model of `folder` as AutoModelForSeq2SeqLM gives it, in fp32; without gradients, not in training.

    Raises GateError if a tensor is missing there, or is not known to the class.
    """
    from transformers import AutoModelForSeq2SeqLM

    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise GateError(f"transformers does not load its tensors ({', '.join(wrong[:3])})")
    return model.eval().requires_grad_(False)


def logits_of(model: Any, said: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: ANN401
    """Logits [B, S, V] of the tokens after each of said[B, S], where the encoder reads text[B, L]."""
    logits: Tensor = model(
        input_ids=text, attention_mask=mask, decoder_input_ids=said, use_cache=False
    ).logits
    return logits


def _texts(model: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Two texts [1, L], for the decoder and for the encoder; T5Gemma takes the padding token for padding."""
    ids = probe_ids(int(model.config.decoder.vocab_size), TOKENS + 1)
    ids = ids[ids != model.config.pad_token_id][None, :TOKENS]
    return ids, ids.flip(1)


def _text_encoder(model: Any) -> Any:  # noqa: ANN401
    encoder = model.get_encoder()
    return getattr(encoder, "text_model", encoder)


# --- each half is what it was made of


def _encoder_against_source(
    model: Any,  # noqa: ANN401
    pair: Pair,
    text: Tensor,
) -> tuple[float, Compared]:
    """The difference to the source, and what was seen beside the encoder that is made of it alone."""
    source = source_model(pair.encoder, ())
    encoder = model.get_encoder()
    masks = _causal_masks(text_config(pair.encoder), text.shape[1])
    difference = difference_of(
        encoder(input_ids=text, attention_mask=masks).last_hidden_state, states_of(source, text)
    )
    check_difference(
        difference, SAME_CLASS, "with the causal mask kept, the encoder's states are not the source's"
    )
    config = adapted_config(pair.encoder, causal=False, keep_layers=(), dropout=0.0, cut=None)
    route = compared(_in_class(config, source), _text_encoder(model))
    check_difference(route.difference, OTHER_ORDER, "the encoder's states are not those of the encoder alone")
    return difference, route


def _in_class(config: Mapping[str, Any], source: Any) -> Any:  # noqa: ANN401
    """The tensors of `source` in the class of `config`."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model_class: Any = MODEL_MAPPING[type(settings)]
    made = model_class.from_pretrained(
        None, config=settings, state_dict=source.state_dict(), dtype=torch.float32
    )
    return made.eval().requires_grad_(False)


def _causal_masks(config: Mapping[str, Any], length: int) -> dict[str, Tensor]:
    """What the decoder of `config` adds to scores, [1, 1, L, L], by kind of layer."""
    reaches = dict(zip(layer_types(config), reach_of_layers(config) or (), strict=True))
    before = torch.arange(length)[:, None] - torch.arange(length)  # how far a key stands before its query
    masks = {}
    for kind in ("full_attention", "sliding_attention"):
        left = reaches.get(kind, Reach(None, 0)).left
        seen = (before >= 0) & (before <= (length if left is None else left))
        masks[kind] = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[
            None, None
        ]
    return masks


def _decoder_against_source(model: Any, pair: Pair, said: Tensor, text: Tensor) -> float:  # noqa: ANN401
    """The difference between the logits of the decoder that sees no encoder, and those of its source."""
    source = source_model(pair.decoder, ())
    expected = states_of(source, said) @ source.get_input_embeddings().weight.T
    cap = model.config.decoder.final_logit_softcapping
    if cap is not None:
        expected = (expected / cap).tanh() * cap
    with _without_encoder(model, pair) as mask:
        from transformers.modeling_outputs import BaseModelOutput

        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_of(model.get_encoder(), text)),
            attention_mask=mask if mask is None else mask.expand(text.shape),
            decoder_input_ids=said,
            use_cache=False,
        ).logits
    difference = difference_of(logits, expected)
    # Merged attention adds up over the encoder's keys, too, whose weights are zero: in another order.
    limit = SAME_CLASS if pair.target.has_cross_attention else OTHER_ORDER
    check_difference(difference, limit, "without the encoder, the decoder's logits are not its source's")
    return difference


@contextmanager
def _without_encoder(model: Any, pair: Pair) -> Iterator[Tensor | None]:  # noqa: ANN401
    """The decoder sees nothing of the encoder under the mask given: no cross-attention, or no key of it."""
    if not pair.target.has_cross_attention:
        yield torch.zeros(1, 1, dtype=torch.long)
        return
    hooks = [
        layer.cross_attn.register_forward_hook(
            lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
        )
        for layer in model.get_decoder().layers
    ]
    try:
        yield None
    finally:
        for hook in hooks:
            hook.remove()


# --- who the decoder sees


def _who_the_decoder_sees(model: Any, said: Tensor, text: Tensor) -> float:  # noqa: ANN401
    """The largest difference that padding of the encoder's text makes in logits.

    Raises GateError unless each token said is told by the whole of that text, and by no token after it.
    """
    expected = logits_of(model, said, text)
    for changed in _with_another_token(text):
        if not bool((logits_of(model, said, changed)[0, 0] != expected[0, 0]).any()):
            raise GateError("the decoder does not see the encoder's text from end to end")
    later = said.clone()
    later[0, -1] = said[0, 0]
    check_difference(
        difference_of(logits_of(model, later, text)[:, :-1], expected[:, :-1]),
        SAME_CLASS,
        "the decoder sees tokens that are not said yet",
    )
    largest = 0.0
    for side in ("left", "right"):
        padded, mask, _ = padded_beside(text, side)
        seen = logits_of(model, said.expand(2, -1), padded, mask)[:1]
        largest = max(largest, difference_of(seen, expected))
    check_difference(largest, OTHER_ORDER, "padding of the encoder's text changes the decoder's logits")
    return largest


def _with_another_token(text: Tensor) -> Sequence[Tensor]:
    """The text with its first, and with its last token changed."""
    first, last = text.clone(), text.clone()
    first[0, 0], last[0, -1] = text[0, 1], text[0, -2]
    return first, last


def _with_a_cache(model: Any, said: Tensor, text: Tensor) -> float:  # noqa: ANN401
    """The difference that keeping keys and values from token to token makes in logits."""
    cache, steps = None, []
    for place in range(said.shape[1]):
        output = model(
            input_ids=text,
            decoder_input_ids=said[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    difference = difference_of(torch.cat(steps, 1), logits_of(model, said, text))
    check_difference(difference, OTHER_ORDER, "with a cache, its logits are others")
    return difference
