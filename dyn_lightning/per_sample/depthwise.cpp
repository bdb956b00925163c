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

// Copy a row of other numbers, which vectors of `float` stand for.
template <typename From, typename To> void copy(const From *row, int64_t count, To *to_row) {
  constexpr int64_t lanes = LANES<float>;
  for (int64_t i = 0; count < lanes && i < count; i++) assign(row[i], to_row[i]);
  for (int64_t i = 0; count >= lanes && i < count; i += lanes) {
    const int64_t first = std::min(i, count - lanes);
    store(load(row + first), to_row + first);
  }
}

// A padded plane is taken apart by the stride into phases: what one position of a kernel sees, as the kernel steps over
// the plane, lies side by side in one of them. The rows of a phase follow each other with as many zeros between as a
// kernel reaches over, so forward pass and gradients are sums and products of shifted vectors, without an edge. Zeros
// are multiplied like pixels; so where torch skips padding, infinite numbers may give NaN to more of an output or a
// gradient here.
template <typename Pixel> class PlaneByPlane {
  using Number = typename Computed<Pixel>::Number;
  static constexpr int LANES = ::LANES<Number>, TOGETHER = 4;  // vectors at once
  using Vector = ::Vector<Number>;

  const Sizes &z;
  const int64_t planes = z.samples * z.channels;
  const int64_t inputs = z.height * z.width, outputs = z.rows * z.columns;
  const int64_t weights = z.kernel_rows * z.kernel_columns;
  const int64_t reach_down = (z.kernel_rows - 1) * z.dilation_rows / z.down;
  const int64_t reach_right = (z.kernel_columns - 1) * z.dilation_columns / z.right;
  const int64_t lines = z.rows + reach_down, pitch = z.columns + reach_right;
  const int64_t front = reach_down * pitch + reach_right;  // zeros before a gradient
  const int64_t room = lines * pitch + reach_right + 2 * LANES;  // vectors read beyond the end
  const int64_t phases = z.down * z.right;
  // Lines of the input's gradient that are summed up at once, and their numbers in each phase.
  const int64_t lines_at_once = std::clamp<int64_t>(16 * LANES / pitch, 1, lines), block = lines_at_once * pitch;
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

  void forward(Pixel *output, const Pixel *input, const Pixel *kernels) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(phases * room), row(line()), kernel(weights);
      Ahead ahead;
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        ahead.begin();
        ahead.add(input, (p + 1) * inputs, inputs), ahead.add(output, (p + 1) * outputs, outputs);
        copy(kernels + p * weights, weights, kernel.data());
        split(input + p * inputs, map.data(), row.data(), ahead);
        add_up(map.data(), seen, kernel.data(), z.rows, z.columns, output + p * outputs, ahead);
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(kernels_grad ? phases * room : 0), blocks(phases * block);
      std::vector<Number> row(line()), row_grad(line()), sums_grad(front + room), kernel(weights);
      Ahead ahead;
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        ahead.begin();
        ahead.add(grad, (p + 1) * outputs, outputs);
        if (kernels_grad) ahead.add(input, (p + 1) * inputs, inputs);
        if (input_grad) ahead.add(input_grad, (p + 1) * inputs, inputs);
        Number *sums = sums_grad.data() + front;
        for (int64_t r = 0; r < z.rows; r++) {
          ahead.step();
          copy(grad + p * outputs + r * z.columns, z.columns, sums + r * pitch);
        }
        if (kernels_grad) {
          split(input + p * inputs, map.data(), row.data(), ahead);
          multiply(map.data(), sums, kernel.data(), ahead);
          copy(kernel.data(), weights, kernels_grad + p * weights);
        }
        if (input_grad) {
          copy(kernels + p * weights, weights, kernel.data());
          give(sums, kernel.data(), input_grad + p * inputs, blocks.data(), row_grad.data(), ahead);
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
  void split(const Pixel *map, Number *phase, Number *row, Ahead &ahead) const {
    for (int64_t a = 0; a < z.down; a++, phase += z.right * room)
      for (int64_t l = 0; l < lines; l++) {
        const int64_t r = l * z.down + a - z.above;
        if (r < 0 || r >= used_rows()) continue;
        Number *to = phase + l * pitch;
        ahead.step();
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

  // Give the input's gradient what its phases come to, a few lines at a time, and zeros where no kernel sees it: into
  // the row, which was zero, nothing is written there.
  void give(const Number *sums, const Number *kernel, Pixel *map, Number *blocks, Number *row, Ahead &ahead) const {
    if (phases == 1)
      return add_up(sums + z.above * pitch + z.left, giving[0], kernel, z.height, z.width, map, ahead);
    for (int64_t l = 0; l < lines; l++) {
      if (l % lines_at_once == 0)
        for (int64_t phase = 0; phase < phases; phase++)
          add_up(sums + l * pitch, giving[phase], kernel, std::min(lines_at_once, lines - l), pitch,
                 blocks + phase * block, ahead);
      const Number *from = blocks + l % lines_at_once * pitch;
      for (int64_t a = 0; a < z.down; a++, from += z.right * block) {
        const int64_t r = l * z.down + a - z.above;
        if (r < 0 || r >= z.height) continue;
        if (z.right == 2)
          for (int64_t c = 0; c < pitch; c++) row[2 * c] = from[c], row[2 * c + 1] = from[block + c];
        else
          for (int64_t b = 0; b < z.right; b++)
            for (int64_t c = 0; c < pitch; c++) row[c * z.right + b] = from[b * block + c];
        copy(row + z.left, z.width, map + r * z.width);
      }
    }
    const int64_t reached = std::max<int64_t>(0, lines * z.down - z.above);
    if (reached < z.height) std::fill(map + reached * z.width, map + inputs, Pixel());
  }

  // Give rows of a map the sums of what they see, which lies `pitch` apart; the last vector of a row may overlap with
  // the one before.
  template <typename To>
  void add_up(const Number *from, const std::vector<Tap> &taps, const Number *kernel, int64_t rows, int64_t columns,
              To *to, Ahead &ahead) const {
    if (columns == pitch) columns *= rows, rows = 1;  // nothing lies between
    if (columns < LANES) {
      for (int64_t r = 0; r < rows; r++, from += pitch, to += columns) {
        ahead.step();
        Vector sum = {};
        for (const Tap &tap : taps) sum += kernel[tap.weight] * load(from + tap.offset);
        copy((const Number *)&sum, columns, to);
      }
      return;
    }
    const int64_t vectors = rows * ((columns + LANES - 1) / LANES);
    for (int64_t v = 0, row = 0, column = 0; v < vectors; v += TOGETHER) {
      ahead.step();
      with_constant<TOGETHER>(vectors - v, [&](auto N) {
        const Number *read[N];
        To *written[N];
        for (int n = 0; n < N; n++) {
          const int64_t first = std::min(column, columns - LANES);
          read[n] = from + row * pitch + first, written[n] = to + row * columns + first;
          column += LANES;
          if (column >= columns) column = 0, row++;
        }
        Vector sum[N] = {};
        for (const Tap &tap : taps)
          for (int n = 0; n < N; n++) sum[n] += kernel[tap.weight] * load(read[n] + tap.offset);
        for (int n = 0; n < N; n++) store(sum[n], written[n]);
      });
    }
  }

  // Multiply what each weight sees with the output's gradient.
  void multiply(const Number *map, const Number *sums, Number *kernel, Ahead &ahead) const {
    size_t w = 0;
    for (; w + 9 <= seen.size(); w += 9) multiply_some<9>(map, sums, &seen[w], kernel, ahead);
    for (; w + 3 <= seen.size(); w += 3) multiply_some<3>(map, sums, &seen[w], kernel, ahead);
    for (; w < seen.size(); w++) multiply_some<1>(map, sums, &seen[w], kernel, ahead);
  }

  // For N weights a vector of the gradient is loaded once. Parts are summed up apart, as long sums are less exact.
  template <int N>
  void multiply_some(const Number *map, const Number *sums, const Tap *taps, Number *kernel, Ahead &ahead) const {
    const int64_t count = z.rows * pitch, part = 64 * LANES;
    Vector total[N] = {};
    for (int64_t begin = 0; begin < count; begin += part) {
      Vector some[N] = {};
      for (int64_t q = begin; q < std::min(begin + part, count); q += LANES) {
        if (q / LANES % TOGETHER == 0) ahead.step();
        const Vector of = load(sums + q);
        for (int n = 0; n < N; n++) some[n] += of * load(map + taps[n].offset + q);
      }
      for (int n = 0; n < N; n++) total[n] += some[n];
    }
    for (int n = 0; n < N; n++) kernel[taps[n].weight] = ::total<Number>(total[n]);
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
      Buffer<Number> kernel(numbers);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        lay_out(kernels + s * z.channels * weights, kernel.data());
        pixels.add_up(input + s * inputs, pixels.output, {0, z.rows}, kernel.data(), output + s * outputs);
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      Buffer<Number> kernel(numbers), kernel_grad(numbers);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        const Pixel *map = input + s * inputs, *map_grad = grad + s * outputs;
        std::fill(kernel_grad.begin(), kernel_grad.end(), Number(0));
        if (input_grad) lay_out(kernels + s * z.channels * weights, kernel.data());
        int64_t given = 0;
        for (int64_t r = 0; r <= z.rows; r++) {
          if (kernels_grad && r < z.rows) pixels.multiply(map, map_grad, {r, r + 1}, kernel_grad.data());
          // Rows of the input that meet no later ones of the gradient, while these are near.
          const int64_t first = given;
          while (input_grad && given < z.height && pixels.input.reached[given] <= r + 1) given++;
          pixels.add_up(map_grad, pixels.input, {first, given}, kernel.data(), input_grad + s * inputs);
        }
        if (kernels_grad) lay_back(kernel_grad.data(), kernels_grad + s * z.channels * weights);
      }
    }
  }

 private:
  // Lay the weights of a sample's kernels out as maps are, vector by vector.
  void lay_out(const Pixel *kernels, Number *kernel) const {
    for (int64_t v = 0; v * LANES < z.channels; v++)
      transpose(kernels + pixels.first_of(v) * weights, weights, LANES, weights, kernel + v * LANES, pixels.pitch);
  }

  void lay_back(const Number *kernel, Pixel *kernels) const {
    for (int64_t v = 0; v * LANES < z.channels; v++)
      transpose(kernel + v * LANES, pixels.pitch, weights, LANES, kernels + pixels.first_of(v) * weights, weights);
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
    Buffer<Number> input, output, kernel, result;
  };
  Maps maps() const {
    return {Buffer<Number>(pixels.output.room() * LANES), Buffer<Number>(pixels.input.room() * LANES),
            Buffer<Number>(weights * LANES), Buffer<Number>(std::max(inputs, outputs) * LANES)};
  }

 public:
  explicit PlanesTogether(const Sizes &sizes) : z(sizes), pixels(sizes, LANES, true) {}

  void forward(Pixel *output, const Pixel *input, const Pixel *kernels) const {
#pragma omp parallel num_threads(threads)
    {
      Maps of = maps();
      Ahead ahead;
      const AheadStep step = {ahead};
#pragma omp for
      for (int64_t p = 0; p < planes; p += LANES) {
        const int64_t count = std::min(LANES, planes - p);
        ahead.begin();
        ahead.add(input, (p + LANES) * inputs, LANES * inputs);
        ahead.add(output, (p + LANES) * outputs, LANES * outputs);
        take(kernels + p * weights, weights, count, of.kernel, InOrder(), step);
        take(input + p * inputs, inputs, count, of.input, at(of_input), step);
        pixels.add_up(met(of.input, pixels.output), pixels.output, {0, z.rows}, of.kernel.data(), of.result.data(),
                      step);
        give(of.result, outputs, count, output + p * outputs, step);
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(threads)
    {
      Maps of = maps();
      Ahead ahead;
      const AheadStep step = {ahead};
#pragma omp for
      for (int64_t p = 0; p < planes; p += LANES) {
        const int64_t count = std::min(LANES, planes - p);
        ahead.begin();
        ahead.add(grad, (p + LANES) * outputs, LANES * outputs);
        if (kernels_grad) ahead.add(input, (p + LANES) * inputs, LANES * inputs);
        if (input_grad) ahead.add(input_grad, (p + LANES) * inputs, LANES * inputs);
        take(grad + p * outputs, outputs, count, of.output, at(of_output), step);
        if (kernels_grad) {
          take(input + p * inputs, inputs, count, of.input, at(of_input), step);
          std::fill(of.kernel.begin(), of.kernel.end(), Number(0));
          pixels.multiply(met(of.input, pixels.output), met(of.output, pixels.input), {0, z.rows}, of.kernel.data(),
                          step);
          give(of.kernel, weights, count, kernels_grad + p * weights, step);
        }
        if (input_grad) {
          take(kernels + p * weights, weights, count, of.kernel, InOrder(), step);
          pixels.add_up(met(of.output, pixels.input), pixels.input, {0, z.height}, of.kernel.data(), of.result.data(),
                        step);
          give(of.result, inputs, count, input_grad + p * inputs, step);
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

  template <typename Side> static const Number *met(const Buffer<Number> &map, const Side &side) {
    return map.data() + side.front * LANES;
  }

  // Turn some planes, or back.
  template <typename Place, typename Each>
  static void take(const Pixel *planes, int64_t length, int64_t count, Buffer<Number> &to, Place place,
                   Each each) {
    transpose(planes, length, count, length, to.data(), LANES, 0, place, each);
  }
  template <typename Each>
  static void give(const Buffer<Number> &from, int64_t length, int64_t count, Pixel *planes, Each each) {
    transpose(from.data(), LANES, length, count, planes, length, 0, InOrder(), each);
  }
};

template <typename Pixel, typename Function> void with_planes(const Sizes &z, Function function) {
  if (z.together) return function(PlanesTogether<Pixel>(z));
  function(PlaneByPlane<Pixel>(z));
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
