// Convolution of one sample, whose output has few positions, with a kernel that is mixed for it. A weight meets few
// pixels, so to write the mixed kernel to memory and to read it again would take long beside the products. Where the
// positions do not fill a vector, some weights are mixed in a register and multiplied with what each position sees
// there; otherwise those of some output channels are mixed into a near cache and multiplied with vectors of positions.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mixed.h"

namespace {

// Output channels of which weights are mixed at once, and what these see of the input at a time: they are to fit into a
// near cache.
constexpr int64_t BLOCK = 24, DEPTH = 768;
constexpr int VECTOR = 16;  // positions that fill the widest vector, as in Python, which allocates the patches
constexpr int64_t LEAST_SHARED = 1 << 14;  // weights of all kernels: fewer take less time than to wait for threads

template <typename Number> class OneSample {
  static constexpr int LANES = ::LANES<Number>;

  const Sizes &z;
  const std::vector<Tap> taps;
  const int64_t inputs = z.height * z.width, positions = z.rows * z.columns;
  const int64_t count = z.kernel_rows * z.kernel_columns;
  const int64_t length = z.in_channels * count, weights = z.out_channels * length;
  const int64_t deep = std::min(DEPTH, length);
  // Patches lie position by position if these do not fill a vector, otherwise channel by channel, each in whole vectors.
  const bool few = positions < VECTOR;
  const int64_t pitch = few ? positions : (positions + VECTOR - 1) / VECTOR * VECTOR;

 public:
  explicit OneSample(const Sizes &sizes) : z(sizes), taps(taps_of(sizes)) {}

  // `patches` is room for (length, pitch).
  void convolve(const Number *input, const Number *routing, const Number *weight, Number *patches,
                Number *output) const {
    const int64_t threads = weights * z.kernels < LEAST_SHARED ? 1 : z.threads;
    const int64_t rounds = (z.out_channels + threads * BLOCK - 1) / (threads * BLOCK);  // of a block for each thread
    const auto blocks = parts_of(z.out_channels, (z.out_channels + threads * rounds - 1) / (threads * rounds));
    const int64_t tasks = few ? z.out_channels : blocks.size();
    const bool is_product = count == 1 && inputs == positions && z.above + z.left == 0;
    const bool as_it_lies = is_product && (few ? !z.planes || positions == 1 : z.planes && pitch == positions);
    const Number *const seen = as_it_lies ? input : patches;
    const bool direct = z.planes && pitch == positions;
#pragma omp parallel num_threads(threads)
    {
      const int64_t most = few ? 0 : blocks.back().length();
      std::vector<Number> mixed(most * deep), sums(direct ? 0 : most * pitch);
      if (!as_it_lies) {
#pragma omp for
        for (int64_t i = 0; i < z.in_channels; i++) unfold(input, i, patches);
      }
#pragma omp for
      for (int64_t t = 0; t < tasks; t++)
        if (few)
          with_constant<VECTOR - 1>(positions, [&](auto P) { multiply<P>(seen, routing, weight, t, output); });
        else
          multiply_block(seen, routing, weight, blocks[t], mixed.data(), direct ? nullptr : sums.data(), output);
    }
  }

 private:
  // Give what all positions see of a channel.
  void unfold(const Number *input, int64_t channel, Number *patches) const {
    const int64_t pixel = z.planes ? 1 : z.in_channels;
    const int64_t step = few ? length : 1, row_step = z.columns * step;
    input += channel * (z.planes ? inputs : 1), patches += channel * count * (few ? 1 : pitch);
    for (const Tap &tap : taps) {
      if (tap.rows.length() * tap.columns.length() < pitch)
        for (int64_t p = 0; p < pitch; p++) patches[p * step] = 0;
      for (int64_t r = tap.rows.first; r < tap.rows.last; r++) {
        const Number *from = input + ((tap.row + (r - tap.rows.first) * z.down) * z.width + tap.column) * pixel;
        Number *to = patches + r * row_step + tap.columns.first * step;
        for (int64_t c = 0; c < tap.columns.length(); c++) to[c * step] = from[c * z.right * pixel];
      }
      patches += few ? 1 : pitch;
    }
  }

  // Give an output channel at all P positions.
  template <int P>
  void multiply(const Number *patches, const Number *routing, const Number *weight, int64_t channel,
                Number *output) const {
    weight += channel * length;
    Vector<Number> sum[P] = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
      const Vector<Number> mixed = mix_vector(routing, weight + i, z.kernels, weights);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) sum[p] += mixed * load(patches + p * length + i);
    }
    Number rest[P] = {};
    for (; i < length; i++) {
      const Number mixed = mix_one(routing, weight + i, z.kernels, weights);
      for (int p = 0; p < P; p++) rest[p] += mixed * patches[p * length + i];
    }
    for (int p = 0; p < P; p++) {
      output[z.planes ? channel * P + p : p * z.out_channels + channel] = total<Number>(sum[p]) + rest[p];
    }
  }

  // Give some output channels at all positions, by way of `sums`, unless that is null.
  void multiply_block(const Number *patches, const Number *routing, const Number *weight, Range block, Number *mixed,
                      Number *sums, Number *output) const {
    Number *const to = sums ? sums : output + block.first * positions;
    const auto columns = columns_of<Number>(pitch);
    for (const Range &depth : parts_of(length, DEPTH)) {
      for (int64_t o = 0; o < block.length(); o++)
        mix_row(routing, weight + (block.first + o) * length + depth.first, z.kernels, weights, depth.length(),
                mixed + o * deep);
      for (const auto &[some, most] : columns)
        for (int64_t tiles = (block.length() + most - 1) / most, tile = 0, first = 0, last; tile < tiles;
             tile++, first = last) {
          last = block.length() * (tile + 1) / tiles;
          of_last<Number, BYTES>(last - first, some.length() / LANES)(  // in whole vectors
              {mixed + first * deep, deep, 1, 0}, {patches + depth.first * pitch + some.first, pitch, 0},
              {1, depth.length(), some.length(), depth.first == 0}, to + first * pitch + some.first, pitch);
        }
    }
    if (!sums) return;
    if (!z.planes)
      return transpose(sums, pitch, block.length(), positions, output + block.first, z.out_channels);
    for (int64_t o = 0; o < block.length(); o++)
      std::copy_n(sums + o * pitch, positions, output + (block.first + o) * positions);
  }
};

}  // namespace

#define FUNCTIONS(name, Number)                                                                              \
  extern "C" void one_sample_##name(const Sizes *sizes, const Number *input, const Number *routing,          \
                                    const Number *weight, Number *patches, Number *output) {                 \
    OneSample<Number>(*sizes).convolve(input, routing, weight, patches, output);                             \
  }

FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
