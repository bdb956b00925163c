// Convolution with kernels mixed for each sample, and its gradients. Of the mixed kernels there is one block at a time,
// of some input and output channels at one place of the kernel: it is mixed into a near cache, multiplied with whole
// maps, and forgotten. Sums lie pixel by pixel, and are turned round for maps that lie channel by channel.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "mixed.h"

namespace {

// Input channels and output channels of a block; where it has fewer of one side, it may have more of the other, but no
// more weights than this squared: `Sizes` say how many, in whole vectors.
constexpr int64_t BLOCK = 64;
constexpr int TOGETHER = 4;  // samples for which a block is mixed at once: what it is mixed of is read once
// Rows of some samples' blocks, and pixels of a row, that fit into the nearest cache; bytes of maps that fit into the
// next one, and into the part of the last one that a thread can count on.
constexpr int64_t NEAR_ROWS = 16, NEAR_PIXELS = 64, NEXT = 1 << 19, LAST = 1 << 22;
constexpr int64_t AHEAD = 16;  // pixels

template <typename Number> class Mixed {
  static constexpr int LANES = ::LANES<Number>, LINE = ::LINE<Number>;

  const Sizes &z;
  const int64_t inputs = z.height * z.width, outputs = z.rows * z.columns;
  const int64_t count = z.kernel_rows * z.kernel_columns, weights = count * z.in_channels * z.out_channels;
  const std::vector<Tap> taps;

 public:
  explicit Mixed(const Sizes &sizes) : z(sizes), taps(taps_of(sizes)) {}

  // From input to output, or back from the output's gradient to the input's.
  void convolve(const Number *from, const Number *routing, const Number *weight, Number *ordered, Number *to,
                bool back) const {
    const Way way = way_of(back);
    const int64_t widest = back ? z.in_block : z.out_block, size = way.read * way.deep + way.written * way.wide;
    const auto blocks = parts_of(way.wide, widest, LANES);
    // The kernels are read again for each of the groups of samples, which is seen where they are large beside the maps.
    // There must be groups enough for all threads.
    const int64_t room = std::min(LAST, z.kernels * weights * int64_t(sizeof(Number)) / 8), used = blocks.size();
    const int64_t fitting = room / int64_t(sizeof(Number)) / size;
    const int64_t groups = (z.threads + used - 1) / used, share = (z.samples + groups - 1) / groups;
    const auto samples = parts_of(z.samples, std::max<int64_t>(1, std::min(fitting, share)));
#pragma omp parallel num_threads(z.threads)
    {
      Work work;
      work.kernels.resize(TOGETHER * std::min(BLOCK * BLOCK, way.deep * std::min(widest, way.wide)));
#pragma omp for collapse(2)
      for (size_t b = 0; b < blocks.size(); b++)
        for (int64_t k = 0; k < z.kernels; k++) order(weight, k, blocks[b], back, ordered);
#pragma omp for collapse(2)
      for (size_t g = 0; g < samples.size(); g++)
        for (size_t b = 0; b < blocks.size(); b++)
          convolve_block(way, samples[g], blocks[b], from, routing, ordered, work, to);
    }
  }

  // Gives (blocks of a kernel, samples, kernels), to be summed over the blocks, and, unless that is null, (parts,
  // kernels, out_channels, in_channels, kernel_rows, kernel_columns), to be summed over the parts of the samples.
  void differentiate(const Number *grad, const Number *input, const Number *routing, const Number *weight,
                     Number *ordered, Number *routing_grad, Number *weight_grad) const {
    const auto blocks = parts_of(z.out_channels, z.out_block, LANES), depths = parts_of(z.in_channels, z.in_block);
    const auto samples = parts_of(z.samples, std::max<int64_t>(1, (z.samples + z.parts - 1) / z.parts));
    // To lie side by side, for several products; a single row is multiplied a few pixels at a time.
    const bool copied = z.planes || (blocks.size() > 1 && !is_row());
    const int64_t fitting = std::max<int64_t>(1, NEXT / int64_t(sizeof(Number)) / ((inputs + outputs) * BLOCK));
#pragma omp parallel num_threads(z.threads)
    {
      Work work;
      work.kernels.resize(TOGETHER * BLOCK * BLOCK);
#pragma omp for collapse(2)
      for (size_t b = 0; b < blocks.size(); b++)
        for (int64_t k = 0; k < z.kernels; k++) order(weight, k, blocks[b], false, ordered);
      // In turn, so that threads read the same pixels at about the same time, and fetch parts of them for each other.
#pragma omp for collapse(3) schedule(static, 1)
      for (int64_t part = 0; part < z.parts; part++)
        for (size_t d = 0; d < depths.size(); d++)
          for (size_t b = 0; b < blocks.size(); b++) {
            const Range depth = depths[d], block = blocks[b];
            work.sums.assign(z.kernels * count * depth.length() * block.length(), Number(0));
            if (copied) work.copy.resize(fitting * outputs * std::min(z.out_block, z.out_channels));
            Number *shares = routing_grad + (d * blocks.size() + b) * z.samples * z.kernels;  // zeros
            if (part < int64_t(samples.size()))
              for (const Range &some : parts_of(samples[part].length(), fitting)) {
                const Range these = {samples[part].first + some.first, samples[part].first + some.last};
                sum_up(these, depth, block, grad, input, routing, ordered, work, shares);
              }
            if (weight_grad) order_back(work.sums.data(), depth, block, weight_grad + part * z.kernels * weights);
          }
    }
  }

 private:
  // A thread's: some samples' blocks or their gradients, sums (of maps that are turned, or for the K kernels), and a
  // part of the output's gradient.
  struct Work {
    std::vector<Number> kernels, sums, copy;
  };

  // Whether from input to output, or back, and what is read and written there: channels, and pixels of each.
  struct Way {
    bool back;
    int64_t deep, read, wide, written;
    bool gives_all;  // the sums begin with the first tap, which reaches each; otherwise with zeros in memory
  };

  Way way_of(bool back) const {
    const int64_t written = back ? inputs : outputs;
    return {back, back ? z.out_channels : z.in_channels, back ? outputs : inputs,
            back ? z.in_channels : z.out_channels, written,
            taps[0].rows.length() * taps[0].columns.length() == written};
  }

  // A sample's map, and how far one pixel and one channel lie from the next.
  struct Map {
    const Number *begin;
    int64_t pixel, channel;
    Map from(int64_t first) const { return {begin + first * channel, pixel, channel}; }
  };

  // Whether kernels of one weight see a single row of positions.
  bool is_row() const { return count * z.rows == 1; }

  Map map_of(const Number *begin, int64_t channels, int64_t pixels) const {
    return {begin, z.planes ? 1 : channels, z.planes ? pixels : 1};
  }

  // Give some samples' maps what a block of all taps gives.
  void convolve_block(const Way &way, Range samples, Range block, const Number *from, const Number *routing,
                      const Number *ordered, Work &work, Number *to) const {
    const auto columns = columns_of<Number>(block.length());
    const auto depths = parts_of(way.deep, BLOCK * BLOCK / block.length());
    const int64_t pitch = z.planes ? block.length() : way.wide;
    from += samples.first * way.read * way.deep, to += samples.first * way.written * way.wide;
    routing += samples.first * z.kernels, ordered += block.first * count * way.deep * z.kernels;
    const size_t size = samples.length() * way.written * block.length();
    if (z.planes && work.sums.size() < size) work.sums.resize(size);
    Number *const sums = z.planes ? work.sums.data() : to + block.first;
    for (int64_t p = 0; !way.gives_all && p < samples.length() * way.written; p++)
      std::fill_n(sums + p * pitch, block.length(), Number(0));
    for (const Tap &tap : taps)
      for (const Range &depth : depths) {
        const bool begins = way.gives_all && &tap == &taps[0] && depth.first == 0;
        for (const Range &some : parts_of(samples.length(), TOGETHER)) {
          with_constant<TOGETHER>(some.length(), [&](auto S) {
            mix<S>(routing + some.first * z.kernels, ordered, depth.length(), block.length(), work.kernels.data());
          });
          for (int64_t s = some.first; s < some.last; s++) {
            const Map map = map_of(from + s * way.read * way.deep, way.deep, way.read).from(depth.first);
            const Number *kernel = work.kernels.data() + (s - some.first) * depth.length() * block.length();
            add_up(map, tap, kernel, depth.length(), block.length(), columns, sums + s * way.written * pitch, pitch,
                   way.back, begins);
          }
        }
        ordered += depth.length() * z.kernels * block.length();
      }
    for (int64_t s = 0; z.planes && s < samples.length(); s++)
      transpose<false, true>(sums + s * way.written * pitch, pitch, way.written, pitch,
                             to + (s * way.wide + block.first) * way.written, way.written, 2 * LINE);
  }

  // Add a block's gradients of some samples to the sums, and to each sample's shares of the kernels.
  void sum_up(Range samples, Range depth, Range block, const Number *grad, const Number *input, const Number *routing,
              const Number *ordered, Work &work, Number *shares) const {
    const auto columns = columns_of<Number>(block.length());
    const bool copied = !work.copy.empty();
    input += samples.first * inputs * z.in_channels, grad += samples.first * outputs * z.out_channels;
    for (int64_t s = 0; copied && s < samples.length(); s++)
      take(map_of(grad + s * outputs * z.out_channels, z.out_channels, outputs).from(block.first), outputs,
           block.length(), work.copy.data() + s * outputs * block.length());
    // Of each pixel some channels are read at a time, of which the cache does not see what comes next.
    if (!z.planes && !is_row())
      fetch_rows(input + depth.first, 0, samples.length() * inputs, z.in_channels, depth.length());
    const Number *positions = copied ? work.copy.data() : grad + block.first;
    const int64_t pitch = copied ? block.length() : z.out_channels;
    const int64_t size = depth.length() * block.length();
    for (int64_t t = 0; t < count; t++) {
      const int64_t row = block.first * count * z.in_channels + (t * z.in_channels + depth.first) * block.length();
      for (const Range &some : parts_of(samples.length(), TOGETHER)) {
        std::fill_n(work.kernels.begin(), some.length() * size, Number(0));
        for (int64_t s = some.first; s < some.last; s++)
          multiply(map_of(input + s * inputs * z.in_channels, z.in_channels, inputs).from(depth.first), depth.length(),
                   positions + s * outputs * pitch, pitch, block.length(), columns, taps[t],
                   work.kernels.data() + (s - some.first) * size);
        const int64_t first = (samples.first + some.first) * z.kernels;
        with_constant<TOGETHER>(some.length(), [&](auto S) {
          unmix<S>(work.kernels.data(), depth.length(), block.length(), routing + first, ordered + row * z.kernels,
                   shares + first, work.sums.data() + t * size * z.kernels);
        });
      }
    }
  }

  // Order a kernel's weights as (blocks of to's channels, taps, from's channels, kernels, channels of the block).
  void order(const Number *weight, int64_t kernel, Range block, bool back, Number *to) const {
    const int64_t deep = back ? z.out_channels : z.in_channels;
    const int64_t wide_step = (back ? 1 : z.in_channels) * count, deep_step = (back ? z.in_channels : 1) * count;
    weight += kernel * weights + block.first * wide_step;
    to += block.first * count * deep * z.kernels + kernel * block.length();
    for (const Range &some : parts_of(block.length(), LANES))  // a few channels, since they lie far apart
      for (int64_t d = 0; d < deep; d++)
        for (int64_t t = 0; t < count; t++)
          for (int64_t w = some.first; w < some.last; w++)
            to[(t * deep + d) * z.kernels * block.length() + w] = weight[w * wide_step + d * deep_step + t];
  }

  // The other way round, from the block of all kernels.
  void order_back(const Number *from, Range depth, Range block, Number *weight) const {
    const int64_t step = z.in_channels * count;
    weight += block.first * step + depth.first * count;
    for (int64_t k = 0; k < z.kernels; k++, weight += weights, from += block.length())
      for (const Range &some : parts_of(block.length(), LANES))
        for (int64_t d = 0; d < depth.length(); d++)
          for (int64_t t = 0; t < count; t++)
            for (int64_t w = some.first; w < some.last; w++)
              weight[w * step + d * count + t] = from[(t * depth.length() + d) * z.kernels * block.length() + w];
  }

  // Copy some channels of a map to where they lie pixel by pixel.
  void take(Map map, int64_t pixels, int64_t width, Number *to) const {
    if (z.planes) return transpose<true, false>(map.begin, map.channel, width, pixels, to, width, 2 * LINE);
    for (int64_t p = 0; p < pixels; p++) {
      const Number *from = map.begin + p * map.pixel;
      fetch_row(from, AHEAD * map.pixel, width);
      std::copy_n(from, width, to + p * width);
    }
  }

  // Mix a block of the kernels of S samples.
  template <int S>
  void mix(const Number *routing, const Number *weight, int64_t deep, int64_t width, Number *kernels) const {
    for (int64_t d = 0; d < deep; d++, weight += z.kernels * width)
      for (int64_t first = 0; first < width; first += LANES) {
        const int64_t w = std::min(first, width - LANES);
        Vector<Number> sum[S] = {};
        for (int64_t k = 0; k < z.kernels; k++) {
          const Vector<Number> of = load(weight + k * width + w);
          for (int s = 0; s < S; s++) sum[s] += routing[s * z.kernels + k] * of;
        }
        for (int s = 0; s < S; s++) store(sum[s], kernels + (s * deep + d) * width + w);
      }
  }

  // Give a block of the gradients of S samples' kernels to what they were mixed of.
  template <int S>
  void unmix(const Number *kernels, int64_t deep, int64_t width, const Number *routing, const Number *weight,
             Number *routing_grad, Number *weight_grad) const {
    for (const Range &near : parts_of(deep, NEAR_ROWS))
      for (int64_t k = 0; k < z.kernels; k++) {
        Vector<Number> total[S] = {};
        Number share[S], rest[S] = {};
        for (int s = 0; s < S; s++) share[s] = routing[s * z.kernels + k];
        for (int64_t d = near.first; d < near.last; d++) {
          const Number *of = weight + (d * z.kernels + k) * width;
          Number *to = weight_grad + (d * z.kernels + k) * width;
          int64_t w = 0;
          for (; w + LANES <= width; w += LANES) {
            const Vector<Number> vector = load(of + w);
            Vector<Number> sum = load(to + w);
            for (int s = 0; s < S; s++) {
              const Vector<Number> from = load(kernels + (s * deep + d) * width + w);
              total[s] += from * vector, sum += share[s] * from;
            }
            store(sum, to + w);
          }
          for (; w < width; w++)
            for (int s = 0; s < S; s++) {
              const Number from = kernels[(s * deep + d) * width + w];
              rest[s] += from * of[w], to[w] += share[s] * from;
            }
        }
        for (int s = 0; s < S; s++) {
          for (int lane = 0; lane < LANES; lane++) rest[s] += total[s][lane];
          routing_grad[s * z.kernels + k] += rest[s];
        }
      }
  }

  // Add to a sample's map what a block of one tap gives.
  void add_up(Map from, const Tap &tap, const Number *kernel, int64_t deep, int64_t width,
              const std::vector<Columns> &columns, Number *to, int64_t pitch, bool back, bool begins) const {
    const int64_t from_step = back ? from.pixel : z.right * from.pixel, to_step = back ? z.right * pitch : pitch;
    int64_t most = MORE_SUMS;  // of all columns, so that pixels are written whole
    for (const auto &of : columns) most = std::min(most, of.sums);
    const int64_t length = tap.columns.length(), tiles = (length + most - 1) / most;
    const bool fetches = &tap == &taps[0];  // the next tile, which no tap before has brought near
    for (int64_t r = 0; r < tap.rows.length(); r++) {
      const int64_t pixel = (tap.row + r * z.down) * z.width + tap.column;
      const int64_t position = (tap.rows.first + r) * z.columns + tap.columns.first;
      const Number *numbers = from.begin + (back ? position : pixel) * from.pixel;
      Number *sums = to + (back ? pixel : position) * pitch;
      for (int64_t tile = 0, first = 0, last; tile < tiles; tile++, first = last) {
        last = length * (tile + 1) / tiles;
        const int64_t next = last * from_step, step = (last - first) * from_step;
        if (fetches && z.planes) fetch_rows(numbers, next, deep, from.channel, step);
        for (const auto &of : columns) {
          const bool in_product = fetches && !z.planes && &of == &columns[0];
          if (fetches) fetch_rows(sums, last * to_step + of.range.first, last - first, to_step, of.range.length());
          adding<Number>(last - first, of.range.length())(
              {numbers + first * from_step, from_step, from.channel, 0, in_product ? step : 0},
              {kernel + of.range.first, width, 0}, {1, deep, of.range.length(), begins},
              sums + first * to_step + of.range.first, to_step);
        }
      }
    }
  }

  // Multiply what a tap sees of a sample with the output's gradient.
  void multiply(Map input, int64_t deep, const Number *grad, int64_t pitch, int64_t width,
                const std::vector<Columns> &columns, const Tap &tap, Number *kernel) const {
    const int64_t pixel = tap.row * z.width + tap.column;
    const int64_t position = tap.rows.first * z.columns + tap.columns.first;
    const bool fetches = !z.planes && is_row();
    int64_t steps = 0;  // with each of which a part of the next pixels is fetched, or they would be waited for
    for (const auto &[some, most] : columns) steps += (deep + most - 1) / most;
    for (const Range &near : parts_of(tap.columns.length(), z.planes ? z.columns : NEAR_PIXELS)) {
      int64_t step = 0;
      for (const auto &[some, most] : columns)
        for (int64_t tiles = (deep + most - 1) / most, tile = 0, first = 0, last; tile < tiles; tile++, first = last) {
          last = deep * (tile + 1) / tiles;
          if (fetches) {
            const Range next = {near.length() * step / steps, near.length() * (step + 1) / steps};
            const int64_t ahead = near.last + next.first;
            fetch_rows(input.begin, (pixel + ahead * z.right) * input.pixel, next.length(), z.right * input.pixel,
                       deep);
            fetch_rows(grad, (position + ahead) * pitch, next.length(), pitch, width);
            step++;
          }
          adding<Number>(last - first, some.length())(
              {input.begin + (pixel + near.first * z.right) * input.pixel + first * input.channel, input.channel,
               z.right * input.pixel, z.down * z.width * input.pixel},
              {grad + (position + near.first) * pitch + some.first, pitch, z.columns * pitch},
              {tap.rows.length(), near.length(), some.length(), false}, kernel + first * width + some.first, width);
        }
    }
  }
};

}  // namespace

#define FUNCTIONS(name, Number)                                                                                  \
  extern "C" void mixed_forward_##name(const Sizes *sizes, const Number *input, const Number *routing,           \
                                       const Number *weight, Number *ordered, Number *output) {                  \
    Mixed<Number>(*sizes).convolve(input, routing, weight, ordered, output, false);                              \
  }                                                                                                              \
  extern "C" void mixed_backward_##name(const Sizes *sizes, const Number *grad, const Number *routing,           \
                                        const Number *weight, Number *ordered, Number *input_grad) {             \
    Mixed<Number>(*sizes).convolve(grad, routing, weight, ordered, input_grad, true);                            \
  }                                                                                                              \
  extern "C" void mixed_differentiate_##name(const Sizes *sizes, const Number *grad, const Number *input,        \
                                             const Number *routing, const Number *weight, Number *ordered,       \
                                             Number *routing_grad, Number *weight_grad) {                        \
    Mixed<Number>(*sizes).differentiate(grad, input, routing, weight, ordered, routing_grad, weight_grad);       \
  }

FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
