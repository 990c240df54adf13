// What happens to one tile of dot products, row by row, on one thread.

#pragma once

#include <cstdint>

namespace llm2clip {

// A tile holds plain dot products x·y, `cols` floats a row, rows contiguous; the logit is scale·dot.

// ids of groups are read in whole vectors
constexpr int64_t kReadPastEnd = 16;

// Pairs of equal group are left out, except a row's own positive. All null where there are no groups.
struct RowGroups {
  const int32_t* row;  // (rows,)
  const int32_t* col;  // (cols,), and kReadPastEnd readable beyond the last
  int64_t positive;    // column of row 0's positive; row i's is `positive + i`; may be outside [0, cols)
};

struct SumRows {
  const float* tile;  // (rows, cols)
  int64_t rows;
  int64_t cols;
  float scale;
  float shift;
  double* row_sum;  // (rows,) += sum over columns of exp(scale·dot - shift)
  float* col_sum;   // (cols,) = the same over these rows; null when no columns are wanted
  float* cache;     // (rows, cols) with row stride cache_stride, receives the exponentials; or null
  int64_t cache_stride;
  RowGroups groups;
};

struct OnlineRows {
  const float* tile;
  int64_t rows;
  int64_t cols;
  float scale;
  float* row_max;   // (rows,) running maximum
  double* row_sum;  // (rows,) running sum of exp(logit - row_max)
  float* col_max;   // (cols,) = of these rows; null when no columns are wanted
  float* col_sum;   // (cols,) = of these rows, relative to col_max
  RowGroups groups;
};

struct GradRows {
  const float* in;  // (rows, cols) dot products, or cached exponentials; row stride in_stride
  int64_t in_stride;
  float* out;  // (rows, cols) G = dL/dlogit, contiguous; may be `in`
  int64_t rows;
  int64_t cols;
  float scale;
  float shift;
  // static shift: G = exp(logit - shift)·(row_factor + col_factor)
  // otherwise:    G = row_factor·exp(logit - row_lse) + col_factor·exp(logit - col_lse)
  const float* row_factor;
  const float* col_factor;  // null when no columns are wanted
  const float* row_lse;
  const float* col_lse;
  const float* g_pos;      // (rows,) added at column positive + row, or null
  int64_t positive;        // may be outside [0, cols)
  double* scale_gradient;  // += sum of G·dot; null when not wanted
  RowGroups groups;
};

enum class GradMode { kStatic, kCached, kOnline };

struct RowKernels {
  void (*sum)(const SumRows&);
  void (*online)(const OnlineRows&);
  void (*grad)(const GradRows&, GradMode);

  static const RowKernels portable, avx2, avx512;
};

}  // namespace llm2clip
