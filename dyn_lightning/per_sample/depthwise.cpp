// Depthwise convolution and its gradients, of maps that lie plane by plane (a channel of a sample), and of those that
// lie pixel by pixel, with their channels side by side.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

// What only fetches: the compiler takes a call that is left for one without an effect.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace {

struct Sizes {  // in the order in which Python gives them
  int64_t samples, channels, height, width, rows, columns, kernel_rows, kernel_columns, down, right, above, left,
      dilation_rows, dilation_columns, threads;
};

struct Tap {
  int64_t weight, offset;  // which of the kernel's, and how far from the output's position its pixel lies
};

struct BFloat16 {
  uint16_t bits;
};

template <typename Pixel> struct Computed { using Number = Pixel; };
template <> struct Computed<BFloat16> { using Number = float; };
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

// Copy N to 2 N bytes.
template <int N> inline void copy_ends(const char *from, int64_t bytes, char *to) {
  typedef char Part __attribute__((vector_size(N), aligned(1), may_alias));
  const Part first = *(const Part *)from, last = *(const Part *)(from + bytes - N);
  *(Part *)to = first, *(Part *)(to + bytes - N) = last;
}

// Rows are short: to call memcpy for each would take longer than all products of a small map.
inline void copy(const char *from, int64_t bytes, char *to) {
  for (; bytes > 2 * BYTES; bytes -= BYTES, from += BYTES, to += BYTES) copy_ends<BYTES>(from, BYTES, to);
  if (bytes >= BYTES) return copy_ends<BYTES>(from, bytes, to);
  if (bytes >= 32) return copy_ends<32>(from, bytes, to);
  if (bytes >= 16) return copy_ends<16>(from, bytes, to);
  if (bytes >= 8) return copy_ends<8>(from, bytes, to);
  if (bytes >= 4) return copy_ends<4>(from, bytes, to);
}

template <typename Pixel> void widen(const Pixel *from, int64_t count, Pixel *to) {
  copy((const char *)from, count * sizeof(Pixel), (char *)to);
}

void widen(const BFloat16 *from, int64_t count, float *to) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = uint32_t(from[i].bits) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

template <typename Pixel> void narrow(const Pixel *from, int64_t count, Pixel *to) { widen(from, count, to); }

void narrow(const float *from, int64_t count, BFloat16 *to) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i].bits = is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
}

// Let the cache fetch what the next plane has in the place of a row, or gets there, while this one's is computed. By
// number, since after the last plane there is none.
template <typename Pixel> ALWAYS_INLINE void fetch(const Pixel *row, int64_t plane, int64_t count) {
  const uintptr_t next = uintptr_t(row) + plane * sizeof(Pixel);
  const uintptr_t end = next + count * sizeof(Pixel);
  for (uintptr_t line = next; line < end; line += 64) __builtin_prefetch((const void *)line, 0, 2);
}

// A padded plane is taken apart by the stride into phases: what one position of a kernel sees, as the kernel steps over
// the plane, lies side by side in one of them. The rows of a phase follow each other with as many zeros between as a
// kernel reaches over, so forward pass and gradients are sums and products of shifted vectors, without an edge. What is
// computed for the columns in between is dropped, or multiplied with zero; so where torch skips padding, infinite
// numbers may give NaN to more of a gradient here.
template <typename Pixel> class PlaneByPlane {
  using Number = typename Computed<Pixel>::Number;
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

  void forward(Pixel *output, const Pixel *input, const Pixel *kernels) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(phases * room), sums(room), row(line()), kernel(weights);
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        widen(kernels + p * weights, weights, kernel.data());
        split(input + p * inputs, map.data(), row.data());
        add_up(map.data(), seen, kernel.data(), z.rows * pitch, sums.data());
        Pixel *to = output + p * outputs;
        for (int64_t r = 0; r < z.rows; r++, to += z.columns) {
          fetch(to, outputs, z.columns);
          narrow(sums.data() + r * pitch, z.columns, to);
        }
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *input, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> map(kernels_grad ? phases * room : 0), map_grad(input_grad ? phases * room : 0);
      std::vector<Number> row(line()), row_grad(line()), sums_grad(front + room), kernel(weights);
#pragma omp for
      for (int64_t p = 0; p < planes; p++) {
        Number *sums = sums_grad.data() + front;
        const Pixel *from = grad + p * outputs;
        for (int64_t r = 0; r < z.rows; r++, from += z.columns) {
          fetch(from, outputs, z.columns);
          widen(from, z.columns, sums + r * pitch);
        }
        if (kernels_grad) {
          split(input + p * inputs, map.data(), row.data());
          multiply(map.data(), sums, kernel.data());
          narrow(kernel.data(), weights, kernels_grad + p * weights);
        }
        if (input_grad) {
          widen(kernels + p * weights, weights, kernel.data());
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
  void split(const Pixel *map, Number *phase, Number *row) const {
    for (int64_t a = 0; a < z.down; a++, phase += z.right * room)
      for (int64_t l = 0; l < lines; l++) {
        const int64_t r = l * z.down + a - z.above;
        if (r < 0 || r >= used_rows()) continue;
        Number *to = phase + l * pitch;
        fetch(map + r * z.width, inputs, z.width);
        if (z.right == 1) {
          widen(map + r * z.width, used(), to + z.left);
          continue;
        }
        widen(map + r * z.width, used(), row + z.left);
        if (z.right == 2)
          for (int64_t c = 0; c < pitch; c++) to[c] = row[2 * c], to[room + c] = row[2 * c + 1];
        else
          for (int64_t b = 0; b < z.right; b++)
            for (int64_t c = 0; c < pitch; c++) to[b * room + c] = row[c * z.right + b];
      }
  }

  // The other way round, with zeros for what no kernel sees: nothing is written there into the row, which was zero.
  void join(const Number *phases, Pixel *map, Number *row) const {
    for (int64_t r = 0; r < z.height; r++, map += z.width) {
      const int64_t l = (r + z.above) / z.down, a = (r + z.above) % z.down;
      const Number *from = phases + a * z.right * room + l * pitch;
      fetch(map, inputs, z.width);
      if (l >= lines)
        std::memset(map, 0, z.width * sizeof(Pixel));
      else if (z.right == 1 && z.left + z.width <= pitch)
        narrow(from + z.left, z.width, map);
      else {
        if (z.right == 2)
          for (int64_t c = 0; c < pitch; c++) row[2 * c] = from[c], row[2 * c + 1] = from[room + c];
        else
          for (int64_t b = 0; b < z.right; b++)
            for (int64_t c = 0; c < pitch; c++) row[c * z.right + b] = from[b * room + c];
        narrow(row + z.left, z.width, map);
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

// In vectors of channels, of which there must be as many as a vector has; the last two vectors may overlap. Padding is
// skipped, as torch skips it.
template <typename Pixel> class PixelByPixel {
  using Number = typename Computed<Pixel>::Number;
  static constexpr int LANES = ::LANES<Number>, TOGETHER = 8;  // columns of a run
  using Vector = ::Vector<Number>;

  struct Meeting {
    int64_t weight, place;  // which row or column of the kernel, and where on the other side
    bool operator==(const Meeting &other) const { return weight == other.weight && place == other.place; }
  };
  using Meetings = std::vector<std::vector<Meeting>>;  // of each row or column of one side

  // Columns, `step` apart, that meet the same weights, at places `met_step` apart. `met` is what the first one meets,
  // and [begin, end) are its places, as far as those are not the next one's too.
  struct Run {
    int64_t first, count;
    std::vector<Meeting> met;
    int64_t begin, end;
  };
  struct Side {
    int64_t width, met_width, step, met_step;
    Meetings rows;
    std::vector<Run> runs;
    int64_t met_height;
    std::vector<int64_t> reached;  // rows of the other side up to the last that each row, or one before it, meets

    // The same for a row that may be one of the next sample.
    int64_t reach(int64_t row) const {
      const int64_t height = reached.size();
      return row / height * met_height + reached[row % height];
    }
  };

  const Sizes &z;
  const int64_t weights = z.kernel_rows * z.kernel_columns;
  const int64_t vectors = (z.channels + LANES - 1) / LANES, pitch = vectors * LANES;
  Side output, input;
  std::vector<int64_t> first;  // channel of each vector

 public:
  explicit PixelByPixel(const Sizes &sizes) : z(sizes) {
    const auto rows = meetings(z.rows, z.down, z.above, z.kernel_rows, z.dilation_rows, z.height);
    const auto columns = meetings(z.columns, z.right, z.left, z.kernel_columns, z.dilation_columns, z.width);
    output = side(z.columns, z.width, 1, z.right, rows, columns, z.height);
    input = side(z.width, z.columns, z.right, 1, turned(rows, z.height), turned(columns, z.width), z.rows);
    for (int64_t v = 0; v < vectors; v++) first.push_back(std::min(v * LANES, z.channels - LANES));
  }

  void forward(Pixel *to, const Pixel *from, const Pixel *kernels) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> kernel(weights * pitch);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        lay_out(kernels + s * z.channels * weights, kernel.data());
        add_up(from + s * inputs(), output, kernel.data(), to + s * outputs());
      }
    }
  }

  // What is not wanted is null.
  void backward(const Pixel *grad, const Pixel *map, const Pixel *kernels, Pixel *input_grad,
                Pixel *kernels_grad) const {
#pragma omp parallel num_threads(z.threads)
    {
      std::vector<Number> kernel(weights * pitch);
#pragma omp for
      for (int64_t s = 0; s < z.samples; s++) {
        const Pixel *from = grad + s * outputs();
        if (kernels_grad) {
          multiply(map + s * inputs(), from, kernel.data());
          lay_back(kernel.data(), kernels_grad + s * z.channels * weights);
        }
        if (input_grad) {
          lay_out(kernels + s * z.channels * weights, kernel.data());
          add_up(from, input, kernel.data(), input_grad + s * inputs());
        }
      }
    }
  }

 private:
  int64_t inputs() const { return z.height * z.width * z.channels; }
  int64_t outputs() const { return z.rows * z.columns * z.channels; }

  static Meetings meetings(int64_t outputs, int64_t step, int64_t before, int64_t weights, int64_t dilation,
                           int64_t inputs) {
    Meetings found(outputs);
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t w = 0; w < weights; w++) {
        const int64_t place = o * step - before + w * dilation;
        if (place >= 0 && place < inputs) found[o].push_back({w, place});
      }
    return found;
  }

  static Meetings turned(const Meetings &meetings, int64_t count) {
    Meetings found(count);
    for (size_t o = 0; o < meetings.size(); o++)
      for (const Meeting &met : meetings[o]) found[met.place].push_back({met.weight, int64_t(o)});
    return found;
  }

  // Lay the weights of a sample's kernels out as maps are, vector by vector.
  void lay_out(const Pixel *kernels, Number *kernel) const {
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t lane = 0; lane < LANES; lane++)
        for (int64_t w = 0; w < weights; w++)
          widen(kernels + (first[v] + lane) * weights + w, 1, kernel + w * pitch + v * LANES + lane);
  }

  void lay_back(const Number *kernel, Pixel *kernels) const {
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t lane = 0; lane < LANES; lane++)
        for (int64_t w = 0; w < weights; w++)
          narrow(kernel + w * pitch + v * LANES + lane, 1, kernels + (first[v] + lane) * weights + w);
  }

  static Side side(int64_t width, int64_t met_width, int64_t step, int64_t met_step, const Meetings &rows,
                   const Meetings &columns, int64_t met_height) {
    Side side = {width, met_width, step, met_step, rows, {}, met_height, {}};
    int64_t known = 0;
    for (const auto &of_row : rows) {
      if (!of_row.empty()) known = std::max(known, of_row.back().place + 1);
      side.reached.push_back(known);
    }
    auto &found = side.runs;
    const int64_t count = columns.size();
    for (int64_t phase = 0; phase < std::min(step, count); phase++)
      for (int64_t first = phase, next; first < count; first = next) {
        auto met = columns[first];
        const auto meets_the_same = [&](int64_t column) {
          for (Meeting &meeting : met) meeting.place += met_step;
          return columns[column] == met;
        };
        next = first + step;
        while (next < count && next - first < TOGETHER * step && meets_the_same(next)) next += step;
        const auto &met_first = columns[first];
        const int64_t begin = met_first.empty() ? 0 : met_first[0].place;
        const int64_t end = met_first.empty() ? 0 : std::min(begin + met_step, met_first.back().place + 1);
        found.push_back({first, (next - first) / step, met_first, begin, end});
      }
    return side;
  }

  // Give each pixel of a side the sum of those that it meets, each times a weight.
  void add_up(const Pixel *from, const Side &side, const Number *kernel, Pixel *to) const {
    for_runs(from, side, to, [&](auto count, int64_t r, const Run &run, int64_t v) {
      Vector sum[count] = {};
      for (const Meeting &row : side.rows[r])
        for (const Meeting &column : run.met) {
          const Pixel *pixel = from + (row.place * side.met_width + column.place) * z.channels + first[v];
          const auto weight = load(kernel + (row.weight * z.kernel_columns + column.weight) * pitch + v * LANES);
#pragma GCC unroll 8
          for (int i = 0; i < count; i++) sum[i] += weight * load(pixel + i * side.met_step * z.channels);
        }
      Pixel *pixel = to + (r * side.width + run.first) * z.channels + first[v];
#pragma GCC unroll 8
      for (int i = 0; i < count; i++) store(sum[i], pixel + i * side.step * z.channels);
    });
  }

  // Multiply what each weight sees with the output's gradient.
  void multiply(const Pixel *map, const Pixel *grad, Number *kernel) const {
    std::fill(kernel, kernel + weights * pitch, Number(0));
    for_runs(map, output, grad, [&](auto count, int64_t r, const Run &run, int64_t v) {
      Vector of[count];
      const Pixel *pixel = grad + (r * z.columns + run.first) * z.channels + first[v];
#pragma GCC unroll 8
      for (int i = 0; i < count; i++) of[i] = load(pixel + i * z.channels);
      for (const Meeting &row : output.rows[r])
        for (const Meeting &column : run.met) {
          const Pixel *pixel = map + (row.place * z.width + column.place) * z.channels + first[v];
          Number *sum = kernel + (row.weight * z.kernel_columns + column.weight) * pitch + v * LANES;
          Vector total = load(sum);
#pragma GCC unroll 8
          for (int i = 0; i < count; i++) total += of[i] * load(pixel + i * z.right * z.channels);
          store(total, sum);
        }
    });
  }

  // Call with each row of a side, its runs, and each vector, and let the cache fetch what the next row needs there.
  template <typename Function>
  void for_runs(const Pixel *from, const Side &side, const Pixel *of, Function function) const {
    for (size_t r = 0; r < side.rows.size(); r++)
      for (const Run &run : side.runs)
        for (int64_t v = 0; v < vectors; v++) {
          fetch_run(of + first[v], (r + 1) * side.width + run.first, run.count, side.step);
          for (int64_t place = side.reach(r); place < side.reach(r + 1); place++)
            for (int64_t p = run.begin; p < run.end; p++)
              fetch_run(from + first[v], place * side.met_width + p, run.count, side.met_step);
          with_constant<TOGETHER>(run.count, [&](auto count) { function(count, r, run, v); });
        }
  }

  ALWAYS_INLINE void fetch_run(const Pixel *map, int64_t pixel, int64_t count, int64_t step) const {
    uintptr_t line = uintptr_t(map) + pixel * z.channels * sizeof(Pixel);
    for (int64_t i = 0; i < count; i++, line += step * z.channels * sizeof(Pixel))
      __builtin_prefetch((const void *)line, 0, 2);
  }
};

}  // namespace

#define FUNCTIONS(name, Class, Pixel)                                                                           \
  extern "C" void forward_##name(const Sizes *sizes, Pixel *output, const Pixel *input, const Pixel *kernels) { \
    Class<Pixel>(*sizes).forward(output, input, kernels);                                                       \
  }                                                                                                             \
  extern "C" void backward_##name(const Sizes *sizes, const Pixel *grad, const Pixel *input,                    \
                                  const Pixel *kernels, Pixel *input_grad, Pixel *kernels_grad) {               \
    Class<Pixel>(*sizes).backward(grad, input, kernels, input_grad, kernels_grad);                              \
  }

FUNCTIONS(float32, PlaneByPlane, float)
FUNCTIONS(float64, PlaneByPlane, double)
FUNCTIONS(bfloat16, PlaneByPlane, BFloat16)
FUNCTIONS(last_float32, PixelByPixel, float)
FUNCTIONS(last_float64, PixelByPixel, double)
FUNCTIONS(last_bfloat16, PixelByPixel, BFloat16)
