"""The depthwise causal convolution that precedes a selective scan, with documents and a carried tail."""

from lcx_kernels.causal_conv.api import causal_conv

__all__ = ["causal_conv"]
