// Depthwise convolution and its gradients in vectors of channels, of maps that lie pixel by pixel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

struct Sizes {  // in the order in which Python gives them
  int64_t samples, channels, height, width, rows, columns, kernel_rows, kernel_columns, down, right, above, left,
      dilation_rows, dilation_columns, threads, together;
};

// Of as many channels as a vector has, or more; the last two vectors may overlap. Padding is skipped, as torch skips
// it. If the caller lays zeros between rows, those beside a row are multiplied too where the columns at the edge then
// belong to longer runs and less is loaded; so infinite weights and gradients may give NaN to more there. `fetches`
// lets the cache fetch the next rows, which pays unless the maps are near already; `each` is called with each run.
template <typename Pixel, bool fetches> class Pixels {
  using Number = typename Computed<Pixel>::Number;
  static constexpr int LANES = ::LANES<Number>, TOGETHER = 8;  // columns of a run
  using Vector = ::Vector<Number>;

  struct Meeting {
    int64_t weight, place;  // which row or column of the kernel, and where on the other side, or in zeros beside it
    bool operator==(const Meeting &other) const { return weight == other.weight && place == other.place; }
  };
  using Meetings = std::vector<std::vector<Meeting>>;  // of each row or column of one side

  // Rows or columns.
  struct Axis {
    int64_t outputs, inputs, step, before, weights, dilation;

    // What those of the output meet of the input, or the other way round; places ascend.
    Meetings meetings(bool back, bool zeros) const {
      const int64_t count = back ? inputs : outputs, met = back ? outputs : inputs;
      Meetings found(count);
      for (int64_t o = 0; o < count; o++)
        for (int64_t i = 0; i < weights; i++) {
          const int64_t weight = back ? weights - 1 - i : i;
          const int64_t distance = back ? o + before - weight * dilation : o * step - before + weight * dilation;
          const int64_t place = back ? distance / step : distance;
          const bool meets = !back || distance % step == 0;
          if (meets && (zeros || (place >= 0 && place < met))) found[o].push_back({weight, place});
        }
      return found;
    }
  };

  // Columns, `step` apart, that meet the same weights, at places `met_step` apart; `met` is what the first one meets.
  struct Run {
    int64_t first, count;
    std::vector<Meeting> met;
  };

  struct Side {
    int64_t width, met_height, met_width, step, met_step;
    int64_t front;  // zeros before the other side's first row; `met_width` has those between rows
    Meetings rows;
    std::vector<Run> runs;
    std::vector<int64_t> reached;  // rows of the other side up to the last that each row, or one before it, meets

    // The same for a row that may be one of the next sample.
    int64_t reach(int64_t row) const {
      const int64_t height = reached.size();
      return row / height * met_height + reached[row % height];
    }

    int64_t room() const { return front + met_height * met_width; }  // of the other side
  };

  const Sizes &z;
  const int64_t channels, vectors = (channels + LANES - 1) / LANES;

 public:
  const int64_t pitch = vectors * LANES;  // of the weights, which lie vector by vector
  std::vector<int64_t> first;             // channel of each vector
  Side output, input;

  Pixels(const Sizes &sizes, int64_t channels, bool zeros) : z(sizes), channels(channels) {
    const Axis rows = {z.rows, z.height, z.down, z.above, z.kernel_rows, z.dilation_rows};
    const Axis columns = {z.columns, z.width, z.right, z.left, z.kernel_columns, z.dilation_columns};
    output = side(rows, columns, false, zeros), input = side(rows, columns, true, zeros);
    for (int64_t v = 0; v < vectors; v++) first.push_back(std::min(v * LANES, channels - LANES));
  }

  // Give each pixel of a side the sum of those that it meets, each times a weight; `from` has the other side's zeros.
  template <typename Each = Nothing>
  void add_up(const Pixel *from, const Side &side, const Number *kernel, Pixel *to, Each each = Each()) const {
    for_runs(from, side, to, each, [&](auto count, int64_t r, const Run &run, int64_t v) {
      Vector sum[count] = {};
      for (const Meeting &row : side.rows[r])
        for (const Meeting &column : run.met) {
          const Pixel *pixel = from + (row.place * side.met_width + column.place) * channels + first[v];
          const auto weight = load(kernel + (row.weight * z.kernel_columns + column.weight) * pitch + v * LANES);
          for (int i = 0; i < count; i++) sum[i] += weight * load(pixel + i * side.met_step * channels);
        }
      Pixel *pixel = to + (r * side.width + run.first) * channels + first[v];
      for (int i = 0; i < count; i++) store(sum[i], pixel + i * side.step * channels);
    });
  }

  // Multiply what each weight sees with the output's gradient; both have their zeros.
  template <typename Each = Nothing>
  void multiply(const Pixel *map, const Pixel *grad, Number *kernel, Each each = Each()) const {
    std::fill_n(kernel, z.kernel_rows * z.kernel_columns * pitch, Number(0));
    for_runs(map, output, grad, each, [&](auto count, int64_t r, const Run &run, int64_t v) {
      Vector of[count];
      const Pixel *pixel = grad + (r * input.met_width + run.first) * channels + first[v];
      for (int i = 0; i < count; i++) of[i] = load(pixel + i * channels);
      for (const Meeting &row : output.rows[r])
        for (const Meeting &column : run.met) {
          const Pixel *pixel = map + (row.place * output.met_width + column.place) * channels + first[v];
          Number *sum = kernel + (row.weight * z.kernel_columns + column.weight) * pitch + v * LANES;
          Vector total = load(sum);
          for (int i = 0; i < count; i++) total += of[i] * load(pixel + i * z.right * channels);
          store(total, sum);
        }
    });
  }

 private:
  static Side side(const Axis &rows, const Axis &columns, bool back, bool zeros) {
    const int64_t step = back ? columns.step : 1, met_step = back ? 1 : columns.step;
    const int64_t width = back ? columns.inputs : columns.outputs, met_width = back ? columns.outputs : columns.inputs;
    const auto met = rows.meetings(back, false);
    auto found = runs(columns.meetings(back, false), step, met_step);
    int64_t front = 0, behind = 0;
    if (zeros) {
      const auto beside = columns.meetings(back, true);
      if (auto longer = runs(beside, step, met_step); loads(longer) < loads(found)) {
        found = std::move(longer);
        for (const auto &meetings : beside)
          for (const Meeting &meeting : meetings)
            front = std::max(front, -meeting.place), behind = std::max(behind, meeting.place + 1 - met_width);
      }
    }
    return {width, back ? rows.outputs : rows.inputs, met_width + std::max(front, behind), step, met_step, front, met,
            found, reached(met)};
  }

  // Vectors that are loaded for a row of the kernel: a weight, and what it is multiplied with.
  static int64_t loads(const std::vector<Run> &runs) {
    int64_t found = 0;
    for (const Run &run : runs) found += run.met.size() * (1 + run.count);
    return found;
  }

  static std::vector<int64_t> reached(const Meetings &rows) {
    std::vector<int64_t> found;
    int64_t reached = 0;
    for (const auto &met : rows) {
      if (!met.empty()) reached = std::max(reached, met.back().place + 1);
      found.push_back(reached);
    }
    return found;
  }

  static std::vector<Run> runs(const Meetings &columns, int64_t step, int64_t met_step) {
    const int64_t count = columns.size();
    std::vector<Run> found;
    for (int64_t phase = 0; phase < std::min(step, count); phase++)
      for (int64_t first = phase, next; first < count; first = next) {
        auto met = columns[first];
        const auto meets_the_same = [&](int64_t column) {
          for (Meeting &meeting : met) meeting.place += met_step;
          return columns[column] == met;
        };
        next = first + step;
        while (next < count && meets_the_same(next)) next += step;
        const int64_t length = (next - first) / step, parts = (length + TOGETHER - 1) / TOGETHER;
        for (int64_t p = 0; p < parts; p++) {  // as equal as can be
          const int64_t begin = length * p / parts, end = length * (p + 1) / parts, column = first + begin * step;
          found.push_back({column, end - begin, columns[column]});
        }
      }
    return found;
  }

  // Call with each row of a side, its runs, and each vector.
  template <typename Each, typename Function>
  void for_runs(const Pixel *from, const Side &side, const Pixel *of, Each each, Function function) const {
    for (size_t r = 0; r < side.rows.size(); r++)
      for (const Run &run : side.runs)
        for (int64_t v = 0; v < vectors; v++) {
          each();
          if (fetches) fetch_run(from + first[v], side, of + first[v], r + 1, run);
          with_constant<TOGETHER>(run.count, [&](auto count) { function(count, r, run, v); });
        }
  }

  // Let the cache fetch a run of a row, which may be the next sample's, and what it is the first one to meet.
  ALWAYS_INLINE void fetch_run(const Pixel *from, const Side &side, const Pixel *of, int64_t row,
                               const Run &run) const {
    fetch_pixels(of, row * side.width + run.first, run.count, side.step);
    if (run.met.empty()) return;
    const int64_t begin = run.met[0].place, end = std::min(begin + side.met_step, run.met.back().place + 1);
    for (int64_t place = side.reach(row - 1); place < side.reach(row); place++)
      for (int64_t p = begin; p < end; p++)
        fetch_pixels(from, place * side.met_width + p, run.count, side.met_step);
  }

  ALWAYS_INLINE void fetch_pixels(const Pixel *map, int64_t first, int64_t count, int64_t step) const {
    for (int64_t i = 0; i < count; i++) fetch(map, (first + i * step) * channels);
  }
};

}  // namespace
