"""What is proved of an adapted folder before it is kept, through transformers' own classes, in fp32.

A decoder that stays causal where it should not gives vectors that look right and rank badly, and a release of
transformers may change what a key of config.json does. So the folder is loaded as its users will load it, and
the states tell: which weights these are, who sees whom, how far each layer sees, and what saving changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from gemb.errors import GateError
from gemb.model.adapting.key_maps import FAMILIES, causal_config, is_encoder_decoder, split_back
from gemb.model.attention import Reach, is_bidirectional, reach_of_layers
from gemb.model.fallback import quiet
from gemb.model.folder import ModelFolder, read_folder
from gemb.model.weights import Weights

Load: TypeAlias = Callable[..., Any]
"""A model as transformers loads it with the options given, ready for states."""
Run: TypeAlias = Callable[[Any, Tensor], object]
"""Ids int64[B, L] through a model."""

IMPLEMENTATIONS = ("eager", "sdpa")
"""Of attention, in transformers; others need a device or packages of their own."""
LONGEST_TOKENS = 4200
"""A window is measured on a text of its length; beyond this it would take too much memory."""
TOKENS = 9
"""Length of the text that most proofs are made with."""
SAME_CLASS = 1e-6
"""Largest difference, as a share of the largest state, where the same code computes the same numbers."""
OTHER_ORDER = 1e-4
"""The same where sums are made in another order: padding, implementations, gemb's own code."""


@dataclass(frozen=True)
class Proofs:
    """What was seen; differences are between states, as a share of the largest one. All of it passed."""

    source_difference: float
    """With the causal mask kept, to the states that the source gives in its own class; an encoder-decoder's
    encoder has no mask to keep."""
    class_difference: float | None
    """To the source's class without its mask, where the encoder has another class; else None."""
    implementations: Mapping[str, str]
    """By implementation of attention: `bidirectional` or `causal`, or why it cannot be asked for."""
    padding_difference: float
    """Between a text alone and beside a longer one, padded on either side."""
    reaches: tuple[str, ...]
    """Of each layer, as measured."""
    saved_difference: float
    """After the loaded model is saved by transformers and loaded again."""
    gemb_difference: float
    """To the states of gemb's own encoder."""
    source_tokens: int | None = None
    """The longest text for which `source_difference` holds, where the source has other windows; else None."""
    difference_beyond: float | None = None
    """To the source for a longer text, then."""
    by_layer: bool = False
    """Whether each layer was proved alone, see `gemb.model.adapting.slices`; a difference is the largest."""

    def as_json(self) -> dict[str, object]:
        """For adapt_report.json."""
        return asdict(self)


def prove(
    folder: Path,
    source: ModelFolder,
    kind: str,
    *,
    causal: bool,
    keep_layers: Sequence[int],
    kept_ids: Sequence[int] | None,
) -> Proofs:
    """The proofs of the adapted `folder`, made from `source`, a decoder of the model type `kind`.

    `causal` is what is asked for, `keep_layers` are the layers taken from the source (empty: all), `kept_ids`
    the old ids of a cut vocabulary, by new id.
    Raises GateError for the first that fails.
    """
    return prove_folder(
        read_folder(folder),
        partial(source_model, source, keep_layers),
        kind,
        causal=causal,
        kept_ids=kept_ids,
        of_encoder_decoder=is_encoder_decoder(source.config),
    )


def prove_folder(
    adapted: ModelFolder,
    load_source: Callable[[], Any],
    kind: str,
    *,
    causal: bool,
    kept_ids: Sequence[int] | None = None,
    of_encoder_decoder: bool = False,
) -> Proofs:
    """The proofs of `adapted` beside what `load_source` gives, with the layers of `adapted`; see `prove`."""
    config, folder = dict(adapted.config), adapted.transformer.folder
    reaches = reach_of_layers(config)
    ids = probe_ids(int(config["vocab_size"]), TOKENS)
    before = ids if kept_ids is None else torch.tensor(kept_ids)[ids]
    if reaches and is_bidirectional(reaches) is causal:
        raise GateError(f"config.json makes it {'bidirectional' if causal else 'causal'}")
    with torch.inference_mode(), quiet():
        reference = load_source()
        class_difference = None
        if of_encoder_decoder:
            beside = compared(load_encoder(folder), reference, kept_ids=kept_ids)
            del reference
            what = "its states are not those of the source's encoder"
            check_difference(beside.difference, OTHER_ORDER, what)
        else:
            expected = states_of(reference, before)
            del reference
            decoder = _decoder(folder, causal_config(config, kind), kind)
            beside = Compared(None, difference_of(states_of(decoder, ids), expected), None)
            del decoder
            what = "with the causal mask kept, its states are not the source's"
            check_difference(beside.difference, SAME_CLASS, what)
            if config["model_type"] != kind:
                open_config = {**causal_config(config, kind), "is_causal": False}
                ours = states_of(load_encoder(folder), ids)
                theirs = states_of(_decoder(folder, open_config, kind), ids)
                class_difference = difference_of(ours, theirs)
                what = f"its states are not those of {kind} without the causal mask"
                check_difference(class_difference, SAME_CLASS, what)
        implementations, padding_difference = seen_by_implementation(
            partial(load_encoder, folder), ids, reaches, causal=causal
        )
        model = load_encoder(folder)
        states = states_of(model, ids)
        with tempfile.TemporaryDirectory(prefix=".gemb-", dir=folder.parent) as again:
            model.save_pretrained(again)
            del model  # one model at a time
            model = load_encoder(Path(again))
            saved_difference = difference_of(states_of(model, ids), states)
        check_difference(saved_difference, 0.0, "saved and loaded again, its states are others")
    with quiet():
        measured = measured_reaches(model, reaches)
    del model
    gemb_difference = difference_of(_own_states(adapted, ids), states)
    check_difference(gemb_difference, OTHER_ORDER, "gemb's own encoder gives other states")
    return Proofs(
        beside.difference,
        class_difference,
        implementations,
        padding_difference,
        measured,
        saved_difference,
        gemb_difference,
        beside.tokens,
        beside.beyond,
    )


@dataclass(frozen=True)
class Compared:
    """Two encoders of the same weights; differences are a share of the largest state."""

    tokens: int | None
    """The longest text for which `difference` holds: that which each window covers; None where they agree."""
    difference: float
    beyond: float | None
    """For a text twice the widest window, where windows differ."""


def compared(ours: Any, theirs: Any, *, kept_ids: Sequence[int] | None = None) -> Compared:  # noqa: ANN401
    """How far the states of two encoders agree; `kept_ids` are the ids of `theirs` by those of `ours`."""
    config = ours.config.to_dict()
    reaches, its_reaches = (reach_of_layers(model.config.to_dict()) or () for model in (ours, theirs))
    sides = [side for reach in (*reaches, *its_reaches) for side in (reach.left, reach.right) if side]
    longest = min(LONGEST_TOKENS, int(config["max_position_embeddings"]), 2 * max([*sides, TOKENS]))
    shared = None if reaches == its_reaches else 1 + min(sides)

    def difference(length: int) -> float:
        ids = probe_ids(int(config["vocab_size"]), length)
        old = ids if kept_ids is None else torch.tensor(kept_ids)[ids]
        # Without a mask, T5Gemma takes one token for padding, wherever it stands.
        mask = torch.ones_like(ids)
        return difference_of(states_of(ours, ids, mask), states_of(theirs, old, mask))

    same = difference(longest if shared is None else min(shared, longest))
    return Compared(shared, same, None if shared is None or longest <= shared else difference(longest))


def probe_ids(entries: int, length: int) -> Tensor:
    """int64[1, length], from the upper half of the vocabulary, away from special tokens; no two the same."""
    random = np.random.default_rng(5)
    upper = entries // 2 + random.permutation(entries - entries // 2)
    return torch.from_numpy(np.resize(upper, length).astype(np.int64))[None]


def load_encoder(folder: Path, **options: Any) -> Any:  # noqa: ANN401  # transformers is untyped here
    """The model of `folder` as AutoModel gives it, in fp32; without gradients and not in training."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
    )
    return model.eval().requires_grad_(False)


def source_model(source: ModelFolder, keep_layers: Sequence[int]) -> Any:  # noqa: ANN401
    """The source's text model as transformers loads it, without the layers that are left out.

    Of an encoder-decoder, its encoder.
    """
    model = load_encoder(source.transformer.folder)
    if is_encoder_decoder(source.config):
        model = getattr(model.get_encoder(), "text_model", model.get_encoder())
    model = getattr(model, "language_model", model)
    if keep_layers:
        model.layers = nn.ModuleList(model.layers[layer] for layer in keep_layers)
        model.config.num_hidden_layers = len(keep_layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[layer] for layer in keep_layers]
    return model


def _decoder(folder: Path, config: Mapping[str, Any], kind: str) -> Any:  # noqa: ANN401
    """The adapted weights in the source's class, with this config."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    settings = CONFIG_MAPPING[kind](**{key: value for key, value in config.items() if key != "model_type"})
    weights = Weights.read(folder)
    own = {name: weights.tensor(name) for name in weights}
    tensors = own if _is_unjoined(weights, kind) else split_back(own, kind)
    model_class: Any = MODEL_MAPPING[type(settings)]
    made, report = model_class.from_pretrained(
        None, config=settings, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        raise GateError(f"as a {kind} its tensors do not fit ({', '.join(wrong[:3])})")
    return made.eval().requires_grad_(False)


def _is_unjoined(weights: Weights, kind: str) -> bool:
    """Whether no tensor is joined from several of the decoder's."""
    return not any(f"{whole}." in name for whole in FAMILIES[kind].joins for name in weights)


def states_of(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: ANN401
    """int64 ids[B, L] -> fp32 states[B, L, D]."""
    model.config.use_cache = False  # of keys and values, which a decoder would keep for its next token
    states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states


def _own_states(folder: ModelFolder, ids: Tensor) -> Tensor:
    from gemb.model.encoder import PackedEncoder
    from gemb.model.kernels import Kernels

    encoder = PackedEncoder(folder, Kernels("cpu", torch.float32))
    return encoder.states(ids[0].numpy().astype(np.int32), np.array([ids.shape[1]], dtype=np.int32))[None]


def difference_of(states: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest state."""
    return float((states - expected).abs().max() / expected.abs().max())


def check_difference(difference: float, limit: float, what: str) -> None:
    """Raises GateError with `what` unless `difference` is at most `limit`."""
    if not difference <= limit:  # NaN fails, too
        raise GateError(f"{what} (off by {difference:.1e} of the largest)")


# --- who sees whom


def seen_by_implementation(
    load: Load, ids: Tensor, reaches: Sequence[Reach] | None, *, causal: bool
) -> tuple[dict[str, str], float]:
    """What each implementation of attention does, and the largest difference that padding makes.

    `load` gives the model for an `attn_implementation`, or for none.
    Asked of one text without a mask, under a mask of ones, and padded on either side: an encoder that is only
    bidirectional where there is a mask has been seen (LLM2Vec, issue 74).
    """
    # The last token reaches the first through the windows of all layers, and no further.
    rights = [reach.right for reach in reaches or ()]
    if rights and None not in rights and 0 not in rights:
        ids = ids[:, : 1 + sum(right for right in rights if right is not None)]
    changed = ids.clone()
    changed[0, -1] = ids[0, -2]
    seen: dict[str, str] = {}
    largest = 0.0
    expected: Tensor | None = None
    for implementation in (None, *IMPLEMENTATIONS):
        try:
            model = load(**({} if implementation is None else {"attn_implementation": implementation}))
        except ValueError as error:
            seen[str(implementation)] = f"not offered: {str(error).partition('.')[0]}"
            continue
        name = f"default ({model.config._attn_implementation})" if implementation is None else implementation
        ways = set()
        alone = states_of(model, ids)
        expected = alone if expected is None else expected
        largest = max(largest, difference_of(alone, expected))
        for mask in (None, torch.ones_like(ids)):
            ways.add(bool((states_of(model, changed, mask)[0, 0] != states_of(model, ids, mask)[0, 0]).any()))
        for side in ("left", "right"):
            padded, mask, place = padded_beside(ids, side)
            first = states_of(model, padded, mask)[:1, place]
            second = states_of(model, padded_beside(changed, side)[0], mask)[:1, place]
            ways.add(bool((first[0, 0] != second[0, 0]).any()))
            largest = max(largest, difference_of(first, expected))
        del model  # before the next is loaded
        seen[name] = {frozenset({True}): "bidirectional", frozenset({False}): "causal"}.get(
            frozenset(ways), "bidirectional in some batches and causal in others"
        )
        wanted = "causal" if causal else "bidirectional"
        if seen[name] != wanted:
            raise GateError(
                f"with the attention {name} transformers computes {seen[name]}, not {wanted} "
                "(seen in the first state when the last token is changed)"
            )
    check_difference(largest, OTHER_ORDER, "padding or the implementation of attention changes its states")
    return seen, largest


def padded_beside(ids: Tensor, side: str) -> tuple[Tensor, Tensor, slice]:
    """ids[1, L] beside a text of L + 4 tokens, the mask, and where the text is: [2, L + 4]."""
    length = ids.shape[1]
    neighbour = ids[0, :1].repeat(length + 4)[None]
    row = torch.zeros_like(neighbour)
    mask = torch.zeros_like(neighbour)
    place = slice(4, None) if side == "left" else slice(0, length)
    row[:, place] = ids
    mask[:, place] = 1
    return torch.cat([row, neighbour]), torch.cat([mask, torch.ones_like(mask)]), place


# --- how far a layer sees


def measured_reaches(
    model: Any,  # noqa: ANN401  # transformers is untyped here
    reaches: Sequence[Reach] | None,
    run: Run = lambda model, ids: states_of(model, ids),
) -> tuple[str, ...]:
    """How far each layer sees, measured: where the gradient of its first and last output is not zero.

    `run` sends ids through the model, each of whose `layers` has to be called once.
    Raises GateError where that is not what config.json says.
    """
    sides = [side for reach in reaches or () for side in (reach.left, reach.right) if side]
    length = max([*sides, TOKENS]) + 3
    if length > LONGEST_TOKENS:
        length = LONGEST_TOKENS
    calls: list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        for layer in model.layers
    ]
    with torch.no_grad():
        run(model, probe_ids(int(model.config.vocab_size), length))
    for hook in hooks:
        hook.remove()
    shown: list[str] = []
    for number, (layer, args, kwargs) in enumerate(calls):
        left, right = _reach(layer, args, kwargs, length)
        found = str(Reach(left, right))
        declared = reaches[number] if reaches else None
        if declared is not None and (left, right) != (
            _cut(declared.left, length),
            _cut(declared.right, length),
        ):
            raise GateError(f"layer {number} sees {found}, but config.json says {declared}")
        is_cut = declared is not None and declared.left is not None and left is None
        shown.append(f"{found} (declared: {declared})" if is_cut else found)
    return tuple(shown)


def _cut(side: int | None, length: int) -> int | None:
    """A reach as a text of `length` tokens shows it: None where it covers the text."""
    return None if side is None or side >= length - 1 else side


def _reach(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], length: int
) -> tuple[int | None, int | None]:
    """How many positions before and after itself a token of `layer` sees; None is all of them."""
    given = dict(kwargs)
    place = "hidden_states" if not args else None
    stream = (given["hidden_states"] if place else args[0]).detach().clone().requires_grad_(True)
    with torch.enable_grad():
        if place:
            given[place] = stream
            output = layer(**given)
        else:
            output = layer(stream, *args[1:], **given)
        states = output[0] if isinstance(output, tuple) else output
        probe = torch.linspace(1, 2, states.shape[-1])
        (to_first,) = torch.autograd.grad(states[0, 0] @ probe, stream, retain_graph=True)
        (to_last,) = torch.autograd.grad(states[0, -1] @ probe, stream)
    # A weight of attention that the mask leaves out is zero, and so is its gradient, exactly.
    right = int(to_first[0].abs().amax(-1).nonzero().max())
    left = length - 1 - int(to_last[0].abs().amax(-1).nonzero().min())
    return _cut(left, length), _cut(right, length)
