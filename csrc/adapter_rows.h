// The row operations of the adapter on some rows [first, first + count) of a matrix, on one thread.

#pragma once

#include <cstdint>

#include "dropout.h"
#include "elements.h"

namespace llm2clip {

// LayerNorm over the columns; weight and bias (cols,) or null
struct LayerNormRows {
  Elements x;  // (rows, cols), as every matrix here
  int64_t cols;
  const float* weight;
  const float* bias;
  double eps;
  Elements out;
};

// dx = LayerNorm's gradient + dy, and sums of three gradients over these rows
struct LayerNormGradRows {
  Elements x;
  int64_t cols;
  const float* weight;
  const float* bias;
  double eps;
  Elements dh;  // gradient of LayerNorm's output; replaced by that output where keep_output
  bool keep_output;
  const void* dy;     // of x's type, as dx; or null
  void* dx;           // null where not wanted
  float* weight_sum;  // (cols,) += weight's gradient; null where not wanted, as the next two
  float* bias_sum;
  float* dy_sum;
};

// out = dropout(gelu(pre + bias)), of one type
struct GeluRows {
  Elements pre;
  int64_t cols;
  const float* bias;  // (cols,) or null
  Dropout dropout;
  void* out;  // may be pre; null where not wanted (by the gradient)
};

// `gradient` of the dropped-out GELU becomes that of pre + bias
struct GeluGradRows {
  GeluRows gelu;
  void* gradient;   // of pre's type
  float* bias_sum;  // (cols,) += over these rows; or null
};

struct AdapterKernels {
  void (*layer_norm)(const LayerNormRows&, int64_t first, int64_t count);
  void (*layer_norm_grad)(const LayerNormGradRows&, int64_t first, int64_t count);
  void (*gelu)(const GeluRows&, int64_t first, int64_t count);
  void (*gelu_grad)(const GeluGradRows&, int64_t first, int64_t count);

  static const AdapterKernels portable, avx2, avx512;
};

}  // namespace llm2clip
