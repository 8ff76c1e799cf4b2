"""Does a model directory compute what the checkpoint computes? Both sides on the same tokens, in fp32.

One side is `ling`'s own model with the checkpoint's tensors, the other the Python code in the directory with the
directory's. Neither is in memory as a whole. Compared are logits, MTP logits, and the experts chosen in every layer.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import torch

from ling.activations.table import resolve
from ling.checkpoint.parts import Part
from ling.config.derived import activation_for
from ling.config.errors import UserError
from ling.data.tokenizer import load_tokenizer
from ling.hf.alone import model_without_weights
from ling.hf.compare import Outputs, Verdict, compare
from ling.hf.config import check_architecture, hf_config
from ling.hf.export import Source
from ling.hf.importing import check_tensors, read_config
from ling.hf.names import SHARED_SCALARS, canonical, keeps_fp32, place_of
from ling.hf.safetensors import Reader
from ling.hf.samples import Sample
from ling.hf.streamed import stream_weights, weights_on_meta
from ling.model.init import global_names
from ling.model.router import routers
from ling.model.scalars import activations

_NO_MEANING = ("auto_map", "torch_dtype", "dtype", "initializer_range", "mtp_loss_scaling_factor", "use_cache")


class VerificationError(Exception):
    """A model directory is not what it should be; the text is the verdict."""


def require_transformers() -> None:
    """UserError where transformers is not installed."""
    try:
        importlib.import_module("transformers")
    except Exception as error:  # a broken installation raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"verification needs transformers ({reason}): pip install 'ling[hf]', or leave it out"
        ) from None


@torch.no_grad()
def verify(source: Source, folder: Path, sample: Sample) -> Verdict:
    """Compare the checkpoint `source` with the model directory `folder` on the tokens of a sample.

    Raises:
        UserError: transformers is missing, the directory is of another architecture, lacks a tensor or has one without
            use, or its code fails.
    """
    require_transformers()
    config = read_config(folder)
    check_architecture(config, str(folder / "config.json"))
    problems = _config_problems(source, config)
    reader = Reader(folder)
    check_tensors(source.all_pieces, reader.entries, folder)
    theirs = their_outputs(folder, config, reader, sample.tokens)
    dtypes = {entry.dtype for name, entry in reader.entries.items() if not keeps_fp32(name)}
    ours = our_outputs(source, sample.tokens, round_to=torch.bfloat16 if dtypes == {torch.bfloat16} else None)
    verdict = compare(ours, theirs)
    verdict.problems[:0] = problems
    verdict.lines.insert(0, f"{sample.tokens.numel()} tokens of {sample.origin}, fp32")
    verdict.problems += _tokenizer_problems(source, folder, sample)
    return verdict


def _config_problems(source: Source, config: dict[str, Any]) -> list[str]:
    wanted = hf_config(source.config.model, source.dtype, dict.fromkeys(("bos", "eos", "pad")))
    return [
        f"config.json: {key} is {config[key]!r}, the checkpoint's {value!r}"
        for key, value in wanted.items()
        if key in config and config[key] != value and key not in _NO_MEANING and not key.endswith("_token_id")
    ]


def _tokenizer_problems(source: Source, folder: Path, sample: Sample) -> list[str]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return []
    if not (folder / "tokenizer.json").is_file():
        return []
    theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(source.folder / "tokenizer")
    for row in sample.tokens.tolist():
        text = ours.decode([token for token in row if token < ours.vocab_size])
        if theirs.encode(text, add_special_tokens=False).ids != ours.encode(text):
            return [f"the tokenizers split this text differently: {text[:60]!r}"]
    return []


# ---- the two sides


def our_outputs(source: Source, tokens: torch.Tensor, round_to: torch.dtype | None = None) -> Outputs:
    """`ling`'s model with the checkpoint's tensors, on one rank.

    Args:
        tokens: `[B, S]`.
        round_to: number format that the weights pass through, as in the model directory.
    """
    model = model_without_weights(source.config)
    names = global_names(model)

    def read(name: str) -> torch.Tensor:
        key, layer = place_of(canonical(names.get(name, name)), source.stacked)
        stored = source.stored[key]
        info = source.reader.tensors[stored]
        shape, first = tuple(info.shape), layer or 0
        tensor = torch.empty(shape if layer is None else (1, *shape[1:]), dtype=info.dtype)
        source.reader.load([Part(stored, shape, (first, *(0 for _ in shape[1:])), tensor, (stored,))])
        tensor = tensor if layer is None else tensor[0]
        rounded = tensor if round_to is None or keeps_fp32(name) else tensor.to(round_to)
        return rounded.float()

    _place_scalars(source, model, read)
    stream_weights(model, read)
    for router in routers([model]):
        router.record_choice = True
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mtp_logits = None
    if source.config.model.mtp_num_layers:
        hidden: list[torch.Tensor] = []
        model.mtp.register_forward_hook(lambda module, args, output: hidden.append(output))
        model(tokens, positions, None, labels=tokens, loss_mask=torch.ones_like(tokens))
        main, predicted = hidden[0].chunk(2, dim=0)
        logits, mtp_logits = (model.output_layer(part)[0].transpose(0, 1) for part in (main, predicted))
    else:
        logits = model(tokens, positions, None)
    choices = [router.last_choice for router in routers([model])]
    chosen = [choice.view(length, batch, -1).transpose(0, 1) for choice in choices if choice is not None]
    return Outputs(logits, mtp_logits, chosen)


def _place_scalars(source: Source, model: Any, read: Callable[[str], torch.Tensor]) -> None:
    """Fixed scalars stand in the config and not in the checkpoint; those that all layers share belong to the model."""
    for kind, activation in activations(model):
        if activation.learn == "global":
            activation.use_scalars(torch.nn.Parameter(read(f"{SHARED_SCALARS}{kind}"), requires_grad=False))
        elif activation.scalars is not None and activation.learn == "fixed":
            initial = resolve(activation_for(source.config.model, kind)).initial_scalars()
            activation.scalars = torch.tensor(initial)


def their_outputs(folder: Path, config: dict[str, Any], reader: Reader, tokens: torch.Tensor) -> Outputs:
    """The model of a directory's Python code with the directory's tensors."""
    with _their_code(folder), weights_on_meta():
        model = model_class(folder, config)(_their_config(folder, config)).eval()
    stream_weights(model, lambda name: reader.read(name).float())
    chosen: list[torch.Tensor] = []
    selection: list[torch.Tensor] = []

    def record(gate: Any, args: Any, output: Any) -> None:
        scores = output[2].float().sigmoid().view(*tokens.shape, -1)
        bias = getattr(gate, "expert_bias", None)
        selection.append(scores if bias is None or bias.is_meta else scores + bias.float())
        chosen.append(output[0].view(*tokens.shape, -1))

    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            # before the hook that drops the weights
            module.register_forward_hook(record, prepend=True)
    asks = "output_mtp_logits" in inspect.signature(model.forward).parameters
    with _their_code(folder):
        output = model(tokens, use_cache=False, **({"output_mtp_logits": True} if asks else {}))
    mtp = getattr(output, "mtp_logits", None)
    return Outputs(output.logits, mtp[0] if mtp else None, chosen, selection)


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    """The class that a directory's config.json names under AutoModelForCausalLM."""
    return _class(folder, config, "AutoModelForCausalLM")


def _their_config(folder: Path, config: dict[str, Any]) -> Any:
    cls = _class(folder, config, "AutoConfig")
    return cls(**{key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype")})


def _class(folder: Path, config: dict[str, Any], key: str) -> Any:
    name = (config.get("auto_map") or {}).get(key)
    if not isinstance(name, str) or name.count(".") != 1:
        raise UserError(f"{folder / 'config.json'}: auto_map has no {key}; which code is the model's?")
    file, cls = name.split(".")
    if not (folder / f"{file}.py").is_file():
        raise UserError(f"{folder} has no {file}.py, which config.json names; fetch or export it anew")
    package = _package(folder)
    return getattr(importlib.import_module(f"{package}.{file}"), cls)


@contextmanager
def _their_code(folder: Path) -> Iterator[None]:
    """What a directory's code raises is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or "no reason given").splitlines()[0]
        raise UserError(f"{folder}: its Python code fails with {type(error).__name__}: {reason}") from error


def _package(folder: Path) -> str:
    """The folder as a package of its own, so that its files import each other, without a cache of bytecode in it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("_ling_model_code_") and getattr(module, "__path__", None) == [str(folder)]:
            return name
    package = ModuleType(f"_ling_model_code_{uuid4().hex}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return package.__name__
