// Dropout of rows of bit patterns in place.

#pragma once

#include <cstdint>

#include "dropout.h"

namespace llm2clip {

struct DropoutRows {
  void* values;           // (rows, cols) contiguous
  int64_t element_bytes;  // 2, 4 or 8
  int64_t rows;
  int64_t cols;
  Dropout dropout;
  int64_t first_row;  // what the first of these rows counts as
};

struct DropoutKernels {
  void (*rows)(const DropoutRows&);

  static const DropoutKernels portable, avx2, avx512;
};

}  // namespace llm2clip
