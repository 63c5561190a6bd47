// Attention for CPUs, forward and backward; `cpp_cpu` says what is computed and calls it.
//
// A task has a block of rows, which are the queries of all heads that share a key head: row t * group + g is query t of
// the group's head g. Rows lie along the lanes of vectors, so the softmax over keys goes lane by lane and keys and
// values are read where they are. Blocks of keys that no row of a block sees are skipped (Dao et al. 2022, algorithms 1
// and 4). Powers of two stand for those of e: scores are held times log2(e).

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "handler.h"
#include "parallel.h"
#include "products.h"
#include "vector.h"

namespace {

namespace ffi = xla::ffi;
using lcx::fill;
using lcx::Lanes;
using lcx::load;
using lcx::store;
using lcx::Strided;
using lcx::Vector;

constexpr int64_t kRows = 64;   // of a block
constexpr int64_t kKeys = 128;  // of a block
constexpr int64_t kFew = 4;     // rows up to which each is taken by itself, with its width along the lanes
constexpr double kNoKey = -1e30;

struct Shape {
  int64_t batch, time, keys, heads, kv_heads, width, value_width;
  double scale, softcap;  // softcap 0: none

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return time * group(); }
  int64_t row_blocks() const { return (rows() + kRows - 1) / kRows; }
  int64_t key_blocks() const { return (keys + kKeys - 1) / kKeys; }
};

// Who sees whom: query t sees key j if first[t] <= index[j] <= last[t] and their segments are equal.
struct Sight {
  const int32_t *first, *last, *segment;  // [batch, time]
  const int32_t *index, *key_segment;     // [batch, keys]
};

// What is known of some queries or keys together: between which numbers theirs lie.
struct Range {
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();

  void add(int32_t value) { low = std::min(low, value), high = std::max(high, value); }
};
struct KeyBlock {
  Range index, segment;
};
struct RowBlock {
  Range first, last, segment;

  bool sees_any(const KeyBlock& keys) const {
    return keys.index.low <= last.high && keys.index.high >= first.low && keys.segment.low <= segment.high &&
           keys.segment.high >= segment.low;
  }
  bool sees_all(const KeyBlock& keys) const {
    return keys.index.high <= last.low && keys.index.low >= first.high && segment.low == segment.high &&
           keys.segment.low == keys.segment.high && keys.segment.low == segment.low;
  }
};

std::vector<KeyBlock> key_blocks(const Shape& shape, const Sight& sight) {
  std::vector<KeyBlock> blocks(shape.batch * shape.key_blocks());
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t j = 0; j < shape.keys; ++j) {
      KeyBlock& block = blocks[b * shape.key_blocks() + j / kKeys];
      block.index.add(sight.index[b * shape.keys + j]);
      block.segment.add(sight.key_segment[b * shape.keys + j]);
    }
  }
  return blocks;
}

template <typename T>
struct Arrays {
  const T *q, *k, *v;  // [batch, time, heads, width], [batch, keys, kv_heads, width], [..., value_width]
  Sight sight;
};

// The place of one key head in the arrays.
template <typename T>
struct Head {
  const Shape& shape;
  const int64_t batch, kv_head;

  int64_t row(int64_t row, int64_t width) const {  // of arrays [batch, time, heads, width]
    const int64_t t = row / shape.group(), g = row % shape.group();
    return ((batch * shape.time + t) * shape.heads + kv_head * shape.group() + g) * width;
  }
  int64_t key(int64_t key, int64_t width) const {  // of arrays [batch, keys, kv_heads, width]
    return ((batch * shape.keys + key) * shape.kv_heads + kv_head) * width;
  }
  Strided<T> keys(const T* array, int64_t begin, int64_t width) const {
    return {array + key(begin, width), shape.kv_heads * width, 1};
  }
  Strided<T> keys_across(const T* array, int64_t begin, int64_t width) const {
    return {array + key(begin, width), 1, shape.kv_heads * width};
  }
};

// A block of rows: what they see, and their arrays with the rows along the lanes.
template <typename T>
struct Rows {
  const Shape& shape;
  const Head<T> head;
  const Sight& sight;
  const int64_t begin, count;
  RowBlock range;
  int32_t first[kRows], last[kRows], segment[kRows];

  Rows(const Shape& shape, const Head<T>& head, const Sight& sight, int64_t block)
      : shape(shape), head(head), sight(sight), begin(block * kRows), count(std::min(kRows, shape.rows() - begin)) {
    for (int64_t i = 0; i < kRows; ++i) {  // those beyond the last are as the last
      const int64_t at = head.batch * shape.time + (begin + std::min(i, count - 1)) / shape.group();
      first[i] = sight.first[at], last[i] = sight.last[at], segment[i] = sight.segment[at];
      range.first.add(first[i]), range.last.add(last[i]), range.segment.add(segment[i]);
    }
  }

  // [width, kRows] from [batch, time, heads, width], zeros beyond the last row.
  void lay_across(const T* from, int64_t width, T factor, T* to) const {
    for (int64_t i = 0; i < kRows; ++i) {
      const T* row = from + head.row(begin + std::min(i, count - 1), width);
      for (int64_t k = 0; k < width; ++k) to[k * kRows + i] = i < count ? factor * row[k] : T(0);
    }
  }
  // [kRows, width] likewise.
  void lay_along(const T* from, int64_t width, T factor, T* to) const {
    for (int64_t i = 0; i < kRows; ++i) {
      const T* row = from + head.row(begin + std::min(i, count - 1), width);
      for (int64_t k = 0; k < width; ++k) to[i * width + k] = i < count ? factor * row[k] : T(0);
    }
  }
  // Back to [batch, time, heads, width], each row times its factor.
  void put_back(const T* from, int64_t width, const T* factors, T* to) const {
    for (int64_t i = 0; i < count; ++i) {
      T* row = to + head.row(begin + i, width);
      for (int64_t k = 0; k < width; ++k) row[k] = from[k * kRows + i] * factors[i];
    }
  }

  // Scores [keys, kRows] of a block of keys, times log2(e), minus infinity where a row does not see a key.
  void scores(const T* k, const T* q_across, int64_t from, int64_t keys, bool all, T* to) const {
    lcx::product<T, false>(keys, kRows, shape.width, head.keys(k, from, shape.width), q_across, kRows, to, kRows);
    if (shape.softcap) {
      const T cap = T(shape.softcap), twice = T(2 * lcx::kLog2E) / cap;
      for (int64_t i = 0; i < keys * kRows; i += Lanes<T>::count) {
        const Vector<T> score = load<T>(to + i, Lanes<T>::count);
        const Vector<T> tanh = T(1) - T(2) / (lcx::exp2<T>(score * twice) + T(1));
        store<T>(to + i, tanh * (cap * T(lcx::kLog2E)), Lanes<T>::count);
      }
    }
    if (all) return;
    const int32_t* index = sight.index + head.batch * shape.keys + from;
    const int32_t* key_segment = sight.key_segment + head.batch * shape.keys + from;
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < kRows; ++i) {
        const bool seen = (index[j] >= first[i]) & (index[j] <= last[i]) & (key_segment[j] == segment[i]);
        to[j * kRows + i] = seen ? to[j * kRows + i] : -std::numeric_limits<T>::infinity();
      }
    }
  }
  // What q is multiplied by, so that `scores` come out as they should.
  T query_factor() const { return T(shape.softcap ? shape.scale : shape.scale * lcx::kLog2E); }
};

// Numbers that are whole vectors, where a cache line begins; zeros at first.
template <typename T>
struct Memory {
  std::vector<Vector<T>> vectors;

  explicit Memory(int64_t count) : vectors((count + Lanes<T>::count - 1) / Lanes<T>::count) {}
  T* data() { return reinterpret_cast<T*>(vectors.data()); }
};

template <typename T>
struct Results {
  T *out, *log_sum_exp;
};

template <typename T>
T log_sum_exp_of(T maximum, T total) {
  return total > 0 ? (maximum + std::log2(total)) * T(1 / lcx::kLog2E) : total == 0 ? T(kNoKey) : total;
}

template <typename T>
void forward_rows(const Shape& shape, const Arrays<T>& in, const KeyBlock* blocks, const Head<T>& head, int64_t block,
                  const Results<T>& results) {
  constexpr int lanes = Lanes<T>::count, vectors = kRows / lanes;
  const Rows<T> rows(shape, head, in.sight, block);
  Memory<T> memory((shape.width + shape.value_width + kKeys) * kRows);
  T *q = memory.data(), *out = q + shape.width * kRows, *scores = out + shape.value_width * kRows;
  rows.lay_across(in.q, shape.width, rows.query_factor(), q);
  Vector<T> maximum[vectors], total[vectors];
  std::fill(maximum, maximum + vectors, fill<T>(T(kNoKey)));
  std::fill(total, total + vectors, Vector<T>{});
  for (int64_t number = 0; number < shape.key_blocks(); ++number) {
    if (!rows.range.sees_any(blocks[number])) continue;
    const int64_t from = number * kKeys, keys = std::min(kKeys, shape.keys - from);
    rows.scores(in.k, q, from, keys, rows.range.sees_all(blocks[number]), scores);
    Vector<T> rescale[vectors];
    for (int v = 0; v < vectors; ++v) {
      Vector<T> highest = maximum[v], sum{};
      for (int64_t j = 0; j < keys; ++j) {
        const Vector<T> score = load<T>(scores + j * kRows + v * lanes, lanes);
        highest = score > highest ? score : highest;
      }
      for (int64_t j = 0; j < keys; ++j) {
        T* place = scores + j * kRows + v * lanes;
        const Vector<T> weight = lcx::exp2<T>(load<T>(place, lanes) - highest);
        store<T>(place, weight, lanes);
        sum += weight;
      }
      rescale[v] = lcx::exp2<T>(maximum[v] - highest);
      total[v] = total[v] * rescale[v] + sum;
      maximum[v] = highest;
    }
    for (int64_t k = 0; k < shape.value_width; ++k) {
      for (int v = 0; v < vectors; ++v) {
        T* place = out + k * kRows + v * lanes;
        store<T>(place, load<T>(place, lanes) * rescale[v], lanes);
      }
    }
    lcx::product<T, true>(shape.value_width, kRows, keys, head.keys_across(in.v, from, shape.value_width), scores,
                          kRows, out, kRows);
  }
  T highest[kRows], sums[kRows], shares[kRows];
  std::memcpy(highest, maximum, sizeof(highest));
  std::memcpy(sums, total, sizeof(sums));
  for (int64_t i = 0; i < rows.count; ++i) {
    shares[i] = sums[i] == 0 ? T(1) : 1 / sums[i];
    results.log_sum_exp[head.row(rows.begin + i, 1)] = log_sum_exp_of(highest[i], sums[i]);
  }
  rows.put_back(out, shape.value_width, shares, results.out);
}

// One row by itself, as in decoding: its width lies along the lanes, and each key and value is read once.
template <typename T>
void forward_few(const Shape& shape, const Arrays<T>& in, const KeyBlock* blocks, const Head<T>& head, int64_t row,
                 const Results<T>& results) {
  constexpr int lanes = Lanes<T>::count;
  const int64_t at = head.batch * shape.time + row / shape.group();
  const int32_t first = in.sight.first[at], last = in.sight.last[at], segment = in.sight.segment[at];
  RowBlock range;
  range.first.add(first), range.last.add(last), range.segment.add(segment);
  const T* q = in.q + head.row(row, shape.width);
  const T factor = T(shape.scale * lcx::kLog2E), cap = T(shape.softcap);
  Memory<T> memory(shape.value_width + kKeys);
  T *sums = memory.data(), *scores = sums + shape.value_width, highest = T(kNoKey), total = 0;
  for (int64_t number = 0; number < shape.key_blocks(); ++number) {
    if (!range.sees_any(blocks[number])) continue;
    const int64_t from = number * kKeys, keys = std::min(kKeys, shape.keys - from);
    T block_highest = highest;
    for (int64_t j = 0; j < keys; ++j) {
      const T* key = in.k + head.key(from + j, shape.width);
      Vector<T> products{};
      for (int64_t k = 0; k < shape.width; k += lanes) products += load<T>(q + k, lanes) * load<T>(key + k, lanes);
      T score = lcx::total<T>(products) * factor;
      if (shape.softcap) score = cap * std::tanh(score / (cap * T(lcx::kLog2E))) * T(lcx::kLog2E);
      const int64_t place = head.batch * shape.keys + from + j;
      const int32_t index = in.sight.index[place];
      const bool seen = index >= first && index <= last && in.sight.key_segment[place] == segment;
      scores[j] = seen ? score : -std::numeric_limits<T>::infinity();
      block_highest = scores[j] > block_highest ? scores[j] : block_highest;
    }
    const T rescale = std::exp2(highest - block_highest);
    highest = block_highest;
    std::fill(scores + keys, scores + kKeys, -std::numeric_limits<T>::infinity());
    Vector<T> sum{};
    for (int64_t j = 0; j < kKeys; j += lanes) {
      const Vector<T> weights = lcx::exp2<T>(load<T>(scores + j, lanes) - highest);
      store<T>(scores + j, weights, lanes);
      sum += weights;
    }
    total = total * rescale + lcx::total<T>(sum);
    for (int64_t k = 0; k < shape.value_width; ++k) sums[k] *= rescale;
    lcx::product<T, true>(1, shape.value_width, keys, {scores, 0, 1}, in.v + head.key(from, shape.value_width),
                          shape.kv_heads * shape.value_width, sums, shape.value_width);
  }
  results.log_sum_exp[head.row(row, 1)] = log_sum_exp_of(highest, total);
  T* out = results.out + head.row(row, shape.value_width);
  for (int64_t k = 0; k < shape.value_width; ++k) out[k] = sums[k] / (total == 0 ? T(1) : total);
}

template <typename T>
struct Cotangents {
  const T *log_sum_exp, *d_out, *delta;  // [batch, time, heads] but for d_out, as of `api.attention_gradients`
};

template <typename T>
struct Gradients {
  T *q, *k, *v;  // of k and v the sums begin at 0
};

template <typename T>
void backward_rows(const Shape& shape, const Arrays<T>& in, const Cotangents<T>& given, const KeyBlock* blocks,
                   const Head<T>& head, int64_t block, Memory<T>& memory, const Gradients<T>& out) {
  constexpr int lanes = Lanes<T>::count, vectors = kRows / lanes;
  const int64_t width = shape.width, value_width = shape.value_width;
  const Rows<T> rows(shape, head, in.sight, block);
  T *q = memory.data(), *q_along = q + width * kRows, *dq = q_along + width * kRows, *d_out = dq + width * kRows;
  T *d_out_along = d_out + value_width * kRows, *weights = d_out_along + value_width * kRows;
  T* d_scores = weights + kKeys * kRows;
  rows.lay_across(in.q, width, rows.query_factor(), q);
  rows.lay_along(in.q, width, T(shape.scale), q_along);
  rows.lay_across(given.d_out, value_width, T(1), d_out);
  rows.lay_along(given.d_out, value_width, T(1), d_out_along);
  std::fill(dq, dq + width * kRows, T(0));
  T log_sums[kRows], deltas[kRows];
  for (int64_t i = 0; i < kRows; ++i) {  // of a row that is none, all weights are 0
    const int64_t at = head.row(rows.begin + std::min(i, rows.count - 1), 1);
    log_sums[i] = i < rows.count ? given.log_sum_exp[at] * T(lcx::kLog2E) : std::numeric_limits<T>::infinity();
    deltas[i] = i < rows.count ? given.delta[at] : T(0);
  }
  for (int64_t number = 0; number < shape.key_blocks(); ++number) {
    if (!rows.range.sees_any(blocks[number])) continue;
    const int64_t from = number * kKeys, keys = std::min(kKeys, shape.keys - from);
    rows.scores(in.k, q, from, keys, rows.range.sees_all(blocks[number]), weights);
    lcx::product<T, false>(keys, kRows, value_width, head.keys(in.v, from, value_width), d_out, kRows, d_scores,
                           kRows);
    for (int64_t j = 0; j < keys; ++j) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = j * kRows + v * lanes;
        const Vector<T> score = load<T>(weights + at, lanes);
        const Vector<T> weight = lcx::exp2<T>(score - load<T>(log_sums + v * lanes, lanes));
        Vector<T> slope = weight * (load<T>(d_scores + at, lanes) - load<T>(deltas + v * lanes, lanes));
        if (shape.softcap) {
          const Vector<T> share = score * T(1 / (shape.softcap * lcx::kLog2E));
          slope *= T(1) - share * share;
        }
        slope = weight == T(0) ? Vector<T>{} : slope;  // by selection: what is not seen may be infinite
        store<T>(weights + at, weight, lanes);
        store<T>(d_scores + at, slope, lanes);
      }
    }
    lcx::product<T, true>(width, kRows, keys, head.keys_across(in.k, from, width), d_scores, kRows, dq, kRows);
    lcx::product<T, true>(keys, width, kRows, {d_scores, kRows, 1}, q_along, width, out.k + head.key(from, width),
                          shape.kv_heads * width);
    lcx::product<T, true>(keys, value_width, kRows, {weights, kRows, 1}, d_out_along, value_width,
                          out.v + head.key(from, value_width), shape.kv_heads * value_width);
  }
  T factors[kRows];
  std::fill(factors, factors + kRows, T(shape.scale));
  rows.put_back(dq, width, factors, out.q);
}

Shape shape_of(const lcx::Call& call, double scale, double softcap) {
  const auto q = call.dimensions(0), v = call.dimensions(2);
  return {q[0], q[1], v[1], q[2], v[2], q[3], v[3], scale, softcap};
}

template <typename T>
Arrays<T> arrays_of(const lcx::Call& call) {
  const auto at = [&](size_t i) { return call.from<T>(i); };
  const auto integers = [&](size_t i) { return call.from<int32_t>(i); };
  return {at(0), at(1), at(2), {integers(3), integers(4), integers(5), integers(6), integers(7)}};
}

template <typename T>
void forward(const lcx::Call& call, const Shape& shape) {
  const Arrays<T> in = arrays_of<T>(call);
  const Results<T> out{call.to<T>(0), call.to<T>(1)};
  const std::vector<KeyBlock> blocks = key_blocks(shape, in.sight);
  const bool few = shape.rows() <= kFew;
  const int64_t parts = few ? shape.rows() : shape.row_blocks(), heads = shape.batch * shape.kv_heads;
  lcx::in_parallel(call.pool, parts * heads, [&](int64_t task) {
    const int64_t part = parts - 1 - task / heads;  // the last ones first: causal rows see the more the later
    const Head<T> head{shape, task % heads / shape.kv_heads, task % shape.kv_heads};
    const KeyBlock* of_row = blocks.data() + head.batch * shape.key_blocks();
    (few ? forward_few<T> : forward_rows<T>)(shape, in, of_row, head, part, out);
  });
}

template <typename T>
void backward(const lcx::Call& call, const Shape& shape) {
  const Arrays<T> in = arrays_of<T>(call);
  const Cotangents<T> given{call.from<T>(8), call.from<T>(9), call.from<T>(10)};
  const Gradients<T> out{call.to<T>(0), call.to<T>(1), call.to<T>(2)};
  const std::vector<KeyBlock> blocks = key_blocks(shape, in.sight);
  lcx::in_parallel(call.pool, shape.batch * shape.kv_heads, [&](int64_t task) {
    const Head<T> head{shape, task / shape.kv_heads, task % shape.kv_heads};
    for (int64_t j = 0; j < shape.keys; ++j) {
      std::fill_n(out.k + head.key(j, shape.width), shape.width, T(0));
      std::fill_n(out.v + head.key(j, shape.value_width), shape.value_width, T(0));
    }
    Memory<T> memory((3 * shape.width + 2 * shape.value_width + 2 * kKeys) * kRows);
    const KeyBlock* of_row = blocks.data() + head.batch * shape.key_blocks();
    for (int64_t block = 0; block < shape.row_blocks(); ++block) {
      backward_rows<T>(shape, in, given, of_row, head, block, memory, out);
    }
  });
}

ffi::Error run_forward(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, double scale,
                       double softcap) {
  const lcx::Call call{pool, arguments, results};
  const Shape shape = shape_of(call, scale, softcap);
  return call.by_dtype([&](auto zero) { forward<decltype(zero)>(call, shape); });
}

ffi::Error run_backward(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, double scale,
                        double softcap) {
  const lcx::Call call{pool, arguments, results};
  const Shape shape = shape_of(call, scale, softcap);
  return call.by_dtype([&](auto zero) { backward<decltype(zero)>(call, shape); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_attention_forward, run_forward,
                              lcx::binding().Attr<double>("scale").Attr<double>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lcx_attention_backward, run_backward,
                              lcx::binding().Attr<double>("scale").Attr<double>("softcap"));
