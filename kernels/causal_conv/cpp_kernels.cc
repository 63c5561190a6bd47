// The depthwise causal convolution for CPUs, forward and backward; `cpp_cpu` says what is computed and calls it.
//
// A task has some neighbouring channels of one row, for all of time: what a filter looks back at is still in the
// nearest cache, and each array is read and written once.

#include <algorithm>
#include <vector>

#include "handler.h"
#include "parallel.h"
#include "vector.h"

namespace {

namespace ffi = xla::ffi;
using lcx::Lanes;
using lcx::load;
using lcx::store;
using lcx::Vector;

constexpr int64_t kVectors = 8;  // of channels that a task has

struct Shape {
  int64_t batch, time, channels, width;
  bool silu, has_lookback;

  int64_t groups(int lanes) const { return (channels + kVectors * lanes - 1) / (kVectors * lanes); }
};

template <typename T>
struct Inputs {
  const T *x, *tail, *weight, *bias;  // weight [channels, width]
  const int32_t* lookback;
};

template <typename T>
struct Group {
  const Shape& shape;
  const Inputs<T>& in;
  const int64_t row, first;
  int64_t vectors;
  std::vector<Vector<T>> weights;  // [width, vectors], the current token's first

  Group(const Shape& shape, const Inputs<T>& in, int64_t task)
      : shape(shape), in(in), row(task / shape.groups(Lanes<T>::count)),
        first(task % shape.groups(Lanes<T>::count) * kVectors * Lanes<T>::count),
        vectors(std::min<int64_t>(kVectors, (shape.channels - first + Lanes<T>::count - 1) / Lanes<T>::count)),
        weights(shape.width * vectors) {
    for (int64_t distance = 0; distance < shape.width; ++distance) {
      for (int64_t v = 0; v < vectors; ++v) {
        T lanes[Lanes<T>::count] = {};
        for (int lane = 0; lane < count(v); ++lane) {
          lanes[lane] = in.weight[(channel(v) + lane) * shape.width + shape.width - 1 - distance];
        }
        weights[distance * vectors + v] = load<T>(lanes, Lanes<T>::count);
      }
    }
  }

  int64_t channel(int64_t v) const { return first + v * Lanes<T>::count; }
  int count(int64_t v) const { return int(std::min<int64_t>(Lanes<T>::count, shape.channels - channel(v))); }
  int64_t token(int64_t t, int64_t v) const { return (row * shape.time + t) * shape.channels + channel(v); }
  // How many tokens the filter of token t looks back, itself not counted.
  int64_t reach(int64_t t) const {
    const int64_t most = shape.width - 1;
    return shape.has_lookback ? std::min<int64_t>(most, in.lookback[row * shape.time + t]) : most;
  }
  // Token t of an array and the one that holds the width - 1 tokens before it.
  template <typename P>
  P* at(P* tokens, P* tail, int64_t t, int64_t v) const {
    if (t >= 0) return tokens + token(t, v);
    return tail + (row * (shape.width - 1) + shape.width - 1 + t) * shape.channels + channel(v);
  }
  Vector<T> sum(int64_t t, int64_t v) const {
    Vector<T> total = load<T>(in.bias + channel(v), count(v));
    for (int64_t distance = 0, last = reach(t); distance <= last; ++distance) {
      total += weights[distance * vectors + v] * load<T>(at(in.x, in.tail, t - distance, v), count(v));
    }
    return total;
  }
};

template <typename T>
void forward_group(const Shape& shape, const Inputs<T>& in, int64_t task, T* y) {
  const Group<T> group(shape, in, task);
  for (int64_t t = 0; t < shape.time; ++t) {
    for (int64_t v = 0; v < group.vectors; ++v) {
      const Vector<T> sum = group.sum(t, v);
      store<T>(y + group.token(t, v), shape.silu ? sum * lcx::sigmoid<T>(sum) : sum, group.count(v));
    }
  }
}

// Gradients of x and the tail before it; of weight [batch, channels, width] and bias [batch, channels], row by row.
template <typename T>
struct Gradients {
  T *x, *tail, *weight, *bias;
};

template <typename T>
void backward_group(const Shape& shape, const Inputs<T>& in, const T* dy, int64_t task, const Gradients<T>& out) {
  const Group<T> group(shape, in, task);
  const int64_t vectors = group.vectors;
  std::vector<Vector<T>> sums((shape.width + 1) * vectors);
  Vector<T>*d_weight = sums.data(), *d_bias = d_weight + shape.width * vectors;
  for (int64_t held = 1; held < shape.width; ++held) {
    for (int64_t v = 0; v < vectors; ++v) {
      store<T>(group.at(out.x, out.tail, -held, v), Vector<T>{}, group.count(v));
    }
  }
  for (int64_t t = 0; t < shape.time; ++t) {
    const int64_t last = group.reach(t);
    for (int64_t v = 0; v < vectors; ++v) {
      const int count = group.count(v);
      Vector<T> d_sum = load<T>(dy + group.token(t, v), count);
      if (shape.silu) {
        const Vector<T> sum = group.sum(t, v), gate = lcx::sigmoid<T>(sum);
        d_sum *= gate * (T(1) + sum * (T(1) - gate));
      }
      d_bias[v] += d_sum;
      for (int64_t distance = 0; distance <= last; ++distance) {
        const Vector<T> seen = load<T>(group.at(in.x, in.tail, t - distance, v), count);
        d_weight[distance * vectors + v] += d_sum * seen;
        T* place = group.at(out.x, out.tail, t - distance, v);
        const Vector<T> share = group.weights[distance * vectors + v] * d_sum;
        // Each token sees itself, so what was there before is of no meaning.
        store<T>(place, distance ? load<T>(place, count) + share : share, count);
      }
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t channel = group.row * shape.channels + group.channel(v);
    store<T>(out.bias + channel, d_bias[v], group.count(v));
    for (int64_t distance = 0; distance < shape.width; ++distance) {
      for (int lane = 0; lane < group.count(v); ++lane) {
        T* place = out.weight + (channel + lane) * shape.width + shape.width - 1 - distance;
        *place = d_weight[distance * vectors + v][lane];
      }
    }
  }
}

template <typename T>
void run(const lcx::Call& call, bool silu, bool has_lookback, bool backward) {
  const auto from = [&](size_t i) { return call.from<T>(i); };
  const auto to = [&](size_t i) { return call.to<T>(i); };
  const auto x = call.dimensions(0);
  const Shape shape{x[0], x[1], x[2], call.dimensions(2).back(), silu, has_lookback};
  const Inputs<T> in{from(0), from(1), from(2), from(3), call.from<int32_t>(4)};
  const int64_t tasks = shape.batch * shape.groups(Lanes<T>::count);
  if (!backward) {
    T* y = to(0);
    return lcx::in_parallel(call.pool, tasks, [&](int64_t task) { forward_group<T>(shape, in, task, y); });
  }
  const T* dy = from(5);
  const Gradients<T> out{to(0), to(1), to(2), to(3)};
  lcx::in_parallel(call.pool, tasks, [&](int64_t task) { backward_group<T>(shape, in, dy, task, out); });
}

template <bool kBackward>
ffi::Error handle(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, bool silu,
                  bool has_lookback) {
  const lcx::Call call{pool, arguments, results};
  return call.by_dtype([&](auto zero) { run<decltype(zero)>(call, silu, has_lookback, kBackward); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_causal_conv_forward, handle<false>,
                              lcx::binding().Attr<bool>("silu").Attr<bool>("has_lookback"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_causal_conv_backward, handle<true>,
                              lcx::binding().Attr<bool>("silu").Attr<bool>("has_lookback"));
