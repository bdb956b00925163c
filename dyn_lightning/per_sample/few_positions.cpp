// Convolution of one sample, whose output has few positions, with a kernel that is mixed for it. Each weight meets few
// pixels, so to write the mixed kernel and to read it again would take longest: some weights are mixed in a register,
// multiplied with what they meet at each position, and forgotten.

#include <algorithm>
#include <cstdint>

#include "mixed.h"
#include "vectors.h"

namespace {

constexpr int MOST = 16;  // positions, with a sum in a register for each
constexpr int64_t LEAST_SHARED = 1 << 14;  // weights among threads, for which they would be waited for

// The sum of a vector's lanes, half with half.
template <int bytes, typename Number> Number total(const Number *lanes) {
  constexpr int count = bytes / sizeof(Number) / 2;
  if constexpr (count == 0) return *lanes;
  Number sums[count > 0 ? count : 1];
  for (int i = 0; i < count; i++) sums[i] = lanes[i] + lanes[i + count];
  return total<bytes / 2>(sums);
}

template <typename Number> class FewPositions {
  static constexpr int LANES = ::LANES<Number>;

  const Sizes &z;
  const int64_t positions = z.rows * z.columns, taps = z.kernel_rows * z.kernel_columns;
  const int64_t length = z.in_channels * taps, weights = z.out_channels * length;

 public:
  explicit FewPositions(const Sizes &sizes) : z(sizes) {}

  // `patches` is room for (positions, length).
  void convolve(const Number *input, const Number *routing, const Number *weight, Number *patches,
                Number *output) const {
    const int64_t position_step = z.planes ? 1 : z.out_channels, channel_step = z.planes ? positions : 1;
    const int64_t threads = weights * z.kernels < LEAST_SHARED ? 1 : z.threads;
    with_constant<MOST>(positions, [&](auto P) {
#pragma omp parallel num_threads(threads)
      {
#pragma omp for
        for (int64_t first = 0; first < z.in_channels; first += LANES)
          unfold(input, first, std::min<int64_t>(first + LANES, z.in_channels), patches);
#pragma omp for
        for (int64_t o = 0; o < z.out_channels; o++)
          multiply<P>(patches, routing, weight + o * length, output + o * channel_step, position_step);
      }
    });
  }

 private:
  // Give what all positions see of some channels.
  void unfold(const Number *input, int64_t first, int64_t last, Number *patches) const {
    const int64_t pixel = z.planes ? 1 : z.in_channels, channel = z.planes ? z.height * z.width : 1;
    input += first * channel, patches += first * taps;
    if (z.planes && taps == 1 && z.height * z.width == positions && z.above + z.left == 0)
      return transpose(input, channel, last - first, positions, patches, length);
    for (int64_t r = 0; r < z.rows; r++)
      for (int64_t c = 0; c < z.columns; c++, patches += length) {
        Number *to = patches;
        for (const Number *from = input; from < input + (last - first) * channel; from += channel)
          for (int64_t i = 0, y = r * z.down - z.above; i < z.kernel_rows; i++, y += z.dilation_rows)
            for (int64_t j = 0, x = c * z.right - z.left; j < z.kernel_columns; j++, x += z.dilation_columns)
              *to++ = y >= 0 && y < z.height && x >= 0 && x < z.width ? from[(y * z.width + x) * pixel] : 0;
      }
  }

  // Give an output channel at P positions.
  template <int P>
  void multiply(const Number *patches, const Number *routing, const Number *weight, Number *output,
                int64_t step) const {
    Vector<Number> sum[P] = {};
    int64_t first = 0;
    for (; first + LANES <= length; first += LANES) {
      Vector<Number> mixed = {};
      for (int64_t k = 0; k < z.kernels; k++) mixed += routing[k] * load(weight + k * weights + first);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) sum[p] += mixed * load(patches + p * length + first);
    }
    Number rest[P] = {};
    for (; first < length; first++) {
      Number mixed = 0;
      for (int64_t k = 0; k < z.kernels; k++) mixed += routing[k] * weight[k * weights + first];
      for (int p = 0; p < P; p++) rest[p] += mixed * patches[p * length + first];
    }
    for (int p = 0; p < P; p++) {
      Number lanes[LANES];
      store(sum[p], lanes);
      output[p * step] = total<BYTES>(lanes) + rest[p];
    }
  }
};

}  // namespace

#define FUNCTIONS(name, Number)                                                                                 \
  extern "C" void few_positions_##name(const Sizes *sizes, const Number *input, const Number *routing,          \
                                       const Number *weight, Number *patches, Number *output) {                 \
    FewPositions<Number>(*sizes).convolve(input, routing, weight, patches, output);                             \
  }

FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
