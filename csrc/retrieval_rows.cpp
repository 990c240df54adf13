#include "retrieval_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "instruction_set.h"
#include "similarity_rows.h"
#include "simd_exp.h"

namespace llm2clip {
namespace {

using Halves = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

// columns between two looks at what is left open
constexpr int64_t kStrip = 128;

// x·y in double: products of floats are exact there, and the order of the sum is fixed
LLM2CLIP_INLINE double dot_body(const float* x, const float* y, int64_t dim) {
  Doubles total[2] = {};
  int64_t k = 0;
  for (; k + 16 <= dim; k += 16) {
    for (int64_t h = 0; h < 2; ++h) {
      Halves a;
      Halves b;
      std::memcpy(&a, x + k + 8 * h, sizeof(a));
      std::memcpy(&b, y + k + 8 * h, sizeof(b));
      total[h] += __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
    }
  }
  const Doubles both = total[0] + total[1];
  double lanes[8];
  std::memcpy(lanes, &both, sizeof(lanes));
  double sum = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  for (; k < dim; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

// Plain loops, which the compiler turns into masked vectors; comparing vector types as values it takes apart.
struct Sums {
  int32_t above, tied, open;
};

// Counts what a strip says for sure, and marks what it leaves open: bit 0 for the row, bit 1 for the columns.
template <bool columns>
LLM2CLIP_INLINE Sums compare_strip(const float* __restrict__ dots, const float* __restrict__ norm, float x_error,
                                   float score, float slack, const float* __restrict__ col_score,
                                   const float* __restrict__ col_slack, float tolerance, float rounding,
                                   int32_t* __restrict__ col_above, int32_t* __restrict__ col_tied,
                                   int32_t* __restrict__ open, int64_t count) {
  Sums sums{0, 0, 0};
  for (int64_t j = 0; j < count; ++j) {
    const float dot = dots[j];
    const float error = norm[j] * x_error;
    const float difference = dot - score;
    const float size = std::abs(difference);
    const float outer = error + (slack + tolerance);
    const float inner = tolerance - (error + slack);
    const int32_t above = difference > outer;
    const int32_t tied = size < inner;
    // NaN is neither, and so left open
    int32_t flags = 1 - ((size > outer) | tied);
    sums.above += above;
    sums.tied += tied;
    if constexpr (columns) {
      const float col_difference = dot - col_score[j];
      const float col_size = std::abs(col_difference);
      const float col_error = error + (col_slack[j] + rounding);
      const float col_outer = col_error + tolerance;
      const int32_t col_tie = col_size < tolerance - col_error;
      col_above[j] += col_difference > col_outer;
      col_tied[j] += col_tie;
      flags += 2 - 2 * ((col_size > col_outer) | col_tie);
    }
    open[j] = flags;
    sums.open |= flags;
  }
  return sums;
}

// decides one pair by the product in double
LLM2CLIP_INLINE void decide(const CountRows& a, int64_t i, int64_t j, int32_t flags, double unit) {
  const ScoreTile& t = a.tile;
  // a NaN among the features makes every score NaN, which is neither above nor tied
  if (std::isnan(t.x_norm64[i]) || std::isnan(t.y_norm64[j])) return;
  const double score = dot_body(t.x + i * t.dim, t.y + j * t.dim, t.dim);
  const double size = unit * t.x_norm64[i] * t.y_norm64[j];
  const double margin = a.tolerance + (std::isfinite(size) ? size : 0.0);
  if (flags & 1) {
    const bool over = score > a.row.exact[i] + margin;
    a.row_above[i] += over;
    a.row_tied[i] += !over && score >= a.row.exact[i] - margin;
  }
  if (flags & 2) {
    const bool over = score > a.col.exact[j] + margin;
    a.col_above[j] += over;
    a.col_tied[j] += !over && score >= a.col.exact[j] - margin;
  }
}

template <bool columns>
LLM2CLIP_INLINE void count_rows(const CountRows& a) {
  const ScoreTile& t = a.tile;
  const float tolerance = static_cast<float>(a.tolerance);
  // the tolerance is rounded to float for the quick test alone
  const float rounding = tolerance * 0x1p-22f;
  const double unit = double_rounding(t.dim);
  int32_t open[kStrip];
  for (int64_t i = 0; i < t.rows; ++i) {
    for (int64_t start = 0; start < t.cols; start += kStrip) {
      const int64_t count = std::min(kStrip, t.cols - start);
      const Sums sums = compare_strip<columns>(
          t.dots + i * t.cols + start, t.y_norm + start, t.x_error[i], a.row.score[i], a.row.slack[i] + rounding,
          columns ? a.col.score + start : nullptr, columns ? a.col.slack + start : nullptr, tolerance, rounding,
          columns ? a.col_above + start : nullptr, columns ? a.col_tied + start : nullptr, open, count);
      a.row_above[i] += sums.above;
      a.row_tied[i] += sums.tied;
      if (sums.open == 0) continue;
      for (int64_t j = 0; j < count; ++j) {
        if (open[j] != 0) decide(a, i, start + j, open[j], unit);
      }
    }
  }
}

LLM2CLIP_INLINE void count_body(const CountRows& a) {
  if (a.col.score != nullptr) {
    count_rows<true>(a);
  } else {
    count_rows<false>(a);
  }
}

// below this no candidate of the row can be; -inf until k are found
LLM2CLIP_INLINE float floor_of(double worst) {
  if (!(std::abs(worst) < 1e37)) return -std::numeric_limits<float>::infinity();
  return static_cast<float>(worst - std::abs(worst) * 0x1p-22 - 1e-37);
}

LLM2CLIP_INLINE bool any_above(const float* __restrict__ dots, const float* __restrict__ norm, float error,
                               float lowest, int64_t count) {
  int32_t found = 0;
  for (int64_t j = 0; j < count; ++j) found |= dots[j] + norm[j] * error < lowest ? 0 : 1;
  return found != 0;
}

LLM2CLIP_INLINE void top_body(const TopRows& a) {
  const ScoreTile& t = a.tile;
  for (int64_t i = 0; i < t.rows; ++i) {
    if (std::isnan(t.x_norm64[i])) continue;
    const float* row = t.dots + i * t.cols;
    double* scores = a.scores + i * a.k;
    int64_t* indices = a.indices + i * a.k;
    const float error = t.x_error[i];
    float lowest = floor_of(scores[a.k - 1]);
    for (int64_t start = 0; start < t.cols; start += kStrip) {
      const int64_t count = std::min(kStrip, t.cols - start);
      if (!any_above(row + start, t.y_norm + start, error, lowest, count)) continue;
      for (int64_t j = start; j < start + count; ++j) {
        // NaN, of an overflow on the way, is not below
        if (row[j] + t.y_norm[j] * error < lowest) continue;
        if (a.x_groups != nullptr && a.x_groups[i] >= 0 && a.x_groups[i] == a.y_groups[j]) continue;
        if (std::isnan(t.y_norm64[j])) continue;
        const double score = dot_body(t.x + i * t.dim, t.y + j * t.dim, t.dim);
        // infinite features: a difference of infinities
        if (std::isnan(score)) continue;
        if (insert_best(scores, indices, a.k, score, a.first + j)) lowest = floor_of(scores[a.k - 1]);
      }
    }
  }
}

#define LLM2CLIP_RETRIEVAL_VARIANT(suffix, target)                                                                  \
  target void count_##suffix(const CountRows& a) { count_body(a); }                                                 \
  target void top_##suffix(const TopRows& a) { top_body(a); }                                                       \
  target double dot_##suffix(const float* x, const float* y, int64_t dim) { return dot_body(x, y, dim); } \
  constexpr RetrievalKernels k_##suffix{count_##suffix, top_##suffix, dot_##suffix};

LLM2CLIP_FOR_EACH_INSTRUCTION_SET(LLM2CLIP_RETRIEVAL_VARIANT)

}  // namespace

const RetrievalKernels& retrieval_kernels() {
  static const RetrievalKernels chosen = LLM2CLIP_FOR_THIS_PROCESSOR(k);
  return chosen;
}

}  // namespace llm2clip
