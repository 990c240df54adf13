// The sigmoid loss (SigLIP) on the CPU: its value and all its gradients in one walk over the tiles of x·yᵀ.
//
// G = dL/dlogit of a pair depends on that pair alone, so a tile's part of every gradient is made while the tile is
// in the cache: three products in all, one for the value alone.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "gradients.h"
#include "instruction_set.h"
#include "sigmoid_rows.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// Ids of 32 bits for the vector comparison: equal exactly where a pair is positive.
struct PairIds {
  std::vector<int32_t> row, col;

  PairIds(const Tensor& x, const Tensor& y, const Tensor& x_groups, const Tensor& y_groups, int64_t diagonal)
      : row(x.size(0), kNoRow), col(y.size(0), kNoCol) {
    const int64_t rows = x.size(0);
    const int64_t cols = y.size(0);
    if (x_groups.numel() == 0) {
      for (int64_t j = 0; j < cols; ++j) col[j] = static_cast<int32_t>(j);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t j = diagonal + i;
        if (j >= 0 && j < cols) row[i] = static_cast<int32_t>(j);
      }
      return;
    }
    const auto* of_x = static_cast<const int64_t*>(x_groups.data_ptr());
    const auto* of_y = static_cast<const int64_t*>(y_groups.data_ptr());
    std::vector<int64_t> known(of_y, of_y + cols);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    const auto place = [&](int64_t id, int32_t otherwise) {
      const auto at = std::lower_bound(known.begin(), known.end(), id);
      if (id < 0 || at == known.end() || *at != id) return otherwise;
      return static_cast<int32_t>(at - known.begin());
    };
    for (int64_t i = 0; i < rows; ++i) row[i] = place(of_x[i], kNoRow);
    for (int64_t j = 0; j < cols; ++j) col[j] = place(of_y[j], kNoCol);
  }
};

void check(const Tensor& x, const Tensor& y, const Tensor& x_groups, const Tensor& y_groups, const Tensor& weight) {
  for (const Tensor* t : {&x, &y}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous(),
                    "sigmoid_loss: the CPU kernel takes contiguous float32 matrices");
  }
  STD_TORCH_CHECK(x.size(1) == y.size(1), "sigmoid_loss: x (M, D), y (N, D)");
  STD_TORCH_CHECK(y.size(0) < std::numeric_limits<int32_t>::max(), "sigmoid_loss: y has more than 2^31 rows");
  const bool grouped = x_groups.numel() > 0 || y_groups.numel() > 0;
  STD_TORCH_CHECK(!grouped || (x_groups.numel() == x.size(0) && y_groups.numel() == y.size(0)),
                  "sigmoid_loss: one group id per row");
  for (const Tensor* t : {&x_groups, &y_groups}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->is_contiguous(),
                    "sigmoid_loss: group ids are contiguous int64");
  }
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                      (weight.numel() == 0 || weight.numel() == x.size(0)),
                  "sigmoid_loss: one float32 weight per row of x, or none");
}

double total(const std::vector<double>& values) {
  double out = 0;
  for (double v : values) out += v;
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(const Tensor& x, const Tensor& y, double scale,
                                                                double bias, const Tensor& x_groups,
                                                                const Tensor& y_groups, int64_t diagonal,
                                                                const Tensor& weight, bool need_x, bool need_y,
                                                                bool need_scale, bool need_bias, int64_t tile) {
  check(x, y, x_groups, y_groups, weight);
  const PairIds ids(x, y, x_groups, y_groups, diagonal);
  const Tiles tiles(x, y, tile);
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  const Gradients gradients(x, y, tiles, need_x, need_y);
  std::vector<double> row_loss(tiles.workers * tiles.rows, 0.0);
  std::vector<double> scale_gradient(tiles.workers * tiles.blocks(), 0.0);
  std::vector<double> bias_gradient(tiles.workers * tiles.blocks(), 0.0);
  tiles.each(
      [&](const Tile& t) {
        const Tensor g = as_matrix(buffers[t.worker], t.m, t.n);
        multiply_tile(g, x, y, t);
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t count) {
          const int64_t place = t.worker * tiles.blocks() + b;
          SigmoidRows a{};
          a.in = data(g) + first * t.n;
          a.out = need_x || need_y ? data(g) + first * t.n : nullptr;
          a.rows = count;
          a.cols = t.n;
          a.scale = static_cast<float>(scale);
          a.bias = static_cast<float>(bias);
          a.row_id = ids.row.data() + t.r + first;
          a.col_id = ids.col.data() + t.c;
          a.weight = weight.numel() > 0 ? data(weight) + t.r + first : nullptr;
          a.loss = row_loss.data() + t.worker * tiles.rows + t.r + first;
          a.scale_gradient = need_scale ? &scale_gradient[place] : nullptr;
          a.bias_gradient = need_bias ? &bias_gradient[place] : nullptr;
          kernels<SigmoidKernels>().rows(a);
        });
        gradients.add(t, g);
      },
      [&](int64_t r, int64_t m) { gradients.end_stripe(r, m); });
  gradients.scale_by(scale);
  const Tensor loss = flat_floats(x, tiles.rows);
  for (int64_t i = 0; i < tiles.rows; ++i) {
    double sum = 0;
    for (int64_t w = 0; w < tiles.workers; ++w) sum += row_loss[w * tiles.rows + i];
    data(loss)[i] = static_cast<float>(sum);
  }
  const Tensor dscale = flat_floats(x, need_scale ? 1 : 0);
  const Tensor dbias = flat_floats(x, need_bias ? 1 : 0);
  if (need_scale) data(dscale)[0] = static_cast<float>(total(scale_gradient));
  if (need_bias) data(dbias)[0] = static_cast<float>(total(bias_gradient));
  return {loss, gradients.dx, gradients.dy, dscale, dbias};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("sigmoid_loss", TORCH_BOX(&llm2clip::sigmoid_loss));
}
