"""Exact softmax attention that also returns its log-sum-exp."""

from lcx_kernels.attention.api import attention, attention_gradients, fold_sinks
from lcx_kernels.attention.choice import select_backend
from lcx_kernels.attention.visibility import NO_KEY_LOG_SUM_EXP

__all__ = ["NO_KEY_LOG_SUM_EXP", "attention", "attention_gradients", "fold_sinks", "select_backend"]
