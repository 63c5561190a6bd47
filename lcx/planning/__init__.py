"""What a model will cost, before anything runs."""

from lcx.planning.accounting import abstract_model, flops_per_token, mfu, parameter_count, state_bytes

__all__ = ["abstract_model", "flops_per_token", "mfu", "parameter_count", "state_bytes"]
