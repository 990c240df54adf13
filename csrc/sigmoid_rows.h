// The sigmoid loss of one tile of dot products, row by row, on one thread.

#pragma once

#include <cstdint>

namespace llm2clip {

struct SigmoidRows {
  const float* in;  // (rows, cols) plain dot products x·y, contiguous; the logit is t = scale·dot + bias
  float* out;       // (rows, cols) receives G = weight·dL/dt, may be `in`; null for the loss alone
  int64_t rows;
  int64_t cols;
  float scale;
  float bias;
  // a pair is positive where its row's and its column's id are equal
  const int32_t* row_id;
  const int32_t* col_id;
  const float* weight;     // (rows,) factor of a row's G, not of its loss; null for one
  double* loss;            // (rows,) += sum over columns of softplus(-t) (positives), softplus(t) (the others)
  double* scale_gradient;  // += sum of G·dot; null when not wanted
  double* bias_gradient;   // += sum of G; null when not wanted
};

// ids that equal no id of the other side
constexpr int32_t kNoRow = -1;
constexpr int32_t kNoCol = -2;

struct SigmoidKernels {
  void (*rows)(const SigmoidRows&);

  static const SigmoidKernels portable, avx2, avx512;
};

}  // namespace llm2clip
