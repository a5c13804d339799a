"""`gemb adapt --to encoder-decoder`: one decoder in, or two, a T5Gemma or T5Gemma 2 out, proved.

The recipe is that of `gemb.jobs.adapt`, which opens the models and sends what is meant here.
"""

from collections.abc import Mapping
from pathlib import Path

from gemb.files import check_writable, readable_bytes
from gemb.jobs.adapt_table import tensor_counts, tensor_table
from gemb.model.adapting.encoder_decoder import EncoderDecoder, EncoderDecoderAdaptation, as_json, write
from gemb.model.attention import describe, reach_of_layers
from gemb.report import Event, OnProgress, Plan, Report


def planned(adaptation: EncoderDecoderAdaptation, output: Path) -> Plan:
    """What `written` would write. Raises GembError where there is no space for it."""
    check_writable(output, adaptation.needs_bytes)
    return Plan(
        title=f"would adapt {_sources(adaptation)} into {output}",
        rows=_rows(adaptation),
        tables=[tensor_table(adaptation.tensors)],
        outputs=[output],
        data={
            "source": str(adaptation.pair.encoder.path),
            "decoder_source": str(adaptation.pair.decoder.path),
            "output": str(output),
            "model_type": adaptation.config["model_type"],
            "config": adaptation.config,
            "size_bytes": adaptation.size_bytes,
            "cross_attention_only": adaptation.warm_up_steps,
        },
    )


def written(
    adaptation: EncoderDecoderAdaptation,
    output: Path,
    *,
    about: Mapping[str, object],
    memory_bytes: int | None,
    on_progress: OnProgress,
) -> Report:
    """Write the encoder-decoder and prove it; `about` goes into adapt_report.json.

    Raises GateError (8) for a proof that fails; then nothing is left at the output.
    """
    on_progress(
        Event("adapting", 0, note=f"writing {readable_bytes(adaptation.size_bytes)}, then the proofs")
    )
    made = write(adaptation, output, about=about, memory_bytes=memory_bytes)
    rows = _rows(adaptation)
    if made.padding_token is not None:
        rows.append(("padding", f"the source names no token for it; {made.padding_token} is taken, masked"))
    rows.append(("tensors", f"{tensor_counts(adaptation.tensors)}; each in adapt_report.json"))
    rows += _proved(made)
    rows.append(("took", f"{made.writing_seconds:.1f} s to write, {made.proving_seconds:.1f} s to prove"))
    rows.append(("next", _next(adaptation, output)))
    return Report(
        title=f"adapted {_sources(adaptation)} into {output}",
        rows=rows,
        data={"output": str(output), **as_json(adaptation, made)},
        outputs=[output],
    )


def _sources(adaptation: EncoderDecoderAdaptation) -> str:
    pair = adaptation.pair
    return str(pair.encoder.path) + ("" if pair.is_balanced else f" and {pair.decoder.path}")


def _rows(adaptation: EncoderDecoderAdaptation) -> list[tuple[str, str]]:
    pair, config = adaptation.pair, adaptation.config
    encoder, decoder = config["encoder"], config["decoder"]
    encoder = encoder.get("text_config", encoder)
    cross = "merged: the decoder's own attention sees the encoder's states, too; nothing is new"
    if pair.target.has_cross_attention:
        cross = "copied from the self-attention of the same layer"
    if adaptation.random_parameters:
        cross = f"new and random, {adaptation.random_parameters:,} numbers"
    rows = [
        ("source", f"{pair.encoder.path} ({pair.kind})"),
        *([] if pair.is_balanced else [("decoder of", f"{pair.decoder.path} ({pair.kind})")]),
        ("becomes", f"{pair.target.architecture} of transformers, no code in the folder"),
        ("encoder", describe(reach_of_layers(encoder) or ())),
        ("decoder", describe(reach_of_layers({**decoder, "model_type": pair.kind}) or ())),
        ("cross-attention", cross),
        ("weights", f"{readable_bytes(adaptation.size_bytes)}, {adaptation.parameters:,} numbers"),
    ]
    if config["dropout_rate"]:
        rows.append(("dropout", f"{config['dropout_rate']:g} in config.json, for training with transformers"))
    return rows


def _proved(made: EncoderDecoder) -> list[tuple[str, str]]:
    proofs = made.proofs
    up_to = "" if proofs.route_tokens is None else f" for texts of up to {proofs.route_tokens:,} tokens"
    beyond: list[tuple[str, str]] = []
    if proofs.route_difference_beyond is not None:
        said = f"a longer text differs by {proofs.route_difference_beyond:.0e}"
        beyond = [("", f"{said}: a window is one wider there")]
    by_layer = (
        [("", "each layer alone, since the model is larger than the memory")] if proofs.by_layer else []
    )
    ways = ", ".join(f"{name} {way}" for name, way in proofs.implementations.items())
    return [
        (
            "proved",
            "with the causal mask the encoder's states are the source's "
            f"(difference {proofs.encoder_source_difference:g})",
        ),
        (
            "",
            "without the encoder the decoder's logits are its source's "
            f"(difference {proofs.decoder_source_difference:.0e})",
        ),
        (
            "",
            f"the encoder's states are those of the encoder alone{up_to} "
            f"(difference {proofs.route_difference:.0e})",
        ),
        *beyond,
        ("", f"the encoder's layers see {', '.join(dict.fromkeys(proofs.encoder_reaches))}"),
        ("", f"the decoder's see {', '.join(dict.fromkeys(proofs.decoder_reaches))}, and the encoder's text"),
        ("", f"transformers, the encoder: {ways}"),
        ("", f"padding moves a logit by {proofs.decoder_padding_difference:.0e} of the largest at most"),
        ("", f"with a cache the logits are the same (difference {proofs.cache_difference:.0e})"),
        ("", f"saved and loaded again, too (difference {proofs.saved_difference:g})"),
        *by_layer,
    ]


def _next(adaptation: EncoderDecoderAdaptation, output: Path) -> str:
    """The training that comes next: what is new learns alone first, else all of it waits for noise."""
    words = f"gemb train {adaptation.config['model_type']}/2-ul2 --model {output} -o RUN"
    if not adaptation.warm_up_steps:
        return f"{words}; as it is, the halves do not know each other"
    return f"{words} --set cross_attention_only={adaptation.warm_up_steps}; new weights learn alone first"
