// Products of the pixels of maps that lie channel by channel with kernels of one weight, mixed for each sample, and
// their gradients. Where a pixel meets few weights, all depends on how maps come from memory and go there: the kernel
// is mixed into a near cache, the pixels are multiplied as they lie, and the next ones are fetched meanwhile. A channel
// has at least four vectors of pixels.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "mixed.h"

namespace {

// Channels and pixels that are multiplied at once, which are to fit into near caches; of planes that are larger than a
// page fewer channels, so that the processor has their addresses at hand.
constexpr int64_t CHANNELS = 64, FEWER_CHANNELS = 32, PAGE = 4096, PIXELS = 128;
constexpr int64_t WEIGHTS = 1 << 16;  // that are mixed at once, to fit into the next cache

template <typename Number> class Products {
  static constexpr int LANES = ::LANES<Number>;
  using Vector = ::Vector<Number>;

  // Channels of a map that is read, and of one that is written or read too; and pixels of both.
  struct Block {
    Range deep, wide, pixels;
  };

  // Lets the cache fetch some channels' pixels, a few lines with each of so many steps; the channels may lie beyond the
  // map's end.
  class Fetching {
    uintptr_t row;
    const int64_t bytes;
    int64_t rows, at = 0;
    const int64_t pitch, lines;  // with each step

   public:
    Fetching(const Number *map, int64_t first, Range channels, Range some, int64_t pixels, int64_t steps)
        : row(uintptr_t(map) + ((first + channels.first) * pixels + some.first) * sizeof(Number)),
          bytes(some.length() * sizeof(Number)), rows(channels.length()), pitch(pixels * sizeof(Number)),
          lines(rows * ((bytes + 63) / 64) / steps + 1) {}

    void step() {
      for (int64_t l = 0; l < lines && rows > 0; l++) {
        fetch((const char *)row, at);
        if ((at += 64) >= bytes) at = 0, row += pitch, rows--;
      }
    }
  };

  const Sizes &z;
  const int64_t pixels = z.height * z.width, weights = z.in_channels * z.out_channels;
  const int64_t channels = pixels * int64_t(sizeof(Number)) < PAGE ? CHANNELS : FEWER_CHANNELS;

 public:
  explicit Products(const Sizes &sizes) : z(sizes) {}

  // From input to output, or back from the output's gradient to the input's.
  void convolve(const Number *from, const Number *routing, const Number *weight, Number *to, bool back) const {
    const int64_t deep = back ? z.out_channels : z.in_channels, wide = back ? z.in_channels : z.out_channels;
    // There must be parts enough for all threads.
    const int64_t shares = z.samples < z.threads ? z.threads / std::gcd(z.samples, z.threads) : 1;
    const auto parts = parts_of(wide, std::max<int64_t>(1, std::min(WEIGHTS / deep, (wide + shares - 1) / shares)));
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> kernel(deep * parts.back().length());
#pragma omp for collapse(2)
      for (int64_t s = 0; s < z.samples; s++)
        for (size_t p = 0; p < parts.size(); p++) {
          mix(routing + s * z.kernels, weight, parts[p], back, kernel.data());
          const Numbers<Number> numbers = {kernel.data(), back ? 1 : deep, back ? parts[p].length() : 1, 0};
          const bool ends = p + 1 == parts.size();
          const int64_t channel = s * wide + parts[p].first;
          const int64_t next_sample = s + ends, next_channel = next_sample * wide + parts[ends ? 0 : p + 1].first;
          for_blocks(parts[p].length(), deep, [&](const Block &block, const Block &next, bool last) {
            const int64_t steps = count_of(block.wide.length(), SUMS) * runs_of(block);
            Fetching read(from, (last ? next_sample : s) * deep, next.deep, next.pixels, pixels, steps);
            Fetching written(to, last ? next_channel : channel, next.wide, next.pixels, pixels, steps);
            add_up(from + s * deep * pixels, numbers, block, to + channel * pixels,
                   [&] { read.step(), written.step(); });
          });
        }
    }
  }

  // Gives (blocks of the output channels, samples, kernels), to be summed over the blocks, and, unless that is null,
  // (parts, kernels, out_channels, in_channels), to be summed over the parts of the samples.
  void differentiate(const Number *grad, const Number *input, const Number *routing, const Number *weight,
                     Number *routing_grad, Number *weight_grad) const {
    const auto samples = parts_of(z.samples, std::max<int64_t>(1, (z.samples + z.parts - 1) / z.parts));
    const auto blocks = parts_of(z.out_channels, z.out_block);
#pragma omp parallel for collapse(2) num_threads(z.threads)
    for (int64_t part = 0; part < z.parts; part++)
      for (size_t b = 0; b < blocks.size(); b++) {
        const Range these = blocks[b];
        const int64_t size = these.length() * z.in_channels, first = these.first * z.in_channels;
        Number *const sums = weight_grad ? weight_grad + part * z.kernels * weights + first : nullptr;
        for (int64_t k = 0; sums && k < z.kernels; k++) std::fill_n(sums + k * weights, size, Number(0));
        if (part >= int64_t(samples.size())) continue;
        std::vector<Vector> totals(size);
        std::vector<Number> kernel(size);
        for (int64_t s = samples[part].first; s < samples[part].last; s++) {
          std::fill(totals.begin(), totals.end(), Vector{});
          for_blocks(these.length(), z.in_channels, [&](const Block &block, const Block &next, bool last) {
            const int64_t steps = count_of(block.wide.length(), SUMS) * count_of(block.deep.length(), VECTORS);
            const int64_t in = z.in_channels, out = z.out_channels;
            Fetching read(input, (s + last) * in, next.deep, next.pixels, pixels, steps);
            Fetching read_too(grad, (s + last) * out + these.first, next.wide, next.pixels, pixels, steps);
            multiply(input + s * in * pixels, grad + (s * out + these.first) * pixels, block, totals.data(),
                     [&] { read.step(), read_too.step(); });
          });
          for (int64_t w = 0; w < size; w++) kernel[w] = total<Number>(totals[w]);
          unmix(kernel.data(), size, routing + s * z.kernels, weight + first,
                routing_grad + (b * z.samples + s) * z.kernels, sums);
        }
      }
  }

 private:
  // Call with each block of a sample's maps, the one after, which may be the next sample's, and whether it is.
  template <typename Function> void for_blocks(int64_t wide, int64_t deep, Function function) const {
    const int64_t widths = count_of(wide, channels), depths = count_of(deep, channels);
    const int64_t runs = count_of(pixels, PIXELS, LANES), count = widths * depths * runs;
    const auto block_of = [&](int64_t b) -> Block {
      return {part_of(deep, depths, b / runs % depths), part_of(wide, widths, b / runs / depths),
              part_of(pixels, runs, b % runs, LANES)};
    };
    Block block = block_of(0);
    for (int64_t b = 0; b < count; b++) {
      const Block next = block_of((b + 1) % count);
      function(block, next, b + 1 == count);
      block = next;
    }
  }

  static int64_t runs_of(const Block &block) { return count_of(block.pixels.length(), VECTORS * LANES, LANES); }

  // Mix some output channels of a sample's kernel, or some input channels.
  void mix(const Number *routing, const Number *weight, Range part, bool back, Number *kernel) const {
    const int64_t rows = back ? z.out_channels : 1, width = part.length() * (back ? 1 : z.in_channels);
    weight += part.first * (back ? 1 : z.in_channels);
    for (int64_t r = 0; r < rows; r++)
      mix_row(routing, weight + r * z.in_channels, z.kernels, weights, width, kernel + r * width);
  }

  // Add what a block reads, each times a number, to what it writes.
  template <typename Each>
  void add_up(const Number *map, Numbers<Number> numbers, const Block &block, Number *to, Each each) const {
    const int64_t tiles = count_of(block.wide.length(), SUMS), runs = runs_of(block);
    numbers.begin += block.wide.first * numbers.sum + block.deep.first * numbers.next;
    map += block.deep.first * pixels + block.pixels.first, to += block.wide.first * pixels + block.pixels.first;
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t r = 0; r < runs; r++) {
        const Range sums = part_of(block.wide.length(), tiles, t);
        const Range run = part_of(block.pixels.length(), runs, r, LANES);
        each();
        adding<Number>(sums.length(), run.length())(
            {numbers.begin + sums.first * numbers.sum, numbers.sum, numbers.next, 0}, {map + run.first, pixels, 0},
            {1, block.deep.length(), run.length(), block.deep.first == 0}, to + sums.first * pixels + run.first,
            pixels);
      }
  }

  // Add the products of a block's pixels to those of each weight.
  template <typename Each>
  void multiply(const Number *map, const Number *grads, const Block &block, Vector *totals, Each each) const {
    const int64_t rows = count_of(block.wide.length(), SUMS), columns = count_of(block.deep.length(), VECTORS);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) {
        const Range wide = part_of(block.wide.length(), rows, r), deep = part_of(block.deep.length(), columns, c);
        const int64_t out = block.wide.first + wide.first, in = block.deep.first + deep.first;
        each();
        with_constant<SUMS>(wide.length(), [&](auto N) {
          with_constant<VECTORS>(deep.length(), [&](auto M) {
            multiply_rows<N, M>(grads + out * pixels + block.pixels.first, map + in * pixels + block.pixels.first,
                                block.pixels.length(), totals + out * z.in_channels + in);
          });
        });
      }
  }

  // Multiply each of N channels with each of M, lane by lane.
  template <int N, int M>
  void multiply_rows(const Number *grads, const Number *map, int64_t length, Vector *totals) const {
    Vector total[N][M];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[n][m] = totals[n * z.in_channels + m];
    const auto add = [&](auto at) __attribute__((always_inline)) {
      Vector vectors[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) vectors[m] = at(map + m * pixels);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const Vector vector = at(grads + n * pixels);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[n][m] += vector * vectors[m];
      }
    };
    int64_t p = 0;
    for (; p + LANES <= length; p += LANES) add([p](const Number *row) { return load(row + p); });
    if (p < length) add([=](const Number *row) { return load_last(row + p, length - p); });
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) totals[n * z.in_channels + m] = total[n][m];
  }

  // The last few numbers of a row, and zeros.
  static Vector load_last(const Number *from, int64_t count) {
    Vector vector = {};
    for (int64_t i = 0; i < count; i++) vector[i] = from[i];
    return vector;
  }

  // Give the gradient of a sample's kernel to its routing weights, and to the K kernels.
  void unmix(const Number *kernel, int64_t size, const Number *routing, const Number *weight, Number *routing_grad,
             Number *weight_grad) const {
    for (int64_t k = 0; k < z.kernels; k++, weight += weights) {
      Vector shares = {};
      Number rest = 0;
      int64_t w = 0;
      for (; w + LANES <= size; w += LANES) shares += load(kernel + w) * load(weight + w);
      for (; w < size; w++) rest += kernel[w] * weight[w];
      routing_grad[k] = total<Number>(shares) + rest;
      for (w = 0; weight_grad && w < size; w++) weight_grad[k * weights + w] += routing[k] * kernel[w];
    }
  }
};

}  // namespace

#define FUNCTIONS(name, Number)                                                                                       \
  extern "C" void products_forward_##name(const Sizes *sizes, const Number *input, const Number *routing,             \
                                          const Number *weight, Number *output) {                                     \
    Products<Number>(*sizes).convolve(input, routing, weight, output, false);                                         \
  }                                                                                                                   \
  extern "C" void products_backward_##name(const Sizes *sizes, const Number *grad, const Number *routing,             \
                                           const Number *weight, Number *input_grad) {                                \
    Products<Number>(*sizes).convolve(grad, routing, weight, input_grad, true);                                       \
  }                                                                                                                   \
  extern "C" void products_differentiate_##name(const Sizes *sizes, const Number *grad, const Number *input,          \
                                                const Number *routing, const Number *weight, Number *routing_grad,    \
                                                Number *weight_grad) {                                                \
    Products<Number>(*sizes).differentiate(grad, input, routing, weight, routing_grad, weight_grad);                  \
  }

FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
