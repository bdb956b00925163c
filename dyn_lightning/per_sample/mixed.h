// What the convolution with mixed kernels is told of its sizes.

#pragma once

#include <cstdint>

namespace {

struct Sizes {  // in the order in which Python gives them
  int64_t samples, kernels, in_channels, height, width, out_channels, rows, columns, kernel_rows, kernel_columns, down,
      right, above, left, dilation_rows, dilation_columns, planes, in_block, out_block, parts, threads, intel;
};

}  // namespace
