// Our own fp32 product of matrices that fit a core's cache, and the choice between it and torch's.
//
// torch's GEMM on x86 is MKL's, which is at its best on Intel processors. On AMD's a plain register-blocked kernel is
// faster (docs/design-notes.md has the measurement), so the tiles are multiplied by that one there. The choice is made
// once per process, from the processor's name alone: the same machine always gives the same bits.

#pragma once

#include <cstdint>

namespace llm2clip {

// A matrix in any layout: element (i, j) at data[i·row_stride + j·col_stride].
struct MatrixView {
  const float* data;
  int64_t row_stride;
  int64_t col_stride;
};

// out (m, n) = a (m, k)·b (k, n), or += where `accumulate` is set.
struct Product {
  int64_t m, n, k;
  MatrixView a;
  MatrixView b;  // one of its strides is 1
  float* out;
  int64_t out_stride;
  bool accumulate;
};

// floats that a kernel needs to work in
constexpr int64_t kGemmWorkspace = 96 * 512 + 8 * 512;

// One thread; the order of every sum depends on k alone.
using Gemm = void (*)(const Product& product, float* workspace);

struct GemmKernels {
  Gemm gemm;  // null in the portable ones: SSE2 and NEON are left to torch

  static const GemmKernels portable, avx2, avx512;
};

// What multiplies tiles in this process: a kernel, or null for torch's own product.
Gemm tile_gemm();

}  // namespace llm2clip
