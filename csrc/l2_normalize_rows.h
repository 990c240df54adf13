// Rows [first, first + count) of a matrix to unit length, and the gradient, on one thread.

#pragma once

#include <cstdint>

#include "elements.h"

namespace llm2clip {

struct NormalizeRows {
  Elements x;  // (rows, cols), as every matrix here
  int64_t cols;
  double eps;
  Elements y;
  float* norm;  // (rows,)
};

// dx = (g - ŷ<g, ŷ>) / norm; g / eps where the norm is below eps
struct NormalizeGradRows {
  Elements g;
  int64_t cols;
  double eps;
  Elements saved;  // ŷ itself, or x
  bool saved_is_unit;
  const float* norm;
  Elements dx;
};

struct NormalizeKernels {
  void (*forward)(const NormalizeRows&, int64_t first, int64_t count);
  void (*backward)(const NormalizeGradRows&, int64_t first, int64_t count);

  static const NormalizeKernels portable, avx2, avx512;
};

}  // namespace llm2clip
