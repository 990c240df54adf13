// One constant c for every row and column, so that exp(logit - c) never overflows and partial sums merge by +.

#pragma once

#include <cmath>
#include <limits>

#include "tiles.h"

namespace llm2clip {

// exp(70) times 1e8 columns stays below the largest float
constexpr double kHeadroom = 70.0;
// below log(1e-26) relative to the shift, flushed terms could matter
constexpr double kLowestSum = -59.8;

inline double largest_norm(const Tensor& x) {
  const int64_t rows = x.size(0);
  const int64_t dim = x.size(1);
  const float* values = data(x);
  std::vector<double> largest((rows + kBlock - 1) / kBlock, 0.0);
  for_each_block(rows, [&](int64_t b, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      const float* row = values + i * dim;
      double squares[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      int64_t k = 0;
      for (; k + 8 <= dim; k += 8) {
        for (int64_t l = 0; l < 8; ++l) squares[l] += static_cast<double>(row[k + l]) * row[k + l];
      }
      for (; k < dim; ++k) squares[0] += static_cast<double>(row[k]) * row[k];
      double total = 0;
      for (double s : squares) total += s;
      // written so that NaN wins and stays
      if (!(total <= largest[b])) largest[b] = total;
    }
  });
  double result = 0;
  for (double l : largest) {
    if (!(l <= result)) result = l;
  }
  return std::sqrt(result);
}

// c such that every logit - c <= 70, or NaN where no finite c exists
inline float static_shift(const Tensor& x, const Tensor& y, double scale) {
  // 1 + 1e-5 covers the rounding of the float dot products themselves
  const double bound = std::abs(scale) * largest_norm(x) * largest_norm(y) * (1 + 1e-5);
  if (!(bound < 1e30)) return std::numeric_limits<float>::quiet_NaN();
  // a whole number, so that subtracting it from a logit of its size is exact
  return static_cast<float>(std::ceil(std::max(0.0, bound - kHeadroom)));
}

inline bool is_safe(const Tensor& lse, double shift) {
  const float* values = data(lse);
  for (int64_t i = 0; i < lse.numel(); ++i) {
    if (!(values[i] - shift >= kLowestSum) || !std::isfinite(values[i])) return false;
  }
  return true;
}

}  // namespace llm2clip
