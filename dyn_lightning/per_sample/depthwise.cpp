// Depthwise convolution and its gradients, of maps that lie plane by plane (a channel of a sample), and of those that
// lie pixel by pixel, with their channels side by side.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pixels.h"

namespace {

struct Tap {
  int64_t weight, offset;  // which of the kernel's, and how far from the output's position its pixel lies
};

// Copy N to 2 N bytes.
template <int N> inline void copy_ends(const char *from, int64_t bytes, char *to) {
  typedef char Part __attribute__((vector_size(N), aligned(1), may_alias));
  const Part first = *(const Part *)from, last = *(const Part *)(from + bytes - N);
  *(Part *)to = first, *(Part *)(to + bytes - N) = last;
}

// Rows are short: to call memcpy for each would take longer than all products of a small map.
template <typename Number> void copy(const Number *row, int64_t count, Number *to_row) {
  int64_t bytes = count * sizeof(Number);
  const char *from = (const char *)row;
  char *to = (char *)to_row;
  for (; bytes > 2 * BYTES; bytes -= BYTES, from += BYTES, to += BYTES) copy_ends<BYTES>(from, BYTES, to);
  if (bytes >= BYTES) return copy_ends<BYTES>(from, bytes, to);
  if (bytes >= 32) return copy_ends<32>(from, bytes, to);
  if (bytes >= 16) return copy_ends<16>(from, bytes, to);
  if (bytes >= 8) return copy_ends<8>(from, bytes, to);
  if (bytes >= 4) return copy_ends<4>(from, bytes, to);
}

// A padded plane is taken apart by the stride into phases: what one position of a kernel sees, as the kernel steps over
// the plane, lies side by side in one of them. The rows of a phase follow each other with as many zeros between as a
// kernel reaches over, so forward pass and gradients are sums and products of shifted vectors, without an edge. What is
// computed for the columns in between is dropped, or multiplied with zero; so where torch skips padding, infinite
// numbers may give NaN to more of a gradient here. What the next plane has in the place of a row, or gets there, is
// fetched while this one's is computed.
template <typename Number> class PlaneByPlane {
  static constexpr int LANES = ::LANES<Number>;
  using Vector = ::Vector<Number>;

  const Sizes &z;
  const int64_t planes = z.samples * z.channels;
  const int64_t inputs = z.height * z.width, outputs = z.rows * z.columns;
  const int64_t weights = z.kernel_rows * z.kernel_columns;
  const int64_t reach_down = (z.kernel_rows - 1) * z.dilation_rows / z.down;
  const int64_t reach_right = (z.kernel_columns - 1) * z.dilation_columns / z.right;
  const int64_t lines = z.rows + reach_down, pitch = z.columns + reach_right;
  const int64_t front = reach_down * pitch + reach_right;  // zeros before a gradient
  const int64_t room = lines * pitch + reach_right + 2 * LANES;  // vectors read and write beyond the end
  const int64_t phases = z.down * z.right;
  std::vector<Tap> seen;                 // by the output
  std::vector<std::vector<Tap>> giving;  // to each phase of the input's gradient

 public:
  explicit PlaneByPlane(const Sizes &sizes) : z(sizes), giving(phases) {
    for (int64_t i = 0; i < z.kernel_rows; i++)
      for (int64_t j = 0; j < z.kernel_columns; j++) {
        const int64_t down = i * z.dilation_rows, right = j * z.dilation_columns, weight = i * z.kernel_columns + j;
        const int64_t phase = down % z.down * z.right + right % z.right;
        const int64_t shift = down / z.down * pitch + right / z.right;
        seen.push_back({weight, phase * room + shift});
        giving[phase].push_back({weight, -shift});
      }
  }

  void forward(Number *output, const Number *input, const Number *kernels) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(phases * room), sums(room), row(line()), kernel(weights);
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        copy(kernels + p * weights, weights, kernel.data());
        split(input + p * inputs, map.data(), row.data());
        add_up(map.data(), seen, kernel.data(), z.rows * pitch, sums.data());
        Number *to = output + p * outputs;
        for (int64_t r = 0; r < z.rows; r++, to += z.columns) {
          fetch_row(to, outputs, z.columns);
          copy(sums.data() + r * pitch, z.columns, to);
        }
      }
    }
  }

  // What is not wanted is null.
  void backward(const Number *grad, const Number *input, const Number *kernels, Number *input_grad,
                Number *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(kernels_grad ? phases * room : 0), map_grad(input_grad ? phases * room : 0);
      std::vector<Number> row(line()), row_grad(line()), sums_grad(front + room), kernel(weights);
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        Number *sums = sums_grad.data() + front;
        const Number *from = grad + p * outputs;
        for (int64_t r = 0; r < z.rows; r++, from += z.columns) {
          fetch_row(from, outputs, z.columns);
          copy(from, z.columns, sums + r * pitch);
        }
        if (kernels_grad) {
          split(input + p * inputs, map.data(), row.data());
          multiply(map.data(), sums, kernel.data());
          copy(kernel.data(), weights, kernels_grad + p * weights);
        }
        if (input_grad) {
          copy(kernels + p * weights, weights, kernel.data());
          for (int64_t phase = 0; phase < phases; phase++)
            add_up(sums, giving[phase], kernel.data(), lines * pitch, map_grad.data() + phase * room);
          join(map_grad.data(), input_grad + p * inputs, row_grad.data());
        }
      }
    }
  }

 private:
  int64_t line() const { return std::max(z.left + z.width, pitch * z.right); }

  // Columns and rows of the input up to the last that kernels see: what lies beyond may not be a number.
  int64_t used() const {
    return std::min(z.width, (z.columns - 1) * z.right + (z.kernel_columns - 1) * z.dilation_columns + 1 - z.left);
  }
  int64_t used_rows() const {
    return std::min(z.height, (z.rows - 1) * z.down + (z.kernel_rows - 1) * z.dilation_rows + 1 - z.above);
  }

  // Lay out a map in phases; what is padding there is zero and stays so.
  void split(const Number *map, Number *phase, Number *row) const {
    for (int64_t a = 0; a < z.down; a++, phase += z.right * room)
      for (int64_t l = 0; l < lines; l++) {
        const int64_t r = l * z.down + a - z.above;
        if (r < 0 || r >= used_rows()) continue;
        Number *to = phase + l * pitch;
        fetch_row(map + r * z.width, inputs, z.width);
        if (z.right == 1) {
          copy(map + r * z.width, used(), to + z.left);
          continue;
        }
        copy(map + r * z.width, used(), row + z.left);
        if (z.right == 2)
          for (int64_t c = 0; c < pitch; c++) to[c] = row[2 * c], to[room + c] = row[2 * c + 1];
        else
          for (int64_t b = 0; b < z.right; b++)
            for (int64_t c = 0; c < pitch; c++) to[b * room + c] = row[c * z.right + b];
      }
  }

  // The other way round, with zeros for what no kernel sees: nothing is written there into the row, which was zero.
  void join(const Number *phases, Number *map, Number *row) const {
    for (int64_t r = 0; r < z.height; r++, map += z.width) {
      const int64_t l = (r + z.above) / z.down, a = (r + z.above) % z.down;
      const Number *from = phases + a * z.right * room + l * pitch;
      fetch_row(map, inputs, z.width);
      if (l >= lines)
        std::memset(map, 0, z.width * sizeof(Number));
      else if (z.right == 1 && z.left + z.width <= pitch)
        copy(from + z.left, z.width, map);
      else {
        if (z.right == 2)
          for (int64_t c = 0; c < pitch; c++) row[2 * c] = from[c], row[2 * c + 1] = from[room + c];
        else
          for (int64_t b = 0; b < z.right; b++)
            for (int64_t c = 0; c < pitch; c++) row[c * z.right + b] = from[b * room + c];
        copy(row + z.left, z.width, map);
      }
    }
  }

  static void add_up(const Number *from, const std::vector<Tap> &taps, const Number *kernel, int64_t count,
                     Number *to) {
    int64_t q = 0;
    for (; q + 3 * LANES < count; q += 4 * LANES) add_up_vectors<4>(from + q, taps, kernel, to + q);
    for (; q < count; q += LANES) add_up_vectors<1>(from + q, taps, kernel, to + q);
  }

  template <int N>
  static inline void add_up_vectors(const Number *from, const std::vector<Tap> &taps, const Number *kernel,
                                    Number *to) {
    Vector sum[N] = {};
    for (const Tap &tap : taps)
      for (int n = 0; n < N; n++) sum[n] += kernel[tap.weight] * load(from + tap.offset + n * LANES);
    for (int n = 0; n < N; n++) store(sum[n], to + n * LANES);
  }

  // Multiply what each weight sees with the output's gradient, a few rows at a time, which stay in the cache.
  void multiply(const Number *map, const Number *sums, Number *kernel) const {
    const int64_t count = z.rows * pitch, part = 64 * LANES;
    std::fill(kernel, kernel + weights, Number(0));
    for (int64_t first = 0; first < count; first += part) {
      const int64_t last = std::min(first + part, count);
      for (const Tap &tap : seen) {
        Vector total[4] = {};
        int64_t q = first;
        for (; q + 3 * LANES < last; q += 4 * LANES)
          for (int n = 0; n < 4; n++) total[n] += load(sums + q + n * LANES) * load(map + tap.offset + q + n * LANES);
        for (; q < last; q += LANES) total[0] += load(sums + q) * load(map + tap.offset + q);
        kernel[tap.weight] += sum((total[0] + total[1]) + (total[2] + total[3]));
      }
    }
  }

  // Lane by lane it would take longer than all products of a small map.
  static inline Number sum(Vector vector) {
    typedef Number Part __attribute__((vector_size(16)));
    Part parts[BYTES / 16];
    std::memcpy(parts, &vector, BYTES);
    for (int half = BYTES / 32; half > 0; half /= 2)
      for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    Number total = 0;
    for (size_t lane = 0; lane < 16 / sizeof(Number); lane++) total += parts[0][lane];
    return total;
  }
};

// Maps in channels_last, sample by sample, of at least as many channels as a vector has.
template <typename Pixel> class SampleBySample {
  using Number = typename Computed<Pixel>::Number;
  static constexpr int64_t LANES = ::LANES<Number>;

  const Sizes &z;
  const Pixels<Pixel, true> pixels;
  const int64_t inputs = z.height * z.width * z.channels, outputs = z.rows * z.columns * z.channels;
  const int64_t weights = z.kernel_rows * z.kernel_columns, numbers = weights * pixels.pitch;

 public:
  explicit SampleBySample(const Sizes &sizes) : z(sizes), pixels(sizes, sizes.channels, false) {}

  void forward(Pixel *output, const Pixel *input, const Pixel *kernels) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> kernel(numbers);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        lay_out(kernels + s * z.channels * weights, kernel.data());
        pixels.add_up(input + s * inputs, pixels.output, kernel.data(), output + s * outputs);
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> kernel(numbers);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        if (kernels_grad) {
          pixels.multiply(input + s * inputs, grad + s * outputs, kernel.data());
          lay_back(kernel.data(), kernels_grad + s * z.channels * weights);
        }
        if (input_grad) {
          lay_out(kernels + s * z.channels * weights, kernel.data());
          pixels.add_up(grad + s * outputs, pixels.input, kernel.data(), input_grad + s * inputs);
        }
      }
    }
  }

 private:
  // Lay the weights of a sample's kernels out as maps are, vector by vector.
  void lay_out(const Pixel *kernels, Number *kernel) const {
    for (size_t v = 0; v < pixels.first.size(); v++)
      transpose(kernels + pixels.first[v] * weights, weights, LANES, weights, kernel + v * LANES, pixels.pitch);
  }

  void lay_back(const Number *kernel, Pixel *kernels) const {
    for (size_t v = 0; v < pixels.first.size(); v++)
      transpose(kernel + v * LANES, pixels.pitch, weights, LANES, kernels + pixels.first[v] * weights, weights);
  }
};

// As many planes at once as a vector has lanes, turned to lie side by side, with zeros between their rows.
template <typename Pixel> class PlanesTogether {
  using Number = typename Computed<Pixel>::Number;
  static constexpr int64_t LANES = ::LANES<Number>;

  const Sizes &z;
  const Pixels<Number, false> pixels;
  const int64_t planes = z.samples * z.channels;
  const int64_t threads = std::min(z.threads, (planes + LANES - 1) / LANES);
  const int64_t inputs = z.height * z.width, outputs = z.rows * z.columns;
  const int64_t weights = z.kernel_rows * z.kernel_columns;
  // Where a plane's pixels lie: the input's as the output meets them, and the other way round.
  const std::vector<int64_t> of_input = places(z.height, z.width, pixels.output);
  const std::vector<int64_t> of_output = places(z.rows, z.columns, pixels.input);

  struct Maps {
    std::vector<Number> input, output, kernel, result;
  };
  Maps maps() const {
    return {std::vector<Number>(pixels.output.room() * LANES), std::vector<Number>(pixels.input.room() * LANES),
            std::vector<Number>(weights * LANES), std::vector<Number>(std::max(inputs, outputs) * LANES)};
  }

 public:
  explicit PlanesTogether(const Sizes &sizes) : z(sizes), pixels(sizes, LANES, true) {}

  void forward(Pixel *output, const Pixel *input, const Pixel *kernels) const {
#pragma omp parallel num_threads(threads)
    {
      Maps of = maps();
#pragma omp for
      for (int64_t p = 0; p < planes; p += LANES) {
        const int64_t count = std::min(LANES, planes - p);
        take(kernels + p * weights, weights, count, of.kernel, InOrder());
        take(input + p * inputs, inputs, count, of.input, at(of_input));
        pixels.add_up(met(of.input, pixels.output), pixels.output, of.kernel.data(), of.result.data());
        give(of.result, outputs, count, output + p * outputs);
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(threads)
    {
      Maps of = maps();
#pragma omp for
      for (int64_t p = 0; p < planes; p += LANES) {
        const int64_t count = std::min(LANES, planes - p);
        take(grad + p * outputs, outputs, count, of.output, at(of_output));
        if (kernels_grad) {
          take(input + p * inputs, inputs, count, of.input, at(of_input));
          pixels.multiply(met(of.input, pixels.output), met(of.output, pixels.input), of.kernel.data());
          give(of.kernel, weights, count, kernels_grad + p * weights);
        }
        if (input_grad) {
          take(kernels + p * weights, weights, count, of.kernel, InOrder());
          pixels.add_up(met(of.output, pixels.input), pixels.input, of.kernel.data(), of.result.data());
          give(of.result, inputs, count, input_grad + p * inputs);
        }
      }
    }
  }

 private:
  template <typename Side> static std::vector<int64_t> places(int64_t height, int64_t width, const Side &side) {
    std::vector<int64_t> found;
    for (int64_t r = 0; r < height; r++)
      for (int64_t c = 0; c < width; c++) found.push_back(side.front + r * side.met_width + c);
    return found;
  }

  static auto at(const std::vector<int64_t> &places) {
    return [of = places.data()](int64_t pixel) { return of[pixel]; };
  }

  template <typename Side> static const Number *met(const std::vector<Number> &map, const Side &side) {
    return map.data() + side.front * LANES;
  }

  // Turn some planes, and let the cache fetch those that come next.
  template <typename Place>
  static void take(const Pixel *planes, int64_t length, int64_t count, std::vector<Number> &to, Place place) {
    transpose<true, false>(planes, length, count, length, to.data(), LANES, LANES * length, place);
  }
  static void give(const std::vector<Number> &from, int64_t length, int64_t count, Pixel *planes) {
    transpose<false, true>(from.data(), LANES, length, count, planes, length, LANES * length);
  }
};

template <typename Pixel, typename Function> void with_planes(const Sizes &z, Function function) {
  if constexpr (!std::is_same<Pixel, BFloat16>::value)
    if (!z.together) return function(PlaneByPlane<Pixel>(z));
  function(PlanesTogether<Pixel>(z));
}

}  // namespace

#define FUNCTIONS(name, Pixel)                                                                                        \
  extern "C" void forward_##name(const Sizes *sizes, Pixel *output, const Pixel *input, const Pixel *kernels) {       \
    with_planes<Pixel>(*sizes, [=](const auto &of) { of.forward(output, input, kernels); });                          \
  }                                                                                                                   \
  extern "C" void backward_##name(const Sizes *sizes, const Pixel *grad, const Pixel *input, const Pixel *kernels,    \
                                  Pixel *input_grad, Pixel *kernels_grad) {                                           \
    with_planes<Pixel>(                                                                                               \
        *sizes, [=](const auto &of) { of.backward(grad, input, kernels, input_grad, kernels_grad); });                \
  }                                                                                                                   \
  extern "C" void forward_last_##name(const Sizes *sizes, Pixel *output, const Pixel *input, const Pixel *kernels) {  \
    SampleBySample<Pixel>(*sizes).forward(output, input, kernels);                                                    \
  }                                                                                                                   \
  extern "C" void backward_last_##name(const Sizes *sizes, const Pixel *grad, const Pixel *input,                     \
                                       const Pixel *kernels, Pixel *input_grad, Pixel *kernels_grad) {                \
    SampleBySample<Pixel>(*sizes).backward(grad, input, kernels, input_grad, kernels_grad);                           \
  }

FUNCTIONS(float32, float)
FUNCTIONS(float64, double)
FUNCTIONS(bfloat16, BFloat16)
