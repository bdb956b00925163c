// Depthwise convolution and its gradients in vectors of channels, of maps that lie pixel by pixel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
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
  static constexpr int LANES = ::LANES<Number>;
  static constexpr int TOGETHER = 8, CHAIN = 3;  // columns of a run, and weights of a chain
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

  // What a row or column meets, in equal steps: how many, the first weight and place, and how far it is to the next
  // ones, in numbers.
  struct Met {
    int64_t count = 0, weight = 0, place = 0, weight_step = 0, place_step = 0;

    Met(const std::vector<Meeting> &met, int64_t weight_pitch, int64_t place_pitch) : count(met.size()) {
      if (count > 0) weight = met[0].weight * weight_pitch, place = met[0].place * place_pitch;
      if (count > 1) {
        weight_step = met[1].weight * weight_pitch - weight;
        place_step = met[1].place * place_pitch - place;
      }
    }
  };

  // Columns, `step` apart, that meet the same weights, at places `met_step` apart, and what the first one meets. With
  // the weights of a chain, what a column meets with one is what the column before it meets with the next.
  struct Run {
    int64_t first, count;
    Met met;
    bool has_chains;
    int64_t begin, end;  // columns of the other side that its first one is the first to meet

    // Vectors that are loaded for a row of the kernel: weights, and what they are multiplied with.
    int64_t loads() const {
      const int64_t chain = has_chains ? CHAIN : 1;
      return met.count / chain * (2 * chain - 1 + count);
    }
  };

  struct Rows {
    int64_t first, last;
  };

  struct Side {
    int64_t width, met_height, met_width, step, met_step;
    int64_t front;  // zeros before the other side's first row; `met_width` has those between rows
    std::vector<Met> rows;
    std::vector<Run> runs;
    // Rows of the other side up to the last that each row, or one before it, meets; and the next sample's first row.
    std::vector<int64_t> reached;

    int64_t room() const { return front + met_height * met_width; }  // of the other side
  };

  const Sizes &z;
  const int64_t channels, vectors = (channels + LANES - 1) / LANES;

 public:
  const int64_t pitch = vectors * LANES;  // of the weights, which lie vector by vector
  Side output, input;

  Pixels(const Sizes &sizes, int64_t channels, bool zeros) : z(sizes), channels(channels) {
    const Axis rows = {z.rows, z.height, z.down, z.above, z.kernel_rows, z.dilation_rows};
    const Axis columns = {z.columns, z.width, z.right, z.left, z.kernel_columns, z.dilation_columns};
    output = side(rows, columns, false, zeros), input = side(rows, columns, true, zeros);
  }

  // Channel with which a vector begins.
  int64_t first_of(int64_t vector) const { return std::min(vector * LANES, channels - LANES); }

  // Give the pixels of some rows the sums of those that they meet, each times a weight; `from` has the other side's
  // zeros.
  template <typename Each = Nothing>
  void add_up(const Pixel *from, const Side &side, Rows rows, const Number *kernel, Pixel *to,
              Each each = Each()) const {
    for_runs(side, rows, side.width, [&](auto count, auto chain, int64_t pixel, const Work &work) {
      add_up_run<count, chain>(work, from, kernel, to + pixel, each);
    });
  }

  // Add the products of what each weight sees with some rows of the output's gradient; both have their zeros.
  template <typename Each = Nothing>
  void multiply(const Pixel *map, const Pixel *grad, Rows rows, Number *kernel, Each each = Each()) const {
    for_runs(output, rows, input.met_width, [&](auto count, auto chain, int64_t pixel, const Work &work) {
      multiply_run<count, chain>(work, map, grad + pixel, kernel, each);
    });
  }

 private:
  Side side(const Axis &rows, const Axis &columns, bool back, bool zeros) const {
    const int64_t step = back ? columns.step : 1, met_step = back ? 1 : columns.step;
    const int64_t width = back ? columns.inputs : columns.outputs, met_width = back ? columns.outputs : columns.inputs;
    const int64_t met_height = back ? rows.outputs : rows.inputs;
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
    const int64_t met_pitch = met_width + std::max(front, behind);
    std::vector<Met> met_rows;
    const auto meetings = rows.meetings(back, false);
    for (const auto &of : meetings) met_rows.emplace_back(of, z.kernel_columns * pitch, met_pitch * channels);
    return {width, met_height, met_pitch, step, met_step, front, met_rows, found,
            reached(meetings, met_height)};
  }

  static int64_t loads(const std::vector<Run> &runs) {
    int64_t found = 0;
    for (const Run &run : runs) found += run.loads();
    return found;
  }

  static std::vector<int64_t> reached(const Meetings &rows, int64_t met_height) {
    std::vector<int64_t> found;
    int64_t reached = 0;
    for (const auto &met : rows) {
      if (!met.empty()) reached = std::max(reached, met.back().place + 1);
      found.push_back(reached);
    }
    found.push_back(met_height + (found.empty() ? 0 : found[0]));
    return found;
  }

  std::vector<Run> runs(const Meetings &columns, int64_t step, int64_t met_step) const {
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
          found.push_back(run(column, end - begin, columns[column], met_step));
        }
      }
    return found;
  }

  Run run(int64_t first, int64_t count, const std::vector<Meeting> &meetings, int64_t met_step) const {
    const Met met(meetings, pitch, channels);
    const bool has_chains = count > 1 && met.count % CHAIN == 0 && met.place_step == met_step * channels;
    if (meetings.empty()) return {first, count, met, false, 0, 0};
    const int64_t begin = meetings[0].place, end = std::min(begin + met_step, meetings.back().place + 1);
    return {first, count, met, has_chains, begin, end};
  }

  // What a run of a row is computed of: how far its pixels, and those that they meet with one weight, are from each
  // other; and what is to be fetched: the same run of the next row, which may be the next sample's, and what that is
  // the first one to meet, so many rows and columns.
  struct Work {
    Met row, column;
    int64_t channels, vectors, step, met_step;
    struct {
      int64_t run, met, rows, columns, row_step;
    } next;
  };

  // Call with each run of some rows of a side, and where its first pixel lies in maps that are so wide.
  template <typename Function>
  void for_runs(const Side &side, Rows rows, int64_t width, Function function) const {
    for (int64_t r = rows.first; r < rows.last; r++)
      for (const Run &run : side.runs) {
        const int64_t pixel = (r * width + run.first) * channels, row_step = side.met_width * channels;
        const int64_t met = side.reached[r] * row_step + run.begin * channels;
        const int64_t rows = side.reached[r + 1] - side.reached[r];
        const Work work = {side.rows[r], run.met, channels, vectors, side.step * channels, side.met_step * channels,
                           {width * channels, met, rows, run.end - run.begin, row_step}};
        with_constant<TOGETHER>(run.count, [&](auto count) {
          if constexpr (count > 1)
            if (run.has_chains) return function(count, std::integral_constant<int, CHAIN>(), pixel, work);
          function(count, std::integral_constant<int, 1>(), pixel, work);
        });
      }
  }

  // Each kind of run has a function of its own, so that the compiler has registers enough, with a copy of what it is to
  // do: what is stored might change the original.
  template <int count, int chain, typename Each>
  __attribute__((noinline)) static void add_up_run(const Work &work, const Pixel *from, const Number *kernel,
                                                   Pixel *to, Each each) {
    const Work w = work;
    for_vectors<count>(w, from, to, each, [&](int64_t weight, int64_t channel) __attribute__((always_inline)) {
      Vector sum[count] = {};
      const auto add = [&](const Pixel *pixel, const Number *weight) __attribute__((always_inline)) {
        Vector met[count + chain - 1];
        for (int i = 0; i < count + chain - 1; i++) {
          met[i] = load(pixel + i * w.met_step);
          if (chain > 1) keep(met[i]);
        }
        for (int c = 0; c < chain; c++) {
          const Vector of = load(weight + c * w.column.weight_step);
          for (int i = 0; i < count; i++) sum[i] += of * met[i + c];
        }
      };
      for_chains<chain>(w, from + channel, kernel + weight, add);
      for (int i = 0; i < count; i++) store(sum[i], to + channel + i * w.step);
    });
  }

  template <int count, int chain, typename Each>
  __attribute__((noinline)) static void multiply_run(const Work &work, const Pixel *map, const Pixel *grad,
                                                     Number *kernel, Each each) {
    const Work w = work;
    for_vectors<count>(w, map, grad, each, [&](int64_t weight, int64_t channel) __attribute__((always_inline)) {
      Vector of[count];
      for (int i = 0; i < count; i++) of[i] = load(grad + channel + i * w.step);
      const auto add = [&](const Pixel *pixel, Number *weight) __attribute__((always_inline)) {
        Vector met[count + chain - 1];
        for (int i = 0; i < count + chain - 1; i++) met[i] = load(pixel + i * w.met_step);
        for (int c = 0; c < chain; c++) {
          Number *const sum = weight + c * w.column.weight_step;
          Vector total = load(sum);
          for (int i = 0; i < count; i++) total += of[i] * met[i + c];
          store(total, sum);
        }
      };
      for_chains<chain>(w, map + channel, kernel + weight, add);
    });
  }

  // Call with where each vector's weights begin, and its first channel.
  template <int count, typename Each, typename Function>
  ALWAYS_INLINE static void for_vectors(const Work &work, const Pixel *from, const Pixel *of, Each each,
                                        Function function) {
    for (int64_t v = 0; v < work.vectors; v++) {
      const int64_t channel = std::min(v * LANES, work.channels - LANES);
      each();
      if (fetches) fetch_run<count>(work, from + channel, of + channel);
      function(v * LANES, channel);
    }
  }

  // Call with where the pixels and weights of each chain begin.
  template <int chain, typename Weight, typename Function>
  ALWAYS_INLINE static void for_chains(const Work &work, const Pixel *pixels, Weight *weights, Function function) {
    const Met &row = work.row, &column = work.column;
    pixels += row.place + column.place, weights += row.weight + column.weight;
    for (int64_t i = 0; i < row.count; i++, pixels += row.place_step, weights += row.weight_step)
      for (int64_t j = 0; j < column.count; j += chain)
        function(pixels + j * column.place_step, weights + j * column.weight_step);
  }

  template <int count> ALWAYS_INLINE static void fetch_run(const Work &work, const Pixel *from, const Pixel *of) {
    const auto &next = work.next;
    for (int i = 0; i < count; i++) fetch(of, next.run + i * work.step);
    for (int64_t r = 0; r < next.rows; r++)
      for (int64_t c = 0; c < next.columns; c++)
        for (int i = 0; i < count; i++)
          fetch(from, next.met + r * next.row_step + c * work.channels + i * work.met_step);
  }
};

}  // namespace
