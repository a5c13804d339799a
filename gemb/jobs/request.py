"""What an output of `gemb embed` depends on, compared field by field before anything is continued or kept.

The request goes into `job.json` of the work folder when a job begins, and into NAME.gemb.json when it
is done; a rerun that asks for something else is refused with the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from gemb.errors import Exit, GembError
from gemb.text.inputs import InputFile

MISMATCHES = frozenset({"model", "prompt", "dims", "precision", "engine"})
"""Fields whose difference is a mismatch of vectors (exit code 5), not of wishes (2)."""


AUTO = "auto"
"""The precision, or the engine, that fits processor and work."""


@dataclass(frozen=True, slots=True)
class InputIdentity:
    """An input file, told by name and content."""

    name: str
    bytes: int
    mtime_ns: int
    digest: str

    @classmethod
    def of(cls, file: InputFile, known: Sequence[InputIdentity]) -> InputIdentity:
        """The identity of a file; it is only read where size or time differ from those `known`."""
        for other in known:
            if (other.name, other.bytes, other.mtime_ns) == (file.name, file.size_bytes, file.mtime_ns):
                return other
        return cls(file.name, file.size_bytes, file.mtime_ns, file.fingerprint())


@dataclass(frozen=True, slots=True)
class Request:
    """Everything the bytes of an output depend on."""

    model: str
    """Fingerprint, 64 hex digits."""
    model_name: str
    """As the user called it; not compared."""
    prompt: Mapping[str, str]
    """Its name and text."""
    settings: Mapping[str, Any]
    """By name of the option."""
    inputs: tuple[InputIdentity, ...]

    def as_json(self) -> dict[str, Any]:
        """For job.json and NAME.gemb.json; `from_json` reads it back."""
        return asdict(self)

    def shared_digest(self) -> str:
        """32 hex digits that are the same for all shards of a job, and for no other job."""
        shared = {
            "model": self.model,
            "prompt": dict(self.prompt),
            "settings": {
                # The join compares what the shards were really computed in.
                name: value
                for name, value in self.settings.items()
                if name not in ("shard", "precision", "engine")
            },
            "inputs": [(one.name, one.bytes, one.digest) for one in self.inputs],
        }
        return blake2b(orjson.dumps(shared, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()

    def unsharded(self) -> Request:
        """The request of the output that the shards are joined to."""
        return replace(self, settings={**self.settings, "shard": None})

    @classmethod
    def from_json(cls, values: Any, path: Path) -> Request:  # noqa: ANN401  # it may be anything
        """The request that `as_json` gave; raises GembError if `path` holds no such thing."""
        try:
            inputs = tuple(InputIdentity(**entry) for entry in values["inputs"])
            return cls(**{**values, "inputs": inputs})
        except (KeyError, TypeError) as error:
            raise other_version(path) from error

    def differences(self, other: Request) -> list[tuple[str, str]]:
        """(field, "was A, now B") for each difference, from this older request to the `other`."""
        found: list[tuple[str, str]] = []
        if self.model != other.model:
            found.append(
                (
                    "model",
                    f"was {self.model_name} ({self.model[:12]}), now {other.model_name} ({other.model[:12]})",
                )
            )
        if self.prompt != other.prompt:
            found.append(("prompt", f"was {_prompt(self.prompt)}, now {_prompt(other.prompt)}"))
        for name in [*other.settings, *(name for name in self.settings if name not in other.settings)]:
            was, now = self.settings.get(name), other.settings.get(name)
            if name in ("precision", "engine") and AUTO in (was, now):
                continue  # what it was really computed in is compared where that is known
            if was != now:
                found.append((name, f"was {_shown(was)}, now {_shown(now)}"))
        found += self._input_differences(other)
        return found

    def _input_differences(self, other: Request) -> list[tuple[str, str]]:
        was, now = [one.name for one in self.inputs], [one.name for one in other.inputs]
        if was != now:
            return [("inputs", f"were {', '.join(was)}, now {', '.join(now)}")]
        return [
            (
                older.name,
                f"had {older.bytes:,} bytes ({older.digest[:12]}), now {newer.bytes:,} ({newer.digest[:12]})",
            )
            for older, newer in zip(self.inputs, other.inputs, strict=True)
            if (older.bytes, older.digest) != (newer.bytes, newer.digest)
        ]


def other_version(path: Path) -> GembError:
    """The error for a file of a job that this gemb cannot read."""
    return GembError(f"{path}: written by another version of gemb; pass --overwrite to start anew")


def refuse(what: str, differences: Sequence[tuple[str, str]], next_step: str) -> GembError:
    """The error for a request that does not fit what is there; its exit code fits the difference."""
    lines = [f"  {name} {difference}" for name, difference in differences]
    error = GembError("\n".join([f"{what}:", *lines, next_step]))
    if any(name in MISMATCHES for name, _ in differences):
        error.exit_code = Exit.MISMATCH
    return error


def _prompt(prompt: Mapping[str, str]) -> str:
    return f"{prompt['name']} ({prompt['text']!r})"


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
