// Products of small matrices that lie in a core's caches.
#pragma once

#include "vector.h"

namespace lcx {

#ifdef __AVX512F__
constexpr int kTileVectors = 4;  // a tile of 6 rows of so many vectors fills the registers
#else
constexpr int kTileVectors = 1;
#endif
constexpr int kTileRows = 6;

// A matrix whose element (row, column) is data[row * row_step + column * column_step].
template <typename T>
struct Strided {
  const T* data;
  int64_t row_step, column_step;

  const T* at(int64_t row) const { return data + row * row_step; }
};

template <typename T, int kRows, int kVectors, bool kAdd>
inline void product_tile(int64_t depth, const T* a, int64_t row_step, int64_t column_step, const T* b, int64_t b_step,
                         T* c, int64_t c_step) {
  constexpr int lanes = Lanes<T>::count;
  Vector<T> sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = kAdd ? load<T>(c + row * c_step + v * lanes, lanes) : Vector<T>{};
    }
  }
  for (int64_t s = 0; s < depth; ++s) {
    Vector<T> of_b[kVectors];
    for (int v = 0; v < kVectors; ++v) of_b[v] = load<T>(b + s * b_step + v * lanes, lanes);
    for (int row = 0; row < kRows; ++row) {
      const Vector<T> of_a = fill<T>(a[row * row_step + s * column_step]);
      for (int v = 0; v < kVectors; ++v) sums[row][v] += of_a * of_b[v];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) store<T>(c + row * c_step + v * lanes, sums[row][v], lanes);
  }
}

template <typename T, int kVectors, bool kAdd>
inline void product_columns(int64_t rows, int64_t depth, Strided<T> a, const T* b, int64_t b_step, T* c,
                            int64_t c_step) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    product_tile<T, kTileRows, kVectors, kAdd>(depth, a.at(row), a.row_step, a.column_step, b, b_step,
                                               c + row * c_step, c_step);
  }
  for (; row < rows; ++row) {
    product_tile<T, 1, kVectors, kAdd>(depth, a.at(row), a.row_step, a.column_step, b, b_step, c + row * c_step,
                                       c_step);
  }
}

// C = A B, or C += A B: A [rows, depth], B [depth, columns] and C [rows, columns], columns whole vectors.
template <typename T, bool kAdd>
inline void product(int64_t rows, int64_t columns, int64_t depth, Strided<T> a, const T* b, int64_t b_step, T* c,
                    int64_t c_step) {
  constexpr int lanes = Lanes<T>::count;
  int64_t column = 0;
  for (; column + kTileVectors * lanes <= columns; column += kTileVectors * lanes) {
    product_columns<T, kTileVectors, kAdd>(rows, depth, a, b + column, b_step, c + column, c_step);
  }
  for (; column < columns; column += lanes) {
    product_columns<T, 1, kAdd>(rows, depth, a, b + column, b_step, c + column, c_step);
  }
}

}  // namespace lcx
