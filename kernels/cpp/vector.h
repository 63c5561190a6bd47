// Vectors of 64 bytes, for any instruction set: GCC and Clang cut them into what the machine has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace lcx {

template <typename T>
struct Lanes;

// `exponentials` are the coefficients of 2^r for r between -1/2 and 1/2, from the highest power down.
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Integers __attribute__((vector_size(64)));
  static constexpr int count = 16, mantissa = 23, bias = 127, log_terms = 8;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float lowest = -126, highest = 128;  // between them 2^k is a normal number, or infinity
  // The polynomial of degree 6 with the least relative error, 2e-9.
  static constexpr float exponentials[] = {0.00015345811f, 0.00133999309f, 0.00961848907f, 0.0555032864f,
      0.240226462f, 0.693147182f, 1.0f};
};

template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
  static constexpr int count = 8, mantissa = 52, bias = 1023, log_terms = 18;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -1022, highest = 1024;
  // log(2)^i / i!
  static constexpr double exponentials[] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10, 7.054911620801121e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441, 0.009618129107628477, 0.055504108664821576, 0.2402265069591007,
      0.6931471805599453, 1.0};
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
inline Vector<T> fill(T value) {
  return value - Vector<T>{};
}

// The first `count` lanes from memory, zeros in the others.
template <typename T>
inline Vector<T> load(const T* from, int count) {
  Vector<T> vector{};
  if (count == Lanes<T>::count) {
    std::memcpy(&vector, from, sizeof(vector));
  } else {
    std::memcpy(&vector, from, count * sizeof(T));
  }
  return vector;
}

template <typename T>
inline void store(T* to, Vector<T> vector, int count) {
  if (count == Lanes<T>::count) {
    std::memcpy(to, &vector, sizeof(vector));
  } else {
    std::memcpy(to, &vector, count * sizeof(T));
  }
}

// The sum of all lanes, halves upon halves: the same order on every machine.
template <typename T>
inline T total(Vector<T> vector) {
  T lanes[Lanes<T>::count];
  std::memcpy(lanes, &vector, sizeof(vector));
  for (int half = Lanes<T>::count / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

#ifdef __AVX512F__  // the same halves, which compilers do not find by themselves
template <>
inline float total<float>(Vector<float> vector) {
  return _mm512_reduce_add_ps(vector);
}
template <>
inline double total<double>(Vector<double> vector) {
  return _mm512_reduce_add_pd(vector);
}
#endif

constexpr double kLog2E = 1.4426950408889634074;

// 2^x: the nearest integer goes into the exponent's bits. It is exactly 0 where it would not be a normal number.
template <typename T>
inline Vector<T> exp2(Vector<T> x) {
  using L = Lanes<T>;
  using Integers = typename L::Integers;
  const Vector<T> bounded = x > L::highest ? fill<T>(L::highest) : x;
  const Vector<T> shifted = bounded + L::round;
  const Vector<T> rest = bounded - (shifted - L::round);
  Vector<T> series = fill<T>(L::exponentials[0]);
  for (size_t i = 1; i < sizeof(L::exponentials) / sizeof(T); ++i) series = series * rest + L::exponentials[i];
  const Integers exponent = ((Integers)shifted - (Integers)fill<T>(L::round) + L::bias) << L::mantissa;
  return x < L::lowest ? Vector<T>{} : series * (Vector<T>)exponent;
}

#ifdef __AVX512F__
// The same where one instruction multiplies by a power of two. A maximum with x second lets a NaN through.
template <>
inline Vector<float> exp2<float>(Vector<float> x) {
  using L = Lanes<float>;
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-256), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<float> rest = bounded - whole;
  Vector<float> series = fill<float>(L::exponentials[0]);
  for (size_t i = 1; i < sizeof(L::exponentials) / sizeof(float); ++i) series = series * rest + L::exponentials[i];
  return _mm512_scalef_ps(series, whole);
}
#endif

template <typename T>
inline Vector<T> exp(Vector<T> x) {
  return exp2<T>(x * T(kLog2E));
}

template <typename T>
inline Vector<T> sigmoid(Vector<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// log(1 + e^x). With u = e^-|x| and s = u / (2 + u), log(1 + u) is 2 (s + s^3/3 + s^5/5 + ...), and s is at most 1/3.
template <typename T>
inline Vector<T> softplus(Vector<T> x) {
  using L = Lanes<T>;
  const Vector<T> zero{};
  const Vector<T> u = exp<T>(x > zero ? -x : x);
  const Vector<T> s = u / (u + T(2)), square = s * s;
  Vector<T> series = fill<T>(T(1) / (2 * L::log_terms + 1));
  for (int i = L::log_terms - 1; i >= 0; --i) series = series * square + T(1) / (2 * i + 1);
  return (x > zero ? x : zero) + T(2) * s * series;
}

}  // namespace lcx
