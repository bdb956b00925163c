// What the convolutions with mixed kernels share: their sizes, what a kernel's places see, and sums of products.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

// Products, each a number times a vector, are summed in registers: of the most vectors SUMS sums at once, of fewer
// MORE_SUMS.
constexpr int VECTORS = BYTES == 64 ? 4 : 2, SUMS = 6, MORE_SUMS = 8;

struct Sizes {  // in the order in which Python gives them
  int64_t samples, kernels, in_channels, height, width, out_channels, rows, columns, kernel_rows, kernel_columns, down,
      right, above, left, dilation_rows, dilation_columns, planes, in_block, out_block, parts, threads;
};

struct Range {
  int64_t first, last;
  int64_t length() const { return last - first; }
};

// How many parts of at most so many there are, in units.
inline int64_t count_of(int64_t length, int64_t most, int64_t unit = 1) {
  return ((length + unit - 1) / unit * unit + most - 1) / most;
}

// One of so many parts, as equal as can be in units; the last, which may end within a unit, has the most units.
inline Range part_of(int64_t length, int64_t count, int64_t part, int64_t unit = 1) {
  const int64_t units = (length + unit - 1) / unit;
  return {units * part / count * unit, std::min(units * (part + 1) / count * unit, length)};
}

inline std::vector<Range> parts_of(int64_t length, int64_t most, int64_t unit = 1) {
  const int64_t count = count_of(length, most, unit);
  std::vector<Range> parts;
  for (int64_t p = 0; p < count; p++) parts.push_back(part_of(length, count, p, unit));
  return parts;
}

// One place of a kernel: where the output has positions at which it sees a pixel, and where the first of these lies.
struct Tap {
  Range rows, columns;
  int64_t row, column;
};

// The outputs o in [0, outputs) for which o * step + shift is in [0, inputs).
inline Range meeting(int64_t outputs, int64_t inputs, int64_t step, int64_t shift) {
  const int64_t first = shift < 0 ? (-shift + step - 1) / step : 0;
  const int64_t last = shift < inputs ? (inputs - 1 - shift) / step + 1 : 0;
  return {first, std::max(first, std::min(last, outputs))};
}

// Of all places, row by row.
inline std::vector<Tap> taps_of(const Sizes &z) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < z.kernel_rows; i++)
    for (int64_t j = 0; j < z.kernel_columns; j++) {
      const int64_t down = i * z.dilation_rows - z.above, right = j * z.dilation_columns - z.left;
      const Range rows = meeting(z.rows, z.height, z.down, down);
      const Range columns = meeting(z.columns, z.width, z.right, right);
      taps.push_back({rows, columns, rows.first * z.down + down, columns.first * z.right + right});
    }
  return taps;
}

// Numbers, each of which is multiplied with a row of vectors: lines of so many for each sum, and how far one is from
// the next sum's, from the next of the same sum, and from the next line's; and how far ahead of them the cache is
// to fetch, if at all, where they lie side by side.
template <typename Number> struct Numbers {
  const Number *begin;
  int64_t sum, next, line, ahead = 0;
};

// Rows of vectors, which lie so far apart, and so far from the next line's.
template <typename Number> struct Rows {
  const Number *begin;
  int64_t next, line;
};

struct Extent {
  int64_t lines, length, width;
  bool begins;  // whether the sums have no value before
};

// Add to N sums of M vectors, which lie `step` apart; the last one, of so many bytes, may overlap with the one before.
// Unrolled early: otherwise the compiler gives the sums a place in memory too.
template <typename Number, int bytes, int N, int M>
void add_products(Numbers<Number> numbers, Rows<Number> rows, Extent extent, Number *sums, int64_t step) {
  const int64_t end = extent.width - bytes / int64_t(sizeof(Number));
  Vector<Number> total[N][M];
  Vector<Number, bytes> last[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
#pragma GCC unroll 8
    for (int m = 0; m < M - 1; m++)
      total[n][m] = extent.begins ? Vector<Number>{} : load(sums + n * step + m * LANES<Number>);
    last[n] = extent.begins ? Vector<Number, bytes>{} : load<bytes>(sums + n * step + end);
  }
  for (int64_t l = 0; l < extent.lines; l++, numbers.begin += numbers.line, rows.begin += rows.line) {
    const Number *number = numbers.begin, *row = rows.begin;
    for (int64_t i = 0; i < extent.length; i++, number += numbers.next, row += rows.next) {
      if (numbers.ahead && i % LINE<Number> == 0)  // a few at a time, or they would be waited for
        for (int n = 0; n < N; n++) fetch(number + n * numbers.sum, numbers.ahead);
      Vector<Number> vectors[M];
#pragma GCC unroll 8
      for (int m = 0; m < M - 1; m++) vectors[m] = load(row + m * LANES<Number>);
      const auto vector = load<bytes>(row + end);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
#pragma GCC unroll 8
        for (int m = 0; m < M - 1; m++) total[n][m] += number[n * numbers.sum] * vectors[m];
        last[n] += number[n * numbers.sum] * vector;
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
#pragma GCC unroll 8
    for (int m = 0; m < M - 1; m++) store(total[n][m], sums + n * step + m * LANES<Number>);
    store<bytes>(last[n], sums + n * step + end);
  }
}

template <typename Number> using Add = void (*)(Numbers<Number>, Rows<Number>, Extent, Number *, int64_t);

template <typename Number, int bytes, int M, int... N>
Add<Number> of_vectors(int64_t sums, std::integer_sequence<int, N...>) {
  static const Add<Number> all[] = {add_products<Number, bytes, N + 1, M>...};
  return all[sums - 1];
}

template <typename Number, int bytes> Add<Number> of_last(int64_t sums, int64_t vectors) {
  const auto most = std::make_integer_sequence<int, SUMS>();
  const auto more = std::make_integer_sequence<int, MORE_SUMS>();
  if constexpr (VECTORS == 4) {
    if (vectors == 4) return of_vectors<Number, bytes, 4>(sums, most);
    if (vectors == 3) return of_vectors<Number, bytes, 3>(sums, more);
    if (vectors == 2 || bytes < BYTES) return of_vectors<Number, bytes, 2>(sums, more);  // half a vector is not alone
  } else if (vectors == 2) {
    return of_vectors<Number, bytes, 2>(sums, most);
  }
  if constexpr (bytes == BYTES) return of_vectors<Number, bytes, 1>(sums, more);
}

// By how many sums there are, of how many numbers. Some processors multiply half of their widest vectors in half the
// time.
template <typename Number> Add<Number> adding(int64_t sums, int64_t width) {
  const int64_t vectors = (width + LANES<Number> - 1) / LANES<Number>, rest = width % LANES<Number>;
  if constexpr (BYTES == 64)
    if (rest > 0 && rest <= LANES<Number> / 2) return of_last<Number, BYTES / 2>(sums, vectors);
  return of_last<Number, BYTES>(sums, vectors);
}

template <typename Number> int64_t sums_of(int64_t width) {
  return width > (VECTORS - 1) * LANES<Number> ? SUMS : MORE_SUMS;
}

// Mix weights that lie side by side, of kernels that lie `step` apart.
template <typename Number>
ALWAYS_INLINE Vector<Number> mix_vector(const Number *routing, const Number *weight, int64_t kernels, int64_t step) {
  Vector<Number> mixed = {};
  for (int64_t k = 0; k < kernels; k++) mixed += routing[k] * load(weight + k * step);
  return mixed;
}
template <typename Number>
Number mix_one(const Number *routing, const Number *weight, int64_t kernels, int64_t step) {
  Number mixed = 0;
  for (int64_t k = 0; k < kernels; k++) mixed += routing[k] * weight[k * step];
  return mixed;
}
template <typename Number>
void mix_row(const Number *routing, const Number *weight, int64_t kernels, int64_t step, int64_t width,
             Number *mixed) {
  constexpr int64_t lanes = LANES<Number>;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) store(mix_vector(routing, weight + i, kernels, step), mixed + i);
  for (; i < width; i++) mixed[i] = mix_one(routing, weight + i, kernels, step);
}

// Columns that are summed at once, and in how many sums.
struct Columns {
  Range range;
  int64_t sums;
};

template <typename Number> std::vector<Columns> columns_of(int64_t width) {
  std::vector<Columns> columns;
  for (const Range &some : parts_of(width, VECTORS * LANES<Number>, LANES<Number>))
    columns.push_back({some, sums_of<Number>(some.length())});
  return columns;
}

}  // namespace
