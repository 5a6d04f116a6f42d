"""The demo's two documents and the questions about them, as prompts of token ids.

Both texts were written for kvlayer and are under its licence; the places do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from kvlayer_transformers.demo.model import LoadedModel

__all__ = ["GUIDE", "HANDBOOK", "Document", "Prompt", "Text"]

_HEAD = (
    "<|im_start|>system\n"
    "You are given a document and a question. Answer in one sentence.<|im_end|>\n"
    "<|im_start|>user\n"
)
_TAIL = "\n\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document and one question about it."""

    question: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Document:
    """What the prompts about one text have in common, and the prompts.

    ``ids`` end at a boundary of both chunks and forward passes, so the KV of a document does not
    depend on the question that follows it.
    """

    title: str
    ids: list[int]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A file of the package, how many tokens of it are used, and what is asked about it."""

    name: str
    title: str
    tokens: int
    questions: tuple[str, ...]

    def document(self, loaded: LoadedModel) -> Document:
        """The prompts, in the model's chat format. The text is cut to ``tokens``, head included."""
        folder = files("kvlayer_transformers.demo") / "documents"
        text = (folder / self.name).read_text(encoding="utf-8")
        ids = loaded.encode(_HEAD + text)[: self.tokens]
        if len(ids) < self.tokens:
            raise ValueError(f"{self.name} has {len(ids)} tokens, fewer than {self.tokens}")
        prompts = tuple(
            Prompt(question, ids + loaded.encode(_TAIL.format(question=question)))
            for question in self.questions
        )
        return Document(self.title, ids, prompts)


HANDBOOK = Text(
    "handbook.txt",
    "the lighthouse handbook",
    2560,
    (
        "What is the call sign of the station?",
        "What is the name of the relief boat?",
        "Where was the lens made?",
    ),
)
GUIDE = Text(
    "guide.txt",
    "the cable railway guide",
    1024,
    ("What is the waterfall called?",),
)
