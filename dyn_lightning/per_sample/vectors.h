// Vectors of numbers, as wide as the processor has them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace {

// Of the processor's vectors; wider ones would be taken apart by way of the memory.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <typename Number> constexpr int LANES = BYTES / sizeof(Number);
template <typename Number> struct Vectors {
  typedef Number Vector __attribute__((vector_size(BYTES)));
  typedef Number Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(Number)), may_alias));
};
template <typename Number> using Vector = typename Vectors<Number>::Vector;

template <typename Number> using IfNumber = std::enable_if_t<std::is_arithmetic<Number>::value>;

template <typename Number, typename = IfNumber<Number>> inline Vector<Number> load(const Number *from) {
  return *(const typename Vectors<Number>::Unaligned *)from;
}

template <typename Number, typename = IfNumber<Number>> inline void store(Vector<Number> vector, Number *to) {
  *(typename Vectors<Number>::Unaligned *)to = vector;
}

// Call with a number up to `most` as one that the compiler knows.
template <int most, typename Function> inline void with_constant(int64_t number, Function function) {
  if constexpr (most > 1)
    if (number < most) return with_constant<most - 1>(number, function);
  function(std::integral_constant<int, most>());
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES
#endif
#endif

#ifdef HAS_SHUFFLES
// Exchange what lies off the diagonal in squares of twice `step` vectors and lanes; smaller and smaller ones, this
// transposes.
template <typename Number, int step, int... lane>
inline void exchange(Vector<Number> *vectors, std::integer_sequence<int, lane...>) {
  constexpr int count = sizeof...(lane);
  for (int i = 0; i < count; i++)
    if (!(i & step)) {
      const Vector<Number> low = vectors[i], high = vectors[i + step];
      vectors[i] = __builtin_shufflevector(low, high, (lane & step ? count + (lane ^ step) : lane)...);
      vectors[i + step] = __builtin_shufflevector(low, high, (lane & step ? count + lane : lane ^ step)...);
    }
  if constexpr (step > 1) exchange<Number, step / 2>(vectors, std::integer_sequence<int, lane...>());
}
#endif

// Transpose rows, which lie so far apart.
template <typename Number>
void transpose(const Number *from, int64_t from_step, int64_t rows, int64_t columns, Number *to, int64_t to_step) {
  constexpr int lanes = LANES<Number>;
  for (int64_t r = 0; r < rows; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes) {
#ifdef HAS_SHUFFLES
      if (rows >= lanes && columns >= lanes) {  // the last ones overlap with those before
        const int64_t row = std::min(r, rows - lanes), column = std::min(c, columns - lanes);
        Vector<Number> vectors[lanes];
        for (int i = 0; i < lanes; i++) vectors[i] = load(from + (row + i) * from_step + column);
        exchange<Number, lanes / 2>(vectors, std::make_integer_sequence<int, lanes>());
        for (int i = 0; i < lanes; i++) store(vectors[i], to + (column + i) * to_step + row);
        continue;
      }
#endif
      for (int64_t i = r; i < std::min(r + lanes, rows); i++)
        for (int64_t j = c; j < std::min(c + lanes, columns); j++) to[j * to_step + i] = from[i * from_step + j];
    }
}

}  // namespace
