// similarity_lse on the CPU: row and column log-sum-exp of scale·x·yᵀ, and its gradients, by tiles.
//
// A tile of products (gemm.h) never leaves the cache before its exponentials are taken.
// One constant shift c = max(0, bound - 70) with bound >= |logit| (Cauchy-Schwarz) serves every row and
// column, so there is one exp per pair and partial sums merge by addition. Where a sum is too small for
// that (its terms may have underflowed), or the bound is not finite, a running maximum is kept instead.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "finite_shift.h"
#include "gradients.h"
#include "instruction_set.h"
#include "shift.h"
#include "similarity_rows.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// What a forward pass fills. A log-sum-exp of some size has an fp32 rounding error that would appear whole in
// every exp(S - lse); `low` keeps what rounding took away, so that p and 1 - p stay right to the last bits.
struct Outputs {
  Tensor row, col, pos;
  Tensor low;  // of row (M), then of col (N or 0), then of pos (M or 0)
  Tensor cache;  // receives the exponentials (M, N), or is empty
  int64_t diagonal;

  Outputs(const Tensor& x, const Tiles& tiles, bool columns, int64_t diagonal, const Tensor& cache)
      : row(flat_floats(x, tiles.rows)),
        col(flat_floats(x, columns ? tiles.cols : 0)),
        pos(flat_floats(x, diagonal >= 0 ? tiles.rows : 0)),
        low(flat_floats(x, row.numel() + col.numel() + pos.numel())),
        cache(on_huge_pages(cache)),
        diagonal(diagonal) {}

  void put(const Tensor& to, int64_t low_start, int64_t i, double value) const {
    const float high = static_cast<float>(value);
    data(to)[i] = high;
    data(low)[low_start + i] = std::isfinite(high) ? static_cast<float>(value - high) : 0.0f;
  }
  void put_row(int64_t i, double value) const { put(row, 0, i, value); }
  void put_col(int64_t j, double value) const { put(col, row.numel(), j, value); }

  // from the same tile, rounded the same way: an error of the logit then cancels in lse - pos
  void take_positives(const Tensor& tile, double scale, const Tile& t) const {
    for (int64_t i = 0; i < t.m && pos.numel() > 0; ++i) {
      const int64_t j = diagonal + t.r + i - t.c;
      if (j < 0 || j >= t.n) continue;
      put(pos, row.numel() + col.numel(), t.r + i, static_cast<float>(scale) * data(tile)[i * t.n + j]);
    }
  }
};

// Group ids as small numbers: equal ones stay equal, negative ones equal nothing.
struct Groups {
  std::vector<int32_t> row, col;

  Groups(const Tensor& x_groups, const Tensor& y_groups) {
    if (x_groups.numel() == 0) return;
    const int64_t* rows = static_cast<const int64_t*>(x_groups.data_ptr());
    const int64_t* cols = static_cast<const int64_t*>(y_groups.data_ptr());
    std::vector<int64_t> known(rows, rows + x_groups.numel());
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    const auto number = [&](int64_t id, int32_t none) {
      const auto found = std::lower_bound(known.begin(), known.end(), id);
      if (id < 0 || found == known.end() || *found != id) return none;
      return static_cast<int32_t>(found - known.begin());
    };
    for (int64_t i = 0; i < x_groups.numel(); ++i) row.push_back(number(rows[i], -1));
    for (int64_t j = 0; j < y_groups.numel(); ++j) col.push_back(number(cols[j], -2));
    col.resize(col.size() + kReadPastEnd, -2);
  }

  RowGroups at(int64_t r, int64_t c, int64_t diagonal) const {
    if (row.empty()) return {};
    // without positives, one far to the left of every column
    const int64_t positive = diagonal < 0 ? -static_cast<int64_t>(row.size() + col.size()) : diagonal;
    return {row.data() + r, col.data() + c, positive + r - c};
  }
};

void sum_all(const Tensor& x, const Tensor& y, double scale, float shift, const Tiles& tiles, const Groups& groups,
             const Outputs& out) {
  const bool columns = out.col.numel() > 0;
  const bool cached = out.cache.numel() > 0;
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  std::vector<double> row_sum(tiles.workers * tiles.height, 0.0);
  std::vector<double> col_sum(columns ? tiles.cols : 0, 0.0);
  std::vector<float> partial(columns ? tiles.workers * tiles.blocks() * tiles.width : 0);
  const double shift_ = shift;
  tiles.each(
      [&](const Tile& t) {
        const Tensor tile = as_matrix(buffers[t.worker], t.m, t.n);
        multiply_tile(tile, x, y, t);
        out.take_positives(tile, scale, t);
        double* rows = row_sum.data() + t.worker * tiles.height;
        float* cols = columns ? partial.data() + t.worker * tiles.blocks() * tiles.width : nullptr;
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t count) {
          kernels<RowKernels>().sum(
              {data(tile) + first * t.n, count, t.n, static_cast<float>(scale), shift, rows + first,
               columns ? cols + b * t.n : nullptr,
               cached ? data(out.cache) + (t.r + first) * tiles.cols + t.c : nullptr, tiles.cols,
               groups.at(t.r + first, t.c, out.diagonal)});
        });
        for (int64_t b = 0; columns && b * kBlock < t.m; ++b) {
          for (int64_t j = 0; j < t.n; ++j) col_sum[t.c + j] += cols[b * t.n + j];
        }
      },
      [&](int64_t r, int64_t m) {
        for (int64_t i = 0; i < m; ++i) {
          double total = 0;
          for (int64_t w = 0; w < tiles.workers; ++w) {
            total += row_sum[w * tiles.height + i];
            row_sum[w * tiles.height + i] = 0;
          }
          out.put_row(r + i, std::log(total) + shift_);
        }
      });
  for (size_t j = 0; j < col_sum.size(); ++j) out.put_col(j, std::log(col_sum[j]) + shift_);
}

// a sum relative to its own maximum, and the merging of two of them
struct Running {
  float largest = -std::numeric_limits<float>::infinity();
  double sum = 0.0;

  void add(float other_largest, double other_sum) {
    const float top = std::max(largest, other_largest);
    const double shift = finite_shift(top);
    // an empty sum stays empty whatever its maximum was
    const double kept = sum == 0.0 ? 0.0 : sum * std::exp(finite_shift(largest) - shift);
    const double added = other_sum == 0.0 ? 0.0 : other_sum * std::exp(finite_shift(other_largest) - shift);
    sum = kept + added;
    largest = top;
  }
  double log() const { return std::log(sum) + finite_shift(largest); }
};

void sum_all_online(const Tensor& x, const Tensor& y, double scale, const Tiles& tiles, const Groups& groups,
                    const Outputs& out) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const bool columns = out.col.numel() > 0;
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  std::vector<float> row_max(tiles.workers * tiles.height, kLowest);
  std::vector<double> row_sum(tiles.workers * tiles.height, 0.0);
  std::vector<Running> col_total(columns ? tiles.cols : 0);
  const int64_t partials = columns ? tiles.blocks() * tiles.width : 0;
  std::vector<float> partial_max(tiles.workers * partials);
  std::vector<float> partial_sum(tiles.workers * partials);
  tiles.each(
      [&](const Tile& t) {
        const Tensor tile = as_matrix(buffers[t.worker], t.m, t.n);
        multiply_tile(tile, x, y, t);
        out.take_positives(tile, scale, t);
        const int64_t rows = t.worker * tiles.height;
        const int64_t cols = t.worker * partials;
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t count) {
          kernels<RowKernels>().online(
              {data(tile) + first * t.n, count, t.n, static_cast<float>(scale), row_max.data() + rows + first,
               row_sum.data() + rows + first, columns ? partial_max.data() + cols + b * t.n : nullptr,
               columns ? partial_sum.data() + cols + b * t.n : nullptr, groups.at(t.r + first, t.c, out.diagonal)});
        });
        for (int64_t b = 0; columns && b * kBlock < t.m; ++b) {
          for (int64_t j = 0; j < t.n; ++j) {
            col_total[t.c + j].add(partial_max[cols + b * t.n + j], partial_sum[cols + b * t.n + j]);
          }
        }
      },
      [&](int64_t r, int64_t m) {
        for (int64_t i = 0; i < m; ++i) {
          Running total;
          for (int64_t w = i; w < tiles.workers * tiles.height; w += tiles.height) {
            total.add(row_max[w], row_sum[w]);
            row_max[w] = kLowest;
            row_sum[w] = 0;
          }
          out.put_row(r + i, total.log());
        }
      });
  for (size_t j = 0; j < col_total.size(); ++j) out.put_col(j, col_total[j].log());
}

void check_inputs(const Tensor& x, const Tensor& y, const Tensor& x_groups, const Tensor& y_groups) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && y.scalar_type() == ScalarType::Float,
                  "similarity_lse: the CPU kernel takes float32");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "similarity_lse: x (M, D), y (N, D)");
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), "similarity_lse: inputs must be contiguous");
  const bool grouped = x_groups.numel() > 0 || y_groups.numel() > 0;
  STD_TORCH_CHECK(!grouped || (x_groups.numel() == x.size(0) && y_groups.numel() == y.size(0)),
                  "similarity_lse: a group for every row and every column");
  for (const Tensor* ids : {&x_groups, &y_groups}) {
    STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->is_contiguous(),
                    "similarity_lse: groups must be contiguous int64");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, double scale, bool columns,
                                                   int64_t diagonal, const Tensor& cache, const Tensor& x_groups,
                                                   const Tensor& y_groups, int64_t tile) {
  check_inputs(x, y, x_groups, y_groups);
  STD_TORCH_CHECK(cache.scalar_type() == ScalarType::Float && cache.is_contiguous() &&
                      (cache.numel() == 0 || cache.numel() == x.size(0) * y.size(0)),
                  "similarity_lse: cache (M·N,) float32, contiguous, or empty");
  const Groups groups(x_groups, y_groups);
  const Tiles tiles(x, y, tile);
  const Outputs out(x, tiles, columns, diagonal, cache);
  const float shift = static_shift(x, y, scale);
  bool safe = std::isfinite(shift);
  if (safe) {
    sum_all(x, y, scale, shift, tiles, groups, out);
    safe = is_safe(out.row, shift) && is_safe(out.col, shift);
  }
  if (!safe) sum_all_online(x, y, scale, tiles, groups, out);
  return {out.row, out.col, out.pos, out.low};
}

// gradient of a log-sum-exp times exp(shift - lse - low), so that G is one product per pair
std::vector<float> shifted_factors(const Tensor& gradient, const float* lse, const float* low, double shift) {
  std::vector<float> out(gradient.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    const double base = lse == nullptr ? 0.0 : shift - lse[i];
    out[i] = static_cast<float>(data(gradient)[i] * std::exp(base - low[i]));
  }
  return out;
}

bool all_below(const std::vector<float>& values, float limit) {
  return std::all_of(values.begin(), values.end(), [&](float v) { return std::abs(v) < limit; });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& g_row, const Tensor& g_col, const Tensor& g_pos,
                                            const Tensor& x, const Tensor& y, double scale, const Tensor& row_lse,
                                            const Tensor& col_lse, const Tensor& low, const Tensor& cache,
                                            int64_t diagonal, const Tensor& x_groups, const Tensor& y_groups,
                                            bool need_x, bool need_y, bool need_scale, int64_t tile) {
  check_inputs(x, y, x_groups, y_groups);
  const Groups groups(x_groups, y_groups);
  const Tiles tiles(x, y, tile);
  const bool columns = g_col.numel() > 0;
  const float shift = static_shift(x, y, scale);
  GradMode mode = GradMode::kOnline;
  const float* row_low = data(low);
  const float* col_low = row_low + tiles.rows;
  std::vector<float> row_factor;
  std::vector<float> col_factor;
  if (std::isfinite(shift) && is_safe(row_lse, shift) && is_safe(col_lse, shift)) {
    row_factor = shifted_factors(g_row, data(row_lse), row_low, shift);
    if (columns) col_factor = shifted_factors(g_col, data(col_lse), col_low, shift);
    // a huge upstream gradient (loss scaling) could overflow the factor although its product would not
    if (all_below(row_factor, 1e37f) && all_below(col_factor, 1e37f)) mode = GradMode::kStatic;
  }
  if (mode == GradMode::kOnline) {
    // the kernel subtracts the log-sum-exp itself; only what rounding took from it is left
    row_factor = shifted_factors(g_row, nullptr, row_low, 0.0);
    col_factor = shifted_factors(g_col, nullptr, col_low, 0.0);
  }
  // from the cache dscale comes out of dx or dy; alone it needs the logits
  if (mode == GradMode::kStatic && cache.numel() > 0 && (need_x || need_y)) mode = GradMode::kCached;

  const Gradients gradients(x, y, tiles, need_x, need_y);
  Tensor dscale = flat_floats(x, need_scale ? 1 : 0);
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  std::vector<double> partial(tiles.workers * tiles.blocks(), 0.0);
  const bool sum_scale = need_scale && mode != GradMode::kCached;
  tiles.each(
      [&](const Tile& t) {
        const Tensor g = as_matrix(buffers[t.worker], t.m, t.n);
        if (mode != GradMode::kCached) multiply_tile(g, x, y, t);
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t count) {
          GradRows a{};
          a.in = mode == GradMode::kCached ? data(cache) + (t.r + first) * tiles.cols + t.c : data(g) + first * t.n;
          a.in_stride = mode == GradMode::kCached ? tiles.cols : t.n;
          a.out = data(g) + first * t.n;
          a.rows = count;
          a.cols = t.n;
          a.scale = static_cast<float>(scale);
          a.shift = shift;
          a.row_factor = row_factor.data() + t.r + first;
          a.col_factor = columns ? col_factor.data() + t.c : nullptr;
          a.row_lse = data(row_lse) + t.r + first;
          a.col_lse = columns ? data(col_lse) + t.c : nullptr;
          a.g_pos = g_pos.numel() > 0 ? data(g_pos) + t.r + first : nullptr;
          a.positive = diagonal + t.r + first - t.c;
          a.groups = groups.at(t.r + first, t.c, diagonal);
          a.scale_gradient = sum_scale ? partial.data() + t.worker * tiles.blocks() + b : nullptr;
          kernels<RowKernels>().grad(a, mode);
        });
        gradients.add(t, g);
      },
      [&](int64_t r, int64_t m) { gradients.end_stripe(r, m); });
  if (need_scale) {
    double total = 0;
    if (sum_scale) {
      for (double p : partial) total += p;
    } else {
      total = need_x ? weighted_dot(x, gradients.dx) : weighted_dot(y, gradients.dy);
    }
    data(dscale)[0] = static_cast<float>(total);
  }
  gradients.scale_by(scale);
  return {gradients.dx, gradients.dy, dscale};
}

// log-sum-exp from partial sums (K, N) of exp(logit - shift); flag becomes 1 where a sum cannot be trusted
Tensor lse_from_slabs(const Tensor& slabs, const Tensor& shift, Tensor flag) {
  STD_TORCH_CHECK(slabs.dim() == 2 && slabs.is_contiguous() && slabs.scalar_type() == ScalarType::Float,
                  "lse_from_slabs: slabs (K, N) float32, contiguous");
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Int && flag.numel() == 1, "lse_from_slabs: flag int32, 1 element");
  const int64_t count = slabs.size(1);
  Tensor out = flat_floats(slabs, count);
  const float c = data(shift)[0];
  for (int64_t j = 0; j < count; ++j) {
    float total = 0;
    for (int64_t k = 0; k < slabs.size(0); ++k) total += data(slabs)[k * count + j];
    if (!(total >= 1e-26f) || !std::isfinite(total)) *static_cast<int32_t*>(flag.data_ptr()) = 1;
    data(out)[j] = std::log(total) + c;
  }
  return out;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("similarity_lse_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("similarity_lse_backward", TORCH_BOX(&llm2clip::backward));
  m.impl("lse_from_slabs", TORCH_BOX(&llm2clip::lse_from_slabs));
}
