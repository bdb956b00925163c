// Vectors of numbers, as wide as the processor has them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

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
template <typename Number> constexpr int LINE = 64 / sizeof(Number);  // of the cache
template <typename Number, int bytes = BYTES> struct Vectors {
  typedef Number Vector __attribute__((vector_size(bytes)));
  typedef Number Unaligned __attribute__((vector_size(bytes), aligned(sizeof(Number)), may_alias));
};
template <typename Number, int bytes = BYTES> using Vector = typename Vectors<Number, bytes>::Vector;

// Memory that begins with a line of the cache, or each vector would lie in two.
template <typename Number> struct InLines {
  using value_type = Number;
  InLines() = default;
  template <typename Other> InLines(const InLines<Other> &) {}
  Number *allocate(size_t count) { return (Number *)::operator new(count * sizeof(Number), std::align_val_t(64)); }
  void deallocate(Number *memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
  bool operator==(const InLines &) const { return true; }
  bool operator!=(const InLines &) const { return false; }
};
template <typename Number> using Buffer = std::vector<Number, InLines<Number>>;

template <typename Number> using IfNumber = std::enable_if_t<std::is_arithmetic<Number>::value>;

template <int bytes = BYTES, typename Number, typename = IfNumber<Number>>
inline Vector<Number, bytes> load(const Number *from) {
  return *(const typename Vectors<Number, bytes>::Unaligned *)from;
}

template <int bytes = BYTES, typename Number, typename = IfNumber<Number>>
inline void store(Vector<Number, bytes> vector, Number *to) {
  *(typename Vectors<Number, bytes>::Unaligned *)to = vector;
}

// The sum of a vector's lanes, half with half: lane by lane it would take longer than all products of a small map.
template <typename Number> inline Number total(Vector<Number> vector) {
  typedef Number Part __attribute__((vector_size(16)));
  Part parts[BYTES / 16];
  std::memcpy(parts, &vector, BYTES);
  for (int half = BYTES / 32; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  Number sum = 0;
  for (size_t lane = 0; lane < 16 / sizeof(Number); lane++) sum += parts[0][lane];
  return sum;
}

template <typename Number> inline void assign(Number from, Number &to) { to = from; }

struct BFloat16 {
  uint16_t bits;
};

typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

inline Vector<float> load(const BFloat16 *from) {
  return (Vector<float>)(__builtin_convertvector(*(const UnalignedHalves *)from, Bits) << 16);
}

inline void store(Vector<float> vector, BFloat16 *to) {
  const Bits bits = (Bits)vector, is_nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
  *(UnalignedHalves *)to = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Halves);
}

inline void assign(BFloat16 from, float &to) {
  const uint32_t bits = uint32_t(from.bits) << 16;
  std::memcpy(&to, &bits, 4);
}

inline void assign(float from, BFloat16 &to) {
  uint32_t bits;
  std::memcpy(&bits, &from, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

// What pixels are computed in.
template <typename Pixel> struct Computed { using Number = Pixel; };
template <> struct Computed<BFloat16> { using Number = float; };

// Also for what only fetches: the compiler takes a call that is left for one without an effect.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

// Have a vector that is multiplied several times loaded once: the compiler would rather load it each time, and finds no
// registers for the addresses.
template <typename Vector> ALWAYS_INLINE void keep(Vector &vector) {
#ifdef __AVX512F__  // which has 32 registers
  asm("" : "+v"(vector));
#endif
}

// Let the cache fetch what lies so many pixels further: by number, since it may be beyond the end.
template <typename Pixel> ALWAYS_INLINE void fetch(const Pixel *from, int64_t ahead) {
  __builtin_prefetch((const void *)(uintptr_t(from) + ahead * sizeof(Pixel)), 0, 2);
}

// Let the cache fetch what lies side by side, so far from where a row begins, or several.
template <typename Number> ALWAYS_INLINE void fetch_row(const Number *row, int64_t ahead, int64_t length) {
  for (int64_t i = 0; i < length; i += LINE<Number>) fetch(row, ahead + i);
}
template <typename Number>
ALWAYS_INLINE void fetch_rows(const Number *row, int64_t ahead, int64_t rows, int64_t step, int64_t length) {
  for (int64_t r = 0; r < rows; r++) fetch_row(row, ahead + r * step, length);
}

struct Nothing {
  void operator()() const {}
};

// Lets the cache fetch the maps that are computed next, a little with each step of what is computed now: only few lines
// can be on their way at once, so that neither memory nor products are waited for.
class Ahead {
  struct Map {
    uintptr_t at, goal;
    int64_t bytes;  // with each step
  } maps[3];
  int64_t count = 0, steps = 0, expected = 0;

 public:
  // Begin to compute, in as many steps as the last time.
  void begin() { count = 0, expected = steps, steps = 0; }

  // Have so many numbers fetched, which lie so far ahead in a map or beyond its end.
  template <typename Pixel> void add(const Pixel *map, int64_t ahead, int64_t numbers) {
    const uintptr_t at = uintptr_t(map) + ahead * sizeof(Pixel);
    if (expected) maps[count++] = {at, at, int64_t(numbers * sizeof(Pixel)) / expected + 1};
  }

  void step() {
    steps++;
    for (int64_t m = 0; m < count; m++)
      for (maps[m].goal += maps[m].bytes; maps[m].at < maps[m].goal; maps[m].at += 64) fetch((char *)maps[m].at, 0);
  }
};

// To be called with each step; of one type, since what is called with it is compiled for each type.
struct AheadStep {
  Ahead &ahead;
  void operator()() const { ahead.step(); }
};

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

struct InOrder {
  int64_t operator()(int64_t column) const { return column; }
};

// Transpose rows, which lie so far apart, and let the cache fetch what lies `ahead` of what is read, or written, too.
// `place` says which row a column becomes; `each` is called with each square of as many rows as a vector has lanes.
template <bool fetches_from = false, bool fetches_to = false, typename From, typename To, typename Place = InOrder,
          typename Each = Nothing>
void transpose(const From *from, int64_t from_step, int64_t rows, int64_t columns, To *to, int64_t to_step,
               int64_t ahead = 0, Place place = Place(), Each each = Each()) {
  using Number = typename Computed<From>::Number;
  constexpr int lanes = LANES<Number>;
  for (int64_t r = 0; r < rows; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes) {
      each();
#ifdef HAS_SHUFFLES
      if (rows >= lanes && columns >= lanes) {  // the last ones overlap with those before
        const int64_t row = std::min(r, rows - lanes), column = std::min(c, columns - lanes);
        Vector<Number> vectors[lanes];
        for (int i = 0; i < lanes; i++) {
          const From *const read = from + (row + i) * from_step + column;
          if (fetches_from) fetch(read, ahead);
          vectors[i] = load(read);
        }
        exchange<Number, lanes / 2>(vectors, std::make_integer_sequence<int, lanes>());
        for (int i = 0; i < lanes; i++) {
          To *const written = to + place(column + i) * to_step + row;
          if (fetches_to) fetch(written, ahead);
          store(vectors[i], written);
        }
        continue;
      }
#endif
      for (int64_t i = r; i < std::min(r + lanes, rows); i++)
        for (int64_t j = c; j < std::min(c + lanes, columns); j++)
          assign(from[i * from_step + j], to[place(j) * to_step + i]);
    }
}

}  // namespace
