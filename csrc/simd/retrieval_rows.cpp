#include "../retrieval_rows.h"

#include "lanes.h"

namespace llm2clip {
namespace {

// eight numbers: as doubles they fill as many registers as sixteen floats
using Floats8 = Sixteen<float __attribute__((vector_size(2 * kRegisterLanes)))>;
using Doubles = Sixteen<double __attribute__((vector_size(4 * kRegisterLanes)))>;

// columns between two looks at what is left open
constexpr int64_t kStrip = 128;

LLM2CLIP_INLINE bool is_nan(double value) {
  return value != value;
}

// x·y in double: products of floats are exact there, and the order of the sum is fixed
LLM2CLIP_INLINE double dot(const float* x, const float* y, int64_t dim) {
  Doubles total[2] = {};
  int64_t k = 0;
  for (; k + 16 <= dim; k += 16) {
    for (int64_t h = 0; h < 2; ++h) {
      total[h] += convert<Doubles>(load_lanes<Floats8>(x + k + 8 * h)) *
                  convert<Doubles>(load_lanes<Floats8>(y + k + 8 * h));
    }
  }
  const Doubles both = total[0] + total[1];
  double lanes[8];
  store_lanes(lanes, both);
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
    const float size = __builtin_fabsf(difference);
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
      const float col_size = __builtin_fabsf(col_difference);
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
  if (is_nan(t.x_norm64[i]) || is_nan(t.y_norm64[j])) return;
  const double score = dot(t.x + i * t.dim, t.y + j * t.dim, t.dim);
  const double size = unit * t.x_norm64[i] * t.y_norm64[j];
  const double margin = a.tolerance + (size - size == 0.0 ? size : 0.0);
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
LLM2CLIP_INLINE void count_tile(const CountRows& a) {
  const ScoreTile& t = a.tile;
  const float tolerance = static_cast<float>(a.tolerance);
  // the tolerance is rounded to float for the quick test alone
  const float rounding = tolerance * 0x1p-22f;
  const double unit = double_rounding(t.dim);
  int32_t open[kStrip];
  for (int64_t i = 0; i < t.rows; ++i) {
    for (int64_t start = 0; start < t.cols; start += kStrip) {
      const int64_t count = smaller(kStrip, t.cols - start);
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

void count_rows(const CountRows& a) {
  if (a.col.score != nullptr) {
    count_tile<true>(a);
  } else {
    count_tile<false>(a);
  }
}

// below this no candidate of the row can be; -inf until k are found
LLM2CLIP_INLINE float floor_of(double worst) {
  if (!(__builtin_fabs(worst) < 1e37)) return -__builtin_inff();
  return static_cast<float>(worst - __builtin_fabs(worst) * 0x1p-22 - 1e-37);
}

LLM2CLIP_INLINE bool any_above(const float* __restrict__ dots, const float* __restrict__ norm, float error,
                               float lowest, int64_t count) {
  int32_t found = 0;
  for (int64_t j = 0; j < count; ++j) found |= dots[j] + norm[j] * error < lowest ? 0 : 1;
  return found != 0;
}

void top_rows(const TopRows& a) {
  const ScoreTile& t = a.tile;
  for (int64_t i = 0; i < t.rows; ++i) {
    if (is_nan(t.x_norm64[i])) continue;
    const float* row = t.dots + i * t.cols;
    double* scores = a.scores + i * a.k;
    int64_t* indices = a.indices + i * a.k;
    const float error = t.x_error[i];
    float lowest = floor_of(scores[a.k - 1]);
    for (int64_t start = 0; start < t.cols; start += kStrip) {
      const int64_t count = smaller(kStrip, t.cols - start);
      if (!any_above(row + start, t.y_norm + start, error, lowest, count)) continue;
      for (int64_t j = start; j < start + count; ++j) {
        // NaN, of an overflow on the way, is not below
        if (row[j] + t.y_norm[j] * error < lowest) continue;
        if (a.x_groups != nullptr && a.x_groups[i] >= 0 && a.x_groups[i] == a.y_groups[j]) continue;
        if (is_nan(t.y_norm64[j])) continue;
        const double score = dot(t.x + i * t.dim, t.y + j * t.dim, t.dim);
        // infinite features: a difference of infinities
        if (is_nan(score)) continue;
        if (insert_best(scores, indices, a.k, score, a.first + j)) lowest = floor_of(scores[a.k - 1]);
      }
    }
  }
}

double one_dot(const float* x, const float* y, int64_t dim) {
  return dot(x, y, dim);
}

}  // namespace

const RetrievalKernels RetrievalKernels::LLM2CLIP_INSTRUCTION_SET{count_rows, top_rows, one_dot};

}  // namespace llm2clip
