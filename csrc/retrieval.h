// What the tiles of the retrieval ops need to know of their features: norms, and how far an fp32 dot may be off.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "instruction_set.h"
#include "retrieval_rows.h"
#include "tiles.h"

namespace llm2clip {

inline std::vector<double> norms(const Tensor& x) {
  std::vector<double> out(x.size(0));
  const int64_t dim = x.size(1);
  for_each_block(x.size(0), [&](int64_t, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      const float* row = data(x) + i * dim;
      out[i] = std::sqrt(kernels<RetrievalKernels>().dot(row, row, dim));
    }
  });
  return out;
}

struct Features {
  const Tensor &x, &y;
  std::vector<double> x_norm64, y_norm64;
  std::vector<float> x_error, y_norm;

  Features(const Tensor& x, const Tensor& y) : x(x), y(y), x_norm64(norms(x)), y_norm64(norms(y)) {
    const int64_t dim = x.size(1);
    // any order of a sum of D products is off by D·2^-24 of the norms' product at most; the rest of the factor, and
    // what is added to the norms, covers the rounding of these bounds and values below the smallest normal float
    const double unit = static_cast<double>(dim + 16) * 0x1p-24 * 1.001;
    const double lost = std::sqrt(static_cast<double>(dim)) * 1.2e-38;
    double largest = 0;
    for (double norm : y_norm64) {
      if (std::isfinite(norm)) largest = std::max(largest, norm);
    }
    x_error.resize(x_norm64.size());
    for (size_t i = 0; i < x_error.size(); ++i) {
      const bool overflows = !(x_norm64[i] * largest < 1e37);
      x_error[i] = overflows ? std::numeric_limits<float>::infinity()
                             : static_cast<float>(unit * x_norm64[i] + lost) * (1 + 1e-6f);
    }
    y_norm.resize(y_norm64.size());
    for (size_t j = 0; j < y_norm64.size(); ++j) {
      y_norm[j] = static_cast<float>(y_norm64[j] + lost / unit) * (1 + 1e-6f);
    }
  }

  ScoreTile tile(const float* dots, const Tile& t, int64_t first, int64_t count) const {
    const int64_t dim = x.size(1);
    const int64_t r = t.r + first;
    return {dots + first * t.n,   count,         t.n, data(x) + r * dim,       data(y) + t.c * dim, dim,
            x_error.data() + r, y_norm.data() + t.c, x_norm64.data() + r, y_norm64.data() + t.c};
  }
};

}  // namespace llm2clip
