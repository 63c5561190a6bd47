"""What a user would pick instead, where it is installed: models of transformers, trained and decoded in PyTorch.

The sizes are those of `lcx.benchmarks.models`, and so is what a step does: forward, loss, backward, clipping, AdamW.
PyTorch gets as many threads as XLA has.
"""

import importlib.util
import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lcx.benchmarks.models import D_FF, HEADS, LAYERS, VOCABULARY, WIDTH, WINDOW, make_batch
from lcx.errors import UserError


def available(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def use_all_cores() -> None:
    """Gives PyTorch the threads that XLA takes: one for each visible core."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def build(family: str, *, mambapy: bool = True) -> Any:
    """A model of transformers with drawn parameters.

    Args:
      family: "transformer" (Llama), "mistral" (a window) or "mamba".
      mambapy: whether Mamba may use the package mambapy in training, which is its quickest way on a CPU; without it
        transformers goes through time in Python.
    """
    import torch
    import transformers

    use_all_cores()
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, tie_word_embeddings=False)
    heads = dict(intermediate_size=D_FF, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    heads |= dict(max_position_embeddings=2**17, attn_implementation="sdpa")
    config = {
        "transformer": lambda: transformers.LlamaConfig(**sizes, **heads),
        "mistral": lambda: transformers.MistralConfig(**sizes, **heads, sliding_window=WINDOW),
        "mamba": lambda: transformers.MambaConfig(**sizes, use_mambapy=mambapy),
    }[family]()
    return transformers.AutoModelForCausalLM.from_config(config)


def train_step(family: str, batch: int, time: int, **options: Any) -> Callable[[], float]:
    """A call takes one step on the same batch and returns its loss."""
    import torch

    model = build(family, **options)
    update = updater(model)
    arrays = make_batch(batch, time)
    tokens, targets = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("tokens", "targets"))

    def step() -> float:
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return update(loss)

    return step


def updater(model: Any) -> Callable[[Any], float]:
    """From a loss to its value, by way of backward, clipping and AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def update(loss: Any) -> float:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update


def easydel_step(python: str, family: str, batch: int, time: int) -> Callable[[], float]:
    """As `train_step`, of EasyDeL, a trainer in JAX, in a process of a Python that has it.

    Raises UserError where that Python cannot take a step.
    """
    sizes = dict(width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY, d_ff=D_FF, heads=HEADS)
    worker = Path(__file__).with_name("easydel_worker.py")
    command = [python, str(worker), family, str(batch), str(time), json.dumps(sizes)]
    errors = tempfile.TemporaryFile("w+")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        process = subprocess.Popen(command, **pipes)
    except OSError as error:
        raise UserError(f"--easydel: {python} cannot be run: {error.strerror}.") from error
    while (said := process.stdout.readline()) != "ready\n":  # it greets on its output
        if not said:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:]
            raise UserError(f"--easydel: {python} cannot train with EasyDeL: {''.join(last)}")

    def step() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    weakref.finalize(step, process.kill)
    return step


def decoder(family: str, prompt: int) -> Callable[[int], list[int]]:
    """From how many tokens to write, to those that follow a random prompt of `prompt` tokens, greedily."""
    import torch

    model = build(family).eval()
    tokens = torch.from_numpy(make_batch(1, prompt)["tokens"].astype(np.int64))

    def decode(count: int) -> list[int]:
        with torch.no_grad():
            out = model.generate(tokens, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        return out[0, prompt:].tolist()

    return decode


def mamba_ssm_scan(arguments: dict[str, Any]) -> dict[str, Callable]:
    """mamba_ssm's selective scan on the same values [batch, time, ...] of a GPU, forward and both passes."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    given = to_cuda(arguments)
    rows = {name: given[name].transpose(1, 2).contiguous() for name in ("x", "dt", "B", "C")}

    def call(x: Any, dt: Any, A: Any, B: Any, C: Any) -> Any:
        return selective_scan_fn(x, dt, A, B, C)

    return torch_passes(call, [rows["x"], rows["dt"], given["A"].contiguous(), rows["B"], rows["C"]])


def mamba_ssm_ssd(arguments: dict[str, Any]) -> dict[str, Callable]:
    """mamba_ssm's Triton for SSD. Its dt scales what is written, too: 1 here, with the decays in place of dt A."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    given = to_cuda(arguments)
    dt = -given["log_decay"]
    A = -torch.ones(dt.shape[-1], device=dt.device)

    def call(v: Any, dt: Any, k: Any, q: Any) -> Any:
        return mamba_chunk_scan_combined(v, dt, A, k, q, chunk_size=256)

    return torch_passes(call, [given["v"], dt, given["k"], given["q"]])


def fla_samba_step(config: Any) -> Callable[[], Any]:
    """A training step of flash-linear-attention's SAMBA with this config's widths, in bfloat16 on a GPU."""
    import torch
    from fla.models import SambaConfig, SambaForCausalLM

    model, train = config.model, config.train
    attention, layers = model.mixers["swa"], 2 * model.periods  # theirs counts a mixer with its MLP as a layer
    peer = SambaForCausalLM(
        SambaConfig(
            hidden_size=model.d_model,
            num_hidden_layers=layers,
            vocab_size=model.vocab_size,
            intermediate_size=model.mixers["mlp"]["d_ff"],
            attn={
                "layers": list(range(1, layers, 2)),
                "num_heads": attention["num_heads"],
                "num_kv_heads": attention["num_kv_heads"],
                "window_size": attention["window"],
            },
        )
    ).cuda()
    update = updater(peer)
    tokens = torch.from_numpy(make_batch(train.batch_size, train.sequence_length, model.vocab_size)["tokens"])
    tokens = tokens.long().cuda()

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = peer(input_ids=tokens, labels=tokens).loss
        return update(loss)

    return step


def to_cuda(arguments: dict[str, Any]) -> dict[str, Any]:
    """JAX arrays as PyTorch's on the GPU, with their dtypes."""
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {
        name: torch.from_numpy(np.asarray(array, np.float32)).to("cuda", dtypes[array.dtype.name])
        for name, array in arguments.items()
    }


def torch_passes(function: Callable, arguments: list) -> dict[str, Callable]:
    """Calls of a function of PyTorch: forward, and forward with backward. Both wait for the GPU."""
    import torch

    leaves = [argument.detach().requires_grad_() for argument in arguments]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)
        torch.cuda.synchronize()

    def both() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()

    return {"forward": forward, "both": both}
