// similarity_rank on the CPU: how many scores of every row and column of x·yᵀ lie above and at a threshold, by tiles.
//
// The tile products are in fp32 (gemm.h). What their rounding leaves open is decided by the product in double, so
// the counts do not depend on tiles, threads or the instruction set.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "retrieval.h"

namespace llm2clip {
namespace {

void check_features(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && y.scalar_type() == ScalarType::Float,
                  "similarity_rank: the CPU kernel takes float32");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "similarity_rank: x (M, D), y (N, D)");
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), "similarity_rank: inputs must be contiguous");
}

// thresholds of one side as the row kernels read them
struct Side {
  const double* exact;
  std::vector<float> score, slack;

  explicit Side(const Tensor& best) : exact(static_cast<const double*>(best.data_ptr())) {
    score.assign(best.numel(), std::numeric_limits<float>::infinity());
    slack.assign(score.size(), 0.0f);
    for (int64_t i = 0; i < best.numel(); ++i) {
      if (std::isnan(exact[i])) continue;
      score[i] = static_cast<float>(exact[i]);
      // 2^-22 for rounding the score and the difference; the constant for results below the normal floats
      slack[i] = static_cast<float>(std::abs(exact[i]) * 0x1p-22 + 1e-37);
    }
  }
  Thresholds at(int64_t i) const { return {score.data() + i, slack.data() + i, exact + i}; }
};

int64_t* counts(const Tensor& t) {
  return static_cast<int64_t*>(t.data_ptr());
}

Tensor zero_counts(const Tensor& like, int64_t count) {
  Tensor out = torch::stable::new_empty(like, {2, count}, ScalarType::Long);
  std::fill_n(counts(out), 2 * count, int64_t{0});
  return out;
}

// (2, M) and (2, N) or (2, 0): scores above row_best (M,), col_best (N,), and those at it
std::tuple<Tensor, Tensor> count(const Tensor& x, const Tensor& y, const Tensor& row_best, const Tensor& col_best,
                                 double tolerance, int64_t tile_size) {
  check_features(x, y);
  const bool columns = col_best.numel() > 0;
  STD_TORCH_CHECK(row_best.scalar_type() == ScalarType::Double && row_best.numel() == x.size(0) &&
                      row_best.is_contiguous(),
                  "similarity_rank: row_best (M,) float64");
  STD_TORCH_CHECK(!columns || (col_best.scalar_type() == ScalarType::Double && col_best.numel() == y.size(0) &&
                               col_best.is_contiguous()),
                  "similarity_rank: col_best (N,) float64, or empty");
  const Tiles tiles(x, y, tile_size);
  const Features features(x, y);
  const Side row_side(row_best);
  const Side col_side(col_best);
  const Tensor rows = zero_counts(x, tiles.rows);
  const Tensor cols = zero_counts(x, columns ? tiles.cols : 0);
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  // above, then tied; of every worker, and for columns of every block of rows
  std::vector<int64_t> row_counts(tiles.workers * 2 * tiles.height, 0);
  std::vector<int32_t> col_counts(columns ? tiles.workers * tiles.blocks() * 2 * tiles.width : 0);
  tiles.each(
      [&](const Tile& t) {
        const Tensor dots = as_matrix(buffers[t.worker], t.m, t.n);
        multiply_tile(dots, x, y, t);
        int64_t* mine = row_counts.data() + t.worker * 2 * tiles.height;
        int32_t* partial = col_counts.data() + t.worker * tiles.blocks() * 2 * tiles.width;
        if (columns) std::fill_n(partial, tiles.blocks() * 2 * tiles.width, 0);
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t height) {
          CountRows a{};
          a.tile = features.tile(data(dots), t, first, height);
          a.row = row_side.at(t.r + first);
          a.tolerance = tolerance;
          a.row_above = mine + first;
          a.row_tied = mine + tiles.height + first;
          if (columns) {
            a.col = col_side.at(t.c);
            a.col_above = partial + b * 2 * tiles.width;
            a.col_tied = a.col_above + tiles.width;
          }
          kernels<RetrievalKernels>().count(a);
        });
        for (int64_t b = 0; columns && b * kBlock < t.m; ++b) {
          for (int64_t j = 0; j < t.n; ++j) {
            counts(cols)[t.c + j] += partial[b * 2 * tiles.width + j];
            counts(cols)[tiles.cols + t.c + j] += partial[b * 2 * tiles.width + tiles.width + j];
          }
        }
      },
      [&](int64_t r, int64_t m) {
        for (int64_t kind = 0; kind < 2; ++kind) {
          for (int64_t w = 0; w < tiles.workers; ++w) {
            int64_t* of_worker = row_counts.data() + (2 * w + kind) * tiles.height;
            for (int64_t i = 0; i < m; ++i) {
              counts(rows)[kind * tiles.rows + r + i] += of_worker[i];
              of_worker[i] = 0;
            }
          }
        }
      });
  return {rows, cols};
}

// x[rows]·y[cols] in double, (P,)
Tensor pair_scores(const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& cols) {
  check_features(x, y);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && cols.scalar_type() == ScalarType::Long &&
                      rows.numel() == cols.numel() && rows.is_contiguous() && cols.is_contiguous(),
                  "pair_scores: rows and cols (P,) int64");
  const int64_t dim = x.size(1);
  const Tensor out = torch::stable::new_empty(x, {rows.numel()}, ScalarType::Double);
  double* scores = static_cast<double*>(out.data_ptr());
  for (int64_t p = 0; p < rows.numel(); ++p) {
    const int64_t i = counts(rows)[p];
    const int64_t j = counts(cols)[p];
    STD_TORCH_CHECK(i >= 0 && i < x.size(0) && j >= 0 && j < y.size(0), "pair_scores: index out of range");
  }
  for_each_block(rows.numel(), [&](int64_t, int64_t first, int64_t count) {
    for (int64_t p = first; p < first + count; ++p) {
      const int64_t i = counts(rows)[p];
      const int64_t j = counts(cols)[p];
      scores[p] = kernels<RetrievalKernels>().dot(data(x) + i * dim, data(y) + j * dim, dim);
    }
  });
  return out;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("pair_scores", TORCH_BOX(&llm2clip::pair_scores));
  m.impl("similarity_rank_count", TORCH_BOX(&llm2clip::count));
}
