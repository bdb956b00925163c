// Vectors of numbers, as wide as the processor has them.

#pragma once

#include <cstdint>
#include <type_traits>

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

}  // namespace
