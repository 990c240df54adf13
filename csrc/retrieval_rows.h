// Comparing and selecting the scores of one tile, row by row, on one thread, exactly.
//
// A tile holds fp32 dot products, each within error_i·norm_j of the true one. What that error leaves open is decided
// by the product in double, whose rounding does not depend on where a tile ends.

#pragma once

#include <cstdint>

#include "always_inline.h"

namespace llm2clip {

// (rows, cols) dot products and the features they were made of
struct ScoreTile {
  const float* dots;  // rows contiguous
  int64_t rows;
  int64_t cols;
  const float* x;  // (rows, dim)
  const float* y;  // (cols, dim)
  int64_t dim;
  const float* x_error;  // (rows,) what a dot may be off by, for a column of norm 1
  const float* y_norm;   // (cols,) rounded up
  const double* x_norm64;
  const double* y_norm64;
};

// Thresholds of one side: the score to compare with, in double (NaN: nothing is counted) and in float (+inf then).
struct Thresholds {
  const float* score;
  const float* slack;  // rounding of `score` and of the difference
  const double* exact;
};

struct CountRows {
  ScoreTile tile;
  Thresholds row;
  Thresholds col;  // null pointers when no columns are wanted
  double tolerance;
  int64_t* row_above;  // (rows,) += scores above the threshold by more than tolerance and rounding
  int64_t* row_tied;   // (rows,) += scores within tolerance and rounding of it
  int32_t* col_above;  // (cols,) += the same for the columns, over these rows
  int32_t* col_tied;
};

struct TopRows {
  ScoreTile tile;
  int64_t k;
  double* scores;      // (rows, k) best first; -inf where `indices` is -1
  int64_t* indices;    // (rows, k)
  int64_t first;       // index of the tile's first column
  const int64_t* x_groups;  // (rows,) and (cols,): pairs of equal ids >= 0 are left out; or null
  const int64_t* y_groups;
};

struct RetrievalKernels {
  void (*count)(const CountRows&);
  void (*top)(const TopRows&);
  double (*dot)(const float*, const float*, int64_t);

  static const RetrievalKernels portable, avx2, avx512;
};

// puts a candidate among the k best, unless it is worse than all of them; higher score first, then lower index
LLM2CLIP_INLINE bool insert_best(double* scores, int64_t* indices, int64_t k, double score, int64_t index) {
  const auto before = [&](int64_t place) {
    return indices[place] >= 0 && (scores[place] > score || (scores[place] == score && indices[place] < index));
  };
  if (before(k - 1)) return false;
  int64_t place = k - 1;
  for (; place > 0 && !before(place - 1); --place) {
    scores[place] = scores[place - 1];
    indices[place] = indices[place - 1];
  }
  scores[place] = score;
  indices[place] = index;
  return true;
}

// relative rounding of the double product, for the pair's norms
LLM2CLIP_INLINE double double_rounding(int64_t dim) {
  return static_cast<double>(dim + 8) * 0x1p-52;
}

}  // namespace llm2clip
