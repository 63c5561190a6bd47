# shellcheck shell=bash
# What XLA is told, by kind of device: the one table. To be sourced with that kind:
#
#     source launch/xla_flags.sh gpu
#
# What XLA_FLAGS and LIBTPU_INIT_ARGS already hold comes last, and so wins. A line is: kind, flag, why.
# What is not here is left as XLA has it: its defaults change with its versions, and a flag that was copied from
# somewhere outlives its reason.

lcx_flags() {
  local kind flag why
  while read -r kind flag why; do
    [[ $kind == "$1" ]] && printf '%s ' "$flag"
    : "$why"
  done <<'TABLE'
gpu --xla_gpu_enable_latency_hiding_scheduler=true  weights are gathered and gradients summed while other layers compute
gpu --xla_gpu_enable_pipelined_all_gather=true      a layer's weights are gathered during the layer before
gpu --xla_gpu_enable_pipelined_reduce_scatter=true  its gradients are summed during the layer after
repeatable --xla_gpu_deterministic_ops=true         the same bits in every run, at some cost in speed
repeatable --xla_gpu_autotune_level=0               and no choice of kernels by timing
TABLE
}

case ${1:-} in
  gpu)
    # The share of a GPU's memory that JAX takes at the start (its default is 0.75); lcx plan counts with it.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
    XLA_FLAGS="$(lcx_flags gpu)${LCX_REPEATABLE:+$(lcx_flags repeatable)}${XLA_FLAGS:-}"
    export XLA_FLAGS
    ;;
  tpu)
    LIBTPU_INIT_ARGS="$(lcx_flags tpu)${LIBTPU_INIT_ARGS:-}"
    export LIBTPU_INIT_ARGS
    ;;
  cpu)
    XLA_FLAGS="$(lcx_flags cpu)${XLA_FLAGS:-}"
    export XLA_FLAGS
    ;;
  *)
    echo "launch/xla_flags.sh: name the kind of device: gpu, tpu or cpu" >&2
    # shellcheck disable=SC2317
    return 2 2>/dev/null || exit 2
    ;;
esac
