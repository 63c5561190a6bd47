"""The fidelity stamp: what was exported is read back and held beside the checkpoint.

First bit by bit: each tensor of the files is compared with what the checkpoint gives for it. Then as functions: the
same tokens go through lcx and through PyTorch, a prompt at once and then token by token, both on the CPU in float32,
with the weights as the files hold them. Where the logits differ by more than the tolerance, the streams after each
layer are compared, and the first layer that differs is named.
"""

import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from lcx.errors import UserError
from lcx.interop import safetensors
from lcx.interop.architecture import Architecture
from lcx.interop.formats import Format
from lcx.interop.tables import Correspondence
from lcx.models import LanguageModel
from lcx.models.language_model import make_context
from lcx.params import split
from lcx_kernels.backends import compiling_for

FILE = "fidelity.json"
TOLERANCE = 1e-4  # of the largest difference between logits, over the larger of 1 and the largest logit
ROWS, DECODED = 2, 32  # prompts, and how many tokens follow them one by one
SHORTEST, LONGEST = 64, 512  # tokens of a prompt

Values = Callable[[str], np.ndarray]  # a tensor there, as it should be, by its name


class Unfaithful(UserError):
    """The export is not the model."""


@dataclass(frozen=True)
class Results:
    """What one side makes of the tokens; logits of vocab_size columns, float32."""

    prefill: np.ndarray  # [rows, time, vocab_size]
    decode: np.ndarray  # [rows, DECODED, vocab_size]


def check_tensors(folder: epath.Path, form: Format, mapping: Correspondence, values: Values, dtype: str) -> dict:
    """The sha256 of each tensor in the files, by name. Raises Unfaithful for the first that is not bitwise `values`."""
    kind, checksums = safetensors.DTYPES[dtype], {}
    reader = safetensors.Reader(folder)
    for name in mapping.tensors:
        expected = np.ascontiguousarray(values(name)).astype(kind, copy=False)
        found = reader.tensor(name)
        if found.shape != expected.shape or found.dtype != kind or _different(found, expected).any():
            where = form.blocks(name) or "outside the layers"
            raise Unfaithful(
                f"the export is not the model: the first layer that differs is {where}, in its tensor {name}, "
                f"which is not bit for bit what the checkpoint holds{_how(found, expected)}."
            )
        checksums[name] = safetensors.checksum(found)
    return checksums


def _how(found: np.ndarray, expected: np.ndarray) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f" ({found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)})"
    if found.ndim == 2 and found.shape[0] == found.shape[1] and found.T.tobytes() == expected.tobytes():
        return " but its transpose"
    wrong = np.flatnonzero(_different(found, expected))
    place = [int(index) for index in np.unravel_index(wrong[0], found.shape)]
    return f" ({len(wrong)} of {found.size} numbers differ, the first at {place})"


def _different(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """bool [size]: where the bits of two arrays of one dtype and shape differ."""
    bits = np.dtype(f"u{found.dtype.itemsize}")
    return found.reshape(-1).view(bits) != expected.reshape(-1).view(bits)


def missing_libraries() -> list[str]:
    """What would be needed to run the export here."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def compare(
    folder: epath.Path, form: Format, model: Architecture, params: dict, tolerance: float, prompt: int | None = None
) -> dict[str, Any]:
    """Runs the export beside lcx and gives the report.

    Args:
      folder: the export.
      form: its format.
      model, params: the model in float32, with the weights of the files.
      tolerance: see TOLERANCE.
      prompt: tokens of a prompt; None: past the model's windows and segments, but at most LONGEST.

    Raises Unfaithful where the logits differ by more than the tolerance; its sentence names the first layer that does.
    """
    prompt = prompt or prompt_length(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, prompt + DECODED), np.int32)
    ours = model.model(params)
    here, there = run_lcx(ours, tokens), run_torch(load_torch(folder, form), tokens)
    report: dict[str, Any] = {"tolerance": tolerance, "rows": ROWS, "prompt_tokens": prompt, "decoded_tokens": DECODED}
    report["beyond_windows"] = prompt > _reach(model)
    worst = 0.0
    for part in ("prefill", "decode"):
        report[part] = measure(getattr(there, part), getattr(here, part))
        worst = max(worst, _scaled(report[part]))
    if worst > tolerance:
        layer = first_difference(folder, form, model, ours, tokens[:, :prompt], tolerance)
        errors = ", ".join(f"{part} {report[part]['max_error']:.1e}" for part in ("prefill", "decode"))
        raise Unfaithful(
            f"the export is not the model: logits differ by more than {tolerance:g} ({errors}); "
            f"the first layer that differs is {layer}."
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "jax")}
    return report | {"libraries": versions}


def _reach(model: Architecture) -> int:
    """The longest window or segment of the model, 0 where it has none."""
    names = ("window", "segment_length")
    return max((getattr(options, name, None) or 0 for options in model.options.values() for name in names), default=0)


def prompt_length(model: Architecture) -> int:
    """A prompt that crosses windows and segments, where they are not too long for that."""
    return min(max(SHORTEST, math.ceil(1.5 * _reach(model))), LONGEST)


def measure(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far logits are from others; not finite counts as infinitely far."""
    error = np.abs(found - expected)
    finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
    norm = float(np.linalg.norm(expected))
    return {
        "max_error": float(error.max()) if finite else float(np.finfo(np.float32).max),
        "relative_error": float(np.linalg.norm(error)) / max(norm, 1e-30) if finite else 1.0,
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).mean()),
        "largest_logit": float(np.abs(expected).max()) if finite else 0.0,
    }


def _scaled(errors: dict[str, float]) -> float:
    return errors["max_error"] / max(1.0, errors["largest_logit"])


def in_float32(function: Callable) -> Callable:
    """`function`, run on the CPU with CPU kernels and exact products whatever this machine has."""

    def run(*arguments: Any) -> Any:
        device = jax.local_devices(backend="cpu")[0]
        with jax.default_device(device), jax.default_matmul_precision("highest"), compiling_for("cpu"):
            return function(*arguments)

    return run


@in_float32
def run_lcx(model: LanguageModel, tokens: np.ndarray) -> Results:
    """The logits of a prompt, and of the last DECODED tokens one by one."""
    graphdef, params = split(model)

    @jax.jit
    def advance(params: dict, tokens: jax.Array, state: dict) -> tuple[jax.Array, dict]:
        logits, state, _ = nnx.merge(graphdef, params)(tokens, state)
        return logits, state

    prompt = tokens.shape[1] - DECODED
    logits, state = advance(params, tokens[:, :prompt], model.init_state(len(tokens), tokens.shape[1]))
    prefill, decoded = np.asarray(logits), []
    for index in range(prompt, tokens.shape[1]):
        logits, state = advance(params, tokens[:, index : index + 1], state)
        decoded.append(np.asarray(logits))
    return Results(prefill, np.concatenate(decoded, axis=1))


def load_torch(folder: epath.Path, form: Format) -> Any:
    """The export in PyTorch, as its users load it. Raises Unfaithful where tensors are missing or left over."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # no advice to install kernels for GPUs
    settings = dict(dtype=torch.float32, trust_remote_code=form.code, local_files_only=True, output_loading_info=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise Unfaithful(
            f"the export is not the model: {form.architecture} does not take its tensor {sorted(wrong)[0]}."
        )
    return model.eval()


def run_torch(model: Any, tokens: np.ndarray) -> Results:
    """The same in PyTorch, with the model's own cache."""
    import torch

    tokens = torch.from_numpy(tokens).long()
    prompt = tokens.shape[1] - DECODED
    name = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    asked = inspect.signature(model.forward).parameters  # early versions want to be told where a cache is
    place = lambda index: {"cache_position": torch.tensor([index])} if "cache_position" in asked else {}  # noqa: E731
    with torch.no_grad():
        out = model(tokens[:, :prompt], use_cache=True)
        prefill, decoded = out.logits.float().numpy(), []
        for index in range(prompt, tokens.shape[1]):
            state = {name: getattr(out, name)} | place(index)
            out = model(tokens[:, index : index + 1], use_cache=True, **state)
            decoded.append(out.logits.float().numpy())
    return Results(prefill, np.concatenate(decoded, axis=1))


def first_difference(
    folder: epath.Path, form: Format, model: Architecture, ours: LanguageModel, tokens: np.ndarray, tolerance: float
) -> str:
    """The first layer whose output differs, as the export names it; the streams are compared after each block there."""
    here = streams_lcx(ours, tokens)
    there = streams_torch(load_torch(folder, form), form, tokens)
    if _differs(there["embedding"], here[0], tolerance):
        return "the embedding"
    for index, (name, stream) in enumerate((pair for pair in there.items() if pair[0] != "embedding"), start=1):
        if _differs(stream, here[index * form.layers_per_block], tolerance):
            layers = range((index - 1) * form.layers_per_block, index * form.layers_per_block)
            names = [model.layer_paths[layer % len(model.pattern)].rpartition("/")[2] for layer in layers]
            return f"{name} (layers {', '.join(names)} of period {layers[0] // len(model.pattern)} here)"
    return "the last norm or the head"


def _differs(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    error = np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30)
    return not error <= tolerance


@in_float32
def streams_lcx(model: LanguageModel, tokens: np.ndarray) -> list[np.ndarray]:
    """The residual stream before the first layer and after each one, layer by layer instead of scanned."""
    graphdef, params = split(model.stack.layers)
    context = make_context(tokens.shape, None, None, None)

    @partial(jax.jit, static_argnums=1)
    def after(params: dict, key: str, x: jax.Array) -> jax.Array:
        layer = nnx.merge(graphdef, params)[key]
        branches = [layer.branch(name, x, None, context, model.compute_dtype)[0] for name in layer.mixers]
        return x + sum(branch.astype(x.dtype) for branch in branches)

    streams = [model.embedding(tokens, model.residual_dtype)]
    for period in range(model.stack.periods):
        own = jax.tree.map(lambda leaf, period=period: leaf[period], params)
        for key in model.stack.layers:
            streams.append(after(own, key, streams[-1]))
    return [np.asarray(stream) for stream in streams]


def streams_torch(model: Any, form: Format, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The stream after the embedding and after each block there, by the block's name."""
    import torch

    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable:
        def hook(_: Any, __: Any, out: Any) -> None:
            found[name] = (out[0] if isinstance(out, tuple) else out).float().numpy()

        return hook

    names = [name for name, _ in model.named_modules() if name and form.blocks(f"{name}.") == name]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles.append(model.get_input_embeddings().register_forward_hook(keep("embedding")))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found
