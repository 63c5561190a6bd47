// The selective scan for CPUs, forward and backward; `cpp_cpu` says what is computed and calls it.
//
// A vector holds neighbouring channels, one state of a channel is one vector, and all states of a vector of channels
// stay in the nearest cache while time goes by. A is held times log2(e), since powers of two are cheaper. The backward
// pass computes the states of a chunk again from the one that the forward pass kept, then walks back through them.

#include <algorithm>
#include <vector>

#include "handler.h"
#include "parallel.h"
#include "vector.h"

namespace {

namespace ffi = xla::ffi;
using lcx::fill;
using lcx::Lanes;
using lcx::load;
using lcx::store;
using lcx::Vector;

// What a call is of; `has_...` tells optional arrays that are there from the fillers of those that are not.
struct Shape {
  int64_t batch, time, channels, state, chunk;
  int64_t task_blocks;  // vectors of channels that a task has
  bool softplus, has_output, has_skip, has_gate, has_bias, has_reset;

  int64_t chunks() const { return (time + chunk - 1) / chunk; }
  int64_t blocks(int lanes) const { return (channels + lanes - 1) / lanes; }
  int64_t groups(int lanes) const { return (blocks(lanes) + task_blocks - 1) / task_blocks; }
};

template <typename T>
struct Inputs {
  const T *x, *dt, *A, *B, *C, *D, *z, *bias, *initial;
  const bool* reset;
};

// The vector of channels that begins at `first`, of one row of the batch.
template <typename T>
struct Place {
  const Shape& shape;
  int64_t row, first;
  int count;  // of channels, fewer in the last vector of a row

  Place(const Shape& shape, int64_t row, int64_t block)
      : shape(shape), row(row), first(block * Lanes<T>::count),
        count(int(std::min<int64_t>(Lanes<T>::count, shape.channels - first))) {}

  int64_t channel(int64_t token) const { return (row * shape.time + token) * shape.channels + first; }
  int64_t shared(int64_t token) const { return (row * shape.time + token) * shape.state; }

  // Arrays [..., channels, state]: the states lie side by side there.
  void load_states(const T* from, Vector<T>* to, T factor = 1) const {
    for (int64_t n = 0; n < shape.state; ++n) {
      T lanes[Lanes<T>::count] = {};
      for (int lane = 0; lane < count; ++lane) lanes[lane] = from[(first + lane) * shape.state + n];
      to[n] = factor * load<T>(lanes, Lanes<T>::count);
    }
  }
  void store_states(T* to, const Vector<T>* from) const {
    for (int64_t n = 0; n < shape.state; ++n) {
      for (int lane = 0; lane < count; ++lane) to[(first + lane) * shape.state + n] = from[n][lane];
    }
  }
};

// The vectors of a chunk's tokens that a task has, one after the other as they lie in memory. It goes a chunk ahead of
// the arithmetic, which takes them by channels: steps of a whole row, which no hardware foresees and memory is slow at.
template <typename T>
struct Ahead {
  const Shape& shape;
  int64_t row, first, last;  // blocks
  int64_t token = 0, end = 0, block = 0;

  Ahead(const Shape& shape, int64_t row, int64_t first, int64_t last)
      : shape(shape), row(row), first(first), last(last) {}

  void start(int64_t chunk) {
    token = chunk * shape.chunk, end = chunk < 0 ? token : std::min(token + shape.chunk, shape.time);
    block = first;
  }
  bool there() const { return token < end; }
  void fetch(const T* array) const { __builtin_prefetch(array + place()); }
  void claim(T* array) const { __builtin_prefetch(array + place(), 1); }
  void next() {
    if (++block == last) block = first, ++token;
  }

 private:
  int64_t place() const { return (row * shape.time + token) * shape.channels + block * Lanes<T>::count; }
};

template <typename T>
struct Steps {
  Vector<T> bias{};
  bool softplus;

  Steps(const Shape& shape, const Inputs<T>& in, const Place<T>& place) : softplus(shape.softplus) {
    if (shape.has_bias) bias = load<T>(in.bias + place.first, place.count);
  }
  Vector<T> operator()(Vector<T> dt) const { return softplus ? lcx::softplus<T>(dt + bias) : dt + bias; }
};

// Borders are whole vectors, [batch, chunks, blocks, state, lanes].
template <typename T>
int64_t border(const Shape& shape, int64_t row, int64_t chunk, int64_t block) {
  const int64_t blocks = shape.blocks(Lanes<T>::count);
  return ((row * shape.chunks() + chunk) * blocks + block) * shape.state * Lanes<T>::count;
}

// The group's vectors of channels, of one row. N is the number of states where it is known to the compiler, or 0.
template <typename T, int N>
struct ForwardGroup {
  const Shape& shape;
  const Inputs<T>& in;
  T *y, *final, *borders;
  const int64_t row, first, last, state;
  Ahead<T> ahead;
  std::vector<Vector<T>> memory;
  Vector<T> *A, *h;  // [blocks, state]

  ForwardGroup(const Shape& shape, const Inputs<T>& in, T* y, T* final, T* borders, int64_t row, int64_t group)
      : shape(shape), in(in), y(y), final(final), borders(borders), row(row),
        first(group * shape.task_blocks), last(std::min(first + shape.task_blocks, shape.blocks(Lanes<T>::count))),
        state(N ? N : shape.state), ahead(shape, row, first, last), memory(2 * shape.task_blocks * state),
        A(memory.data()), h(A + shape.task_blocks * state) {}

  void run() {
    const int64_t plane = shape.channels * state;
    for (int64_t block = first; block < last; ++block) {
      const Place<T> place(shape, row, block);
      place.load_states(in.A, A + (block - first) * state, T(lcx::kLog2E));
      place.load_states(in.initial + row * plane, h + (block - first) * state);
    }
    for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
      ahead.start(chunk + 1);
      for (int64_t block = first; block < last; ++block) walk(block, chunk);
    }
    for (int64_t block = first; block < last; ++block) {
      Place<T>(shape, row, block).store_states(final + row * plane, h + (block - first) * state);
    }
  }

  void walk(int64_t block, int64_t chunk) {
    const Place<T> place(shape, row, block);
    const Steps<T> steps(shape, in, place);
    const Vector<T>* A = this->A + (block - first) * state;
    Vector<T>* h = this->h + (block - first) * state;
    const Vector<T> skip = shape.has_skip ? load<T>(in.D + place.first, place.count) : Vector<T>{};
    if (borders) std::memcpy(borders + border<T>(shape, row, chunk, block), h, state * sizeof(Vector<T>));
    const int64_t begin = chunk * shape.chunk, end = std::min(begin + shape.chunk, shape.time);
    for (int64_t t = begin; t < end; ++t) {
      if (ahead.there()) {
        ahead.fetch(in.x);
        ahead.fetch(in.dt);
        if (shape.has_gate) ahead.fetch(in.z);
        if (shape.has_output) ahead.claim(y);
        ahead.next();
      }
      if (shape.has_reset && in.reset[row * shape.time + t]) std::fill(h, h + state, Vector<T>{});
      const Vector<T> x = load<T>(in.x + place.channel(t), place.count);
      const Vector<T> dt = steps(load<T>(in.dt + place.channel(t), place.count)), written = dt * x;
      const T* B = in.B + place.shared(t);
      if (!shape.has_output) {
        for (int64_t n = 0; n < state; ++n) h[n] = lcx::exp2<T>(dt * A[n]) * h[n] + written * B[n];
        continue;
      }
      const T* C = in.C + place.shared(t);
      Vector<T> out{};
      for (int64_t n = 0; n < state; ++n) {
        h[n] = lcx::exp2<T>(dt * A[n]) * h[n] + written * B[n];
        out += h[n] * C[n];
      }
      if (shape.has_skip) out += skip * x;
      if (shape.has_gate) {
        const Vector<T> z = load<T>(in.z + place.channel(t), place.count);
        out *= z * lcx::sigmoid<T>(z);
      }
      store<T>(y + place.channel(t), out, place.count);
    }
  }
};

// Sums over time and over channels are in parts, which are added up outside in a fixed order.
template <typename T>
struct Gradients {
  T *x, *dt, *z, *initial;      // as what they are gradients of
  T *A;                         // [batch, channels, state]
  T *B, *C;                     // [groups, batch, time, state]
  T *D, *bias;                  // [batch, channels]
};

// The gradients of a group of vectors of channels, of one row.
template <typename T, int N>
struct BackwardGroup {
  const Shape& shape;
  const Inputs<T>& in;
  const T *borders, *dy, *d_final;
  const Gradients<T>& out;
  const int64_t row, group, first, last, state;
  Ahead<T> ahead;

  // Of a chunk, [chunk, state] or [chunk]: of the vector at hand, but for the sums of B and C, which are the group's.
  std::vector<Vector<T>> memory;
  Vector<T> *found, *decay, *d_B, *d_C, *x, *dt, *slope, *d_y;
  // Of each vector, [blocks, state] or [blocks].
  Vector<T> *A, *g, *d_A, *d_D, *d_bias;

  BackwardGroup(const Shape& shape, const Inputs<T>& in, const T* borders, const T* dy, const T* d_final,
                const Gradients<T>& out, int64_t row, int64_t group)
      : shape(shape), in(in), borders(borders), dy(dy), d_final(d_final), out(out), row(row), group(group),
        first(group * shape.task_blocks), last(std::min(first + shape.task_blocks, shape.blocks(Lanes<T>::count))),
        state(N ? N : shape.state), ahead(shape, row, first, last),
        memory(4 * shape.chunk * (state + 1) + shape.task_blocks * (3 * state + 2)) {
    Vector<T>* next = memory.data();
    for (Vector<T>** array : {&found, &decay, &d_B, &d_C}) *array = next, next += shape.chunk * state;
    for (Vector<T>** array : {&x, &dt, &slope, &d_y}) *array = next, next += shape.chunk;
    for (Vector<T>** array : {&A, &g, &d_A}) *array = next, next += shape.task_blocks * state;
    for (Vector<T>** array : {&d_D, &d_bias}) *array = next, next += shape.task_blocks;
  }

  void run() {
    const int64_t plane = shape.channels * state;
    for (int64_t block = first; block < last; ++block) {
      const Place<T> place(shape, row, block);
      place.load_states(in.A, A + (block - first) * state, T(lcx::kLog2E));
      place.load_states(d_final + row * plane, g + (block - first) * state);
    }
    for (int64_t chunk = shape.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * shape.chunk, end = std::min(begin + shape.chunk, shape.time);
      ahead.start(chunk - 1);
      std::fill(d_B, d_B + shape.chunk * state, Vector<T>{});
      std::fill(d_C, d_C + shape.chunk * state, Vector<T>{});
      for (int64_t block = first; block < last; ++block) {
        recompute(block, chunk, begin, end);
        walk_back(block, begin, end);
      }
      sum_over_channels(begin, end);
    }
    for (int64_t block = first; block < last; ++block) {
      const Place<T> place(shape, row, block);
      place.store_states(out.A + row * plane, d_A + (block - first) * state);
      place.store_states(out.initial + row * plane, g + (block - first) * state);
      store<T>(out.D + row * shape.channels + place.first, d_D[block - first], place.count);
      store<T>(out.bias + row * shape.channels + place.first, d_bias[block - first], place.count);
    }
  }

  // Forward through a chunk: the states that its tokens find, and all that does not need the gradient of a state.
  void recompute(int64_t block, int64_t chunk, int64_t begin, int64_t end) {
    const Place<T> place(shape, row, block);
    const Steps<T> steps(shape, in, place);
    const Vector<T>* A = this->A + (block - first) * state;
    const Vector<T> skip = shape.has_skip ? load<T>(in.D + place.first, place.count) : Vector<T>{};
    std::vector<Vector<T>> carried(state);
    Vector<T>* h = carried.data();
    std::memcpy(h, borders + border<T>(shape, row, chunk, block), state * sizeof(Vector<T>));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t - begin;
      if (shape.has_reset && in.reset[row * shape.time + t]) std::fill(h, h + state, Vector<T>{});
      const Vector<T> raw = load<T>(in.dt + place.channel(t), place.count);
      x[i] = load<T>(in.x + place.channel(t), place.count);
      dt[i] = steps(raw);
      slope[i] = shape.softplus ? lcx::sigmoid<T>(raw + steps.bias) : fill<T>(1);
      d_y[i] = shape.has_output ? load<T>(dy + place.channel(t), place.count) : Vector<T>{};
      const Vector<T> d_gated = d_y[i];
      Vector<T> z{}, gate{};
      if (shape.has_gate) {
        z = load<T>(in.z + place.channel(t), place.count);
        gate = lcx::sigmoid<T>(z);
        d_y[i] *= z * gate;
      }
      const Vector<T> written = dt[i] * x[i];
      const T* B = in.B + place.shared(t);
      const T* C = in.C + (shape.has_output ? place.shared(t) : 0);
      Vector<T> y = skip * x[i];
      Vector<T>*found = this->found + i * state, *decay = this->decay + i * state, *d_C = this->d_C + i * state;
      for (int64_t n = 0; n < state; ++n) {
        found[n] = h[n];
        decay[n] = lcx::exp2<T>(dt[i] * A[n]);
        h[n] = decay[n] * h[n] + written * B[n];
        if (shape.has_output) {
          y += h[n] * C[n];
          d_C[n] += h[n] * d_y[i];
        }
      }
      if (shape.has_gate) {
        store<T>(out.z + place.channel(t), d_gated * y * gate * (T(1) + z * (T(1) - gate)), place.count);
      }
    }
  }

  // Back through it: g is the gradient of the state that a token left, and becomes that of the state it found.
  void walk_back(int64_t block, int64_t begin, int64_t end) {
    const Place<T> place(shape, row, block);
    const int64_t own = block - first;
    const Vector<T>* A = this->A + own * state;
    Vector<T>*g = this->g + own * state, *d_A = this->d_A + own * state;
    const Vector<T> skip = shape.has_skip ? load<T>(in.D + place.first, place.count) : Vector<T>{};
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t i = t - begin;
      if (ahead.there()) {
        ahead.fetch(in.x);
        ahead.fetch(in.dt);
        if (shape.has_output) ahead.fetch(dy);
        if (shape.has_gate) ahead.fetch(in.z), ahead.claim(out.z);
        ahead.claim(out.x);
        ahead.claim(out.dt);
        ahead.next();
      }
      const T* B = in.B + place.shared(t);
      const T* C = in.C + (shape.has_output ? place.shared(t) : 0);
      const Vector<T>*found = this->found + i * state, *decay = this->decay + i * state;
      Vector<T>* d_B = this->d_B + i * state;
      const Vector<T> written = dt[i] * x[i], d_y = this->d_y[i], step = dt[i];
      Vector<T> d_written{}, d_step{};
      for (int64_t n = 0; n < state; ++n) {
        Vector<T> now = g[n];
        if (shape.has_output) now += d_y * C[n];
        d_B[n] += now * written;
        d_written += now * B[n];
        now *= decay[n];
        g[n] = now;
        const Vector<T> d_exponent = now * found[n];
        d_step += d_exponent * A[n];
        d_A[n] += d_exponent * step;
      }
      // By selection, so that not even a NaN passes to the tokens before.
      if (shape.has_reset && in.reset[row * shape.time + t]) std::fill(g, g + state, Vector<T>{});
      const Vector<T> d_dt = (d_written * x[i] + d_step * T(1 / lcx::kLog2E)) * slope[i];
      store<T>(out.x + place.channel(t), d_written * step + skip * d_y, place.count);
      store<T>(out.dt + place.channel(t), d_dt, place.count);
      d_D[own] += d_y * x[i];
      d_bias[own] += d_dt;
    }
  }

  void sum_over_channels(int64_t begin, int64_t end) {
    const int64_t from = ((group * shape.batch + row) * shape.time + begin) * state;
    for (int64_t i = 0; i < (end - begin) * state; ++i) {
      out.B[from + i] = lcx::total<T>(d_B[i]);
      if (shape.has_output) out.C[from + i] = lcx::total<T>(d_C[i]);
    }
  }
};

// Calls with the number of states as a constant where it is a usual one: loops over it are then unrolled.
template <typename Function>
void for_states(int64_t state, const Function& function) {
  if (state == 16) return function(std::integral_constant<int, 16>());
  return function(std::integral_constant<int, 0>());
}

template <typename T>
Inputs<T> inputs_of(const lcx::Call& call) {
  const auto at = [&](size_t i) { return call.from<T>(i); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), call.from<bool>(9)};
}

Shape shape_of(const lcx::Call& call, int64_t chunk, int64_t blocks, int64_t given, bool softplus) {
  const auto x = call.dimensions(0);
  const auto has = [given](int bit) { return bool(given >> bit & 1); };
  return {x[0],   x[1],     x[2],   call.dimensions(2).back(), chunk, blocks,
          softplus, has(0), has(1), has(2), has(3), has(4)};
}

template <typename T>
void forward(const lcx::Call& call, const Shape& shape, bool keep) {
  const Inputs<T> in = inputs_of<T>(call);
  T *y = call.to<T>(0), *final = call.to<T>(1), *borders = keep ? call.to<T>(2) : nullptr;
  const int64_t groups = shape.groups(Lanes<T>::count);
  for_states(shape.state, [&](auto known) {
    lcx::in_parallel(call.pool, shape.batch * groups, [&](int64_t task) {
      ForwardGroup<T, decltype(known)::value>(shape, in, y, final, borders, task / groups, task % groups).run();
    });
  });
}

template <typename T>
void backward(const lcx::Call& call, const Shape& shape) {
  const Inputs<T> in = inputs_of<T>(call);
  const auto to = [&](size_t i) { return call.to<T>(i); };
  const Gradients<T> out{to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8)};
  const T *borders = call.from<T>(10), *dy = call.from<T>(11), *d_final = call.from<T>(12);
  const int64_t groups = shape.groups(Lanes<T>::count);
  for_states(shape.state, [&](auto known) {
    lcx::in_parallel(call.pool, shape.batch * groups, [&](int64_t task) {
      BackwardGroup<T, decltype(known)::value>(shape, in, borders, dy, d_final, out, task / groups, task % groups)
          .run();
    });
  });
}

ffi::Error run_forward(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, int64_t chunk,
                       int64_t blocks, int64_t given, bool softplus, bool keep) {
  const lcx::Call call{pool, arguments, results};
  const Shape shape = shape_of(call, chunk, blocks, given, softplus);
  return call.by_dtype([&](auto zero) { forward<decltype(zero)>(call, shape, keep); });
}

ffi::Error run_backward(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, int64_t chunk,
                        int64_t blocks, int64_t given, bool softplus) {
  const lcx::Call call{pool, arguments, results};
  const Shape shape = shape_of(call, chunk, blocks, given, softplus);
  return call.by_dtype([&](auto zero) { backward<decltype(zero)>(call, shape); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_selective_scan_forward, run_forward,
                              lcx::binding()
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("given")
                                  .Attr<bool>("softplus")
                                  .Attr<bool>("keep"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_selective_scan_backward, run_backward,
                              lcx::binding()
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("given")
                                  .Attr<bool>("softplus"));
