"""Stand-ins for pretraining: a small language model with a cross-attention of sorts, texts, a tokeniser."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional

from gemb.model.trainable.language_model import LanguageBatch, LanguageLoss, TeacherStates
from gemb.text.inputs import resolve_inputs
from gemb.text.tokenisation import Tokeniser
from gemb.training.pretrain_documents import Documents

WORDS = 40
"""`w0` to `w39` are the words; the special tokens stand before them."""
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{number}>" for number in range(30)))
VOCABULARY = len(SPECIAL) + WORDS
CONFIG = {"model_type": "gemma3_text", "eos_token_id": [1, 106], "bos_token_id": 2, "vocab_size": VOCABULARY}


class TinyLanguageModel(nn.Module):
    """Predicts from the token at hand and, through `cross_attn`, from the mean of the row's source."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.cross_attn = nn.Parameter(torch.randn(8, 8, generator=generator) / 3)
        self.head = nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.dropout = nn.Dropout(dropout)

    def loss(self, batch: LanguageBatch, *, teacher: TeacherStates | None = None) -> LanguageLoss:
        """As a TrainableLanguageModel's; a teacher's states are taken for its scores."""
        states = self.table[torch.from_numpy(batch.ids).long()]
        if len(batch.source_ids):
            read = torch.split(
                self.table[torch.from_numpy(batch.source_ids).long()], batch.source_lengths.tolist()
            )
            means = torch.stack([one.mean(0) for one in read]) @ self.cross_attn
            states = states + means.repeat_interleave(torch.from_numpy(batch.lengths).long(), dim=0)
        places = torch.from_numpy(np.flatnonzero(batch.targets >= 0))
        targets = torch.from_numpy(batch.targets).long()[places]
        scores = self.dropout(torch.tanh(states))[places] @ self.head.T
        cross_entropy = functional.cross_entropy(scores, targets, reduction="sum")
        total = cross_entropy
        if teacher is not None:
            total = functional.cross_entropy(scores, teacher.states.softmax(-1), reduction="sum")
        correct = int((scores.argmax(-1) == targets).sum())
        return LanguageLoss(total, len(targets), correct, float(cross_entropy.detach()))


def tokeniser(
    special: Sequence[str] = SPECIAL, frame: str = "<bos> $A", max_tokens: int = 1 << 20
) -> Tokeniser:
    """Words at white space, one token each."""
    names = {name: number for number, name in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    backend.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(name, names[name]) for name in ("<bos>", "<eos>")]
    )
    return Tokeniser(backend, max_tokens=max_tokens)


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 2 to `longest` words."""
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{number}" for number in generator.integers(0, WORDS, int(size)))
        for size in generator.integers(2, longest + 1, count)
    ]


def write_texts(file: Path, lines: Sequence[str]) -> Path:
    """A JSONL file of texts."""
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return file


def documents(file: Path, row_tokens: int = 16, seed: int = 0) -> Documents:
    """The texts of a file."""
    return Documents(resolve_inputs([str(file)]), tokeniser(), row_tokens, seed=seed)
