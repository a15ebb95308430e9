"""Swapping the modules of a model for fast twins.

Every twin is a subclass of its plain module, shares its parameters and computes the same function; its `plain`
attribute names the module that it replaces. tests/test_backends.py compares all of them.

**Batch independence.** On a CPU the result for one image must not depend, to the last bit, on the images that share its
batch. The plain modules do not promise that, because the libraries change the order of summation with the batch size.
The CPU twins do, in inference: their products, convolutions, attention, experts and Mamba-2 keep one order of summation
for each image, and their activations round a value alike wherever it stands. On a GPU nothing is promised.
`Pipeline.sample` draws each image from a random stream of its own, so with the CPU twins a sampled image is the same
alone and in any batch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import nn

from nextscale.common.errors import UserError

Backend = Literal["auto", "plain"]
Twins = dict[str, str]

_T, _CPU, _CUDA = "nextscale.transformer", "nextscale.backends.cpu", "nextscale.backends.cuda"
_FFN = f"{_T}.feed_forward"
_DECODER = "nextscale.tokenizer.autoencoder:Decoder"

TRAINING_CPU: Twins = {
    "torch.nn.modules.linear:Linear": f"{_CPU}.linear:CpuLinear",
    "torch.nn.modules.conv:Conv2d": f"{_CPU}.convolution:CpuConv2d",
    "torch.nn.modules.activation:SiLU": f"{_CPU}.activations:CpuSiLU",
    "nextscale.tokenizer.autoencoder:SiLU": f"{_CPU}.activations:CpuTokenizerSiLU",
    "nextscale.tokenizer.autoencoder:MapAttention": f"{_CPU}.attention:CpuMapAttention",
    "nextscale.tokenizer.autoencoder:Downsample": f"{_CPU}.convolution:CpuDownsample",
    _DECODER: f"{_CPU}.convolution:CpuDecoder",
    "nextscale.tokenizer.quantizer:Phi": f"{_CPU}.convolution:CpuPhi",
    "nextscale.tokenizer.quantizer:Quantizer": f"{_CPU}.convolution:CpuQuantizer",
    "nextscale.common.precision:Float32Linear": f"{_CPU}.linear:CpuFloat32Linear",
    f"{_T}.lora:LoraLinear": f"{_CPU}.lora:CpuLoraLinear",
    f"{_T}.lora:LoraStackedLinear": f"{_CPU}.lora:CpuLoraStackedLinear",
    f"{_T}.int8:Int8Linear": f"{_CPU}.int8:CpuInt8Linear",
    f"{_T}.int8:Int8StackedLinear": f"{_CPU}.int8:CpuInt8StackedLinear",
    "nextscale.tokenizer.int8:Int8Conv2d": f"{_CPU}.int8_decoder:CpuInt8Conv2d",
    "nextscale.tokenizer.int8:Int8Upsample": f"{_CPU}.int8_decoder:CpuInt8Upsample",
    f"{_T}.block:AdaLayerNorm": f"{_CPU}.attention:CpuAdaLayerNorm",
    f"{_T}.block:GatedResidual": f"{_CPU}.attention:CpuGatedResidual",
    f"{_T}.attention:Attention": f"{_CPU}.attention:CpuAttention",
    f"{_T}.scale_attention:ScaleAttention": f"{_CPU}.attention:CpuScaleAttention",
    f"{_T}.cross_attention:CrossAttention": f"{_CPU}.cross_attention:CpuCrossAttention",
    f"{_T}.mamba:Mamba2": f"{_CPU}.mamba:CpuMamba2",
    f"{_FFN}:DenseFeedForward": f"{_CPU}.linear:CpuDenseFeedForward",
    f"{_FFN}.experts:StackedLinear": f"{_CPU}.experts:CpuStackedLinear",
    f"{_FFN}.experts:Experts": f"{_CPU}.experts:CpuExperts",
    f"{_FFN}.mixture:ZeroComputationExperts": f"{_CPU}.experts:CpuZeroComputationExperts",
    f"{_FFN}.dynamic:DynamicFeedForward": "nextscale.backends.dynamic:SparseDynamicFeedForward",
    f"{_FFN}.dynamic:ExpertRouter": "nextscale.backends.dynamic:CpuExpertRouter",
}
"""Plain module -> twin with gradients, on a CPU. Twins are imported when a model has their plain module."""

INFERENCE_CPU: Twins = TRAINING_CPU | {
    "torch.nn.modules.linear:Linear": f"{_CPU}.linear:PackedLinear",
    f"{_FFN}.experts:StackedLinear": f"{_CPU}.experts:PackedStackedLinear",
    f"{_FFN}.experts:Experts": f"{_CPU}.experts:PackedExperts",
    f"{_FFN}.dynamic:DynamicFeedForward": f"{_CPU}.dynamic:PackedDynamicFeedForward",
    f"{_FFN}.dynamic:ExpertRouter": f"{_CPU}.dynamic:PackedExpertRouter",
}
"""The same for inference, where weights may be packed."""

DECODER_CPU: Twins = {
    "torch.nn.modules.conv:Conv2d": f"{_CPU}.convolution:WinogradConv2d",
    "nextscale.tokenizer.autoencoder:Upsample": f"{_CPU}.convolution:WinogradUpsample",
}
"""Inside a decoder, whose small rounding errors change no token."""

CUDA: Twins = {
    f"{_T}.attention:Attention": "nextscale.backends.segments:SegmentedAttention",
    f"{_T}.mamba:Mamba2": f"{_CUDA}.mamba:CudaMamba2",
    f"{_FFN}.experts:Experts": f"{_CUDA}.experts:CudaExperts",
    f"{_FFN}.dynamic:DynamicFeedForward": f"{_CUDA}.dynamic:CudaDynamicFeedForward",
}


def optimize(module: nn.Module, backend: Backend = "auto", *, training: bool = False) -> nn.Module:
    """Swap the modules inside `module` for the fast twins of its device, in place; returns it.

    `backend`: "auto" takes the device of its parameters; "plain" changes nothing. `training`: twins with gradients;
    otherwise the module is for inference alone, gets no gradients, and weights may be packed at their first use (it can
    still be saved, moved and converted). State-dict names and values stay as they are. Raises UserError for another
    backend.
    """
    if backend not in get_args(Backend):
        raise UserError(f"there is no backend '{backend}'; use {' or '.join(get_args(Backend))}")
    if backend == "plain":
        return module
    if not training:
        module.requires_grad_(False)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    twins = (TRAINING_CPU if training else INFERENCE_CPU) if device.type == "cpu" else CUDA
    _swap_children(module, twins, {}, channels_last=not training and device.type == "cpu")
    if device.type == "cpu":
        from nextscale.backends.cpu.conversion import widen_parameters

        widen_parameters(module)
    return module


def _swap_children(module: nn.Module, twins: Twins, done: dict[nn.Module, nn.Module], *, channels_last: bool) -> None:
    """Swap all descendants; one that stands in several places stays one module."""
    may_pack = type(module).__module__.startswith(("nextscale.", "torch.nn.modules.container"))
    # your own modules may read the weights of their layers, which a packed layer does not have in the usual layout
    direct = twins if may_pack or twins is CUDA else TRAINING_CPU
    for name, child in module.named_children():
        if child not in done:
            done[child] = swap_module(child, direct)
            inner = twins | DECODER_CPU if _find_name(child) == _DECODER and twins is not CUDA else twins
            _swap_children(done[child], inner, done, channels_last=channels_last)
            if channels_last and isinstance(child, nn.Conv2d):
                from nextscale.backends.cpu.convolution import use_channels_last

                use_channels_last(child)
        if done[child] is not child:
            setattr(module, name, done[child])


def swap_module(module: nn.Module, twins: Twins) -> nn.Module:
    """The module's twin, with the same parameters, buffers and children; itself where there is none."""
    path = twins.get(_find_name(module))
    if path is None:
        return module
    file, _, name = path.partition(":")
    twin: Any = getattr(import_module(file), name)
    if type(module) is twin:
        return module
    fast = twin.__new__(twin)
    fast.__dict__.update(module.__dict__)
    return fast


def _find_name(module: nn.Module) -> str:
    """Where the module's class is, "file:name"; of a twin, where its plain class is."""
    kind = getattr(type(module), "plain", type(module))
    return f"{kind.__module__}:{kind.__qualname__}"
