// similarity_distill on the CPU: a student's similarity matrix against a teacher's, by tiles of both.
//
// S = scale·x·yᵀ and T = teacher_scale·p·qᵀ. One sweep fills the sums of exp(S), exp(T) and exp(T)·S along rows and
// columns, each relative to one constant shift (see similarity_lse.cpp); where those sums cannot be trusted, a second
// sweep keeps running maxima. T gets no gradient, so the backward is linear in the teacher's softmax:
//
//   G = g_row∘exp(S - row_lse) + g_col∘exp(S - col_lse) + g_pos + g_crow∘softmax_rows(T) + g_ccol∘softmax_cols(T)

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "distill_rows.h"
#include "shift.h"
#include "similarity_rows.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// calls body(first row, rows, first column, columns) for every tile
template <class Body>
void for_each_tile(int64_t rows, int64_t cols, int64_t tile, const Body& body) {
  for (int64_t r = 0; r < rows; r += tile) {
    for (int64_t c = 0; c < cols; c += tile) body(r, std::min(tile, rows - r), c, std::min(tile, cols - c));
  }
}

// The four matrices, and the two tiles of products.
struct Matrices {
  const Tensor& x;
  const Tensor& y;
  const Tensor& p;
  const Tensor& q;
  float scale, teacher_scale;
  int64_t rows, cols, tile;
  Tensor student, teacher;

  Matrices(const Tensor& x, const Tensor& y, double scale, const Tensor& p, const Tensor& q, double teacher_scale,
           int64_t tile)
      : x(x), y(y), p(p), q(q), scale(static_cast<float>(scale)), teacher_scale(static_cast<float>(teacher_scale)),
        rows(x.size(0)), cols(y.size(0)), tile(tile),
        student(flat_floats(x, std::min(tile, rows) * std::min(tile, cols))),
        teacher(flat_floats(x, std::min(tile, rows) * std::min(tile, cols))) {
    for (const Tensor* t : {&x, &y, &p, &q}) {
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous(),
                      "similarity_distill: the CPU kernel takes contiguous float32 matrices");
    }
    STD_TORCH_CHECK(x.size(1) == y.size(1) && p.size(1) == q.size(1) && p.size(0) == rows && q.size(0) == cols,
                    "similarity_distill: x (M, D), y (N, D), p (M, E), q (N, E)");
  }

  // rows [first, first + count) of the tile of n columns
  DistillTile block(int64_t first, int64_t count, int64_t n, bool with_teacher = true) const {
    return {data(student) + first * n, with_teacher ? data(teacher) + first * n : nullptr,
            count, n, scale, teacher_scale};
  }

  void multiply_tiles(int64_t r, int64_t m, int64_t c, int64_t n, bool with_teacher = true) const {
    multiply(as_matrix(student, m, n), product_view(x, r, m), torch::stable::transpose(product_view(y, c, n), 0, 1),
             false);
    if (!with_teacher) return;
    multiply(as_matrix(teacher, m, n), product_view(p, r, m), torch::stable::transpose(product_view(q, c, n), 0, 1),
             false);
  }
};

// Results, and in `low` what fp32 rounding took from them: of row, col, pos, cross_row, cross_col, teacher_row,
// teacher_col, one after the other.
struct Outputs {
  Tensor row, col, pos, cross_row, cross_col, teacher_row, teacher_col, low;
  int64_t diagonal;

  Outputs(const Matrices& a, bool columns, int64_t diagonal)
      : row(flat_floats(a.x, a.rows)),
        col(flat_floats(a.x, columns ? a.cols : 0)),
        pos(flat_floats(a.x, diagonal >= 0 ? a.rows : 0)),
        cross_row(flat_floats(a.x, a.rows)),
        cross_col(flat_floats(a.x, columns ? a.cols : 0)),
        teacher_row(flat_floats(a.x, a.rows)),
        teacher_col(flat_floats(a.x, columns ? a.cols : 0)),
        low(flat_floats(a.x, 3 * a.rows + pos.numel() + 3 * col.numel())),
        diagonal(diagonal) {}

  bool columns() const { return col.numel() > 0; }

  void put(const Tensor& to, int64_t low_start, int64_t i, double value) const {
    const float high = static_cast<float>(value);
    data(to)[i] = high;
    data(low)[low_start + i] = std::isfinite(high) ? static_cast<float>(value - high) : 0.0f;
  }
  int64_t after_positives() const { return row.numel() + col.numel() + pos.numel(); }
  int64_t after_cross() const { return after_positives() + row.numel() + col.numel(); }

  void put_row(int64_t i, double student, double cross, double teacher) const {
    put(row, 0, i, student);
    put(cross_row, after_positives(), i, cross);
    put(teacher_row, after_cross(), i, teacher);
  }
  void put_col(int64_t j, double student, double cross, double teacher) const {
    put(col, row.numel(), j, student);
    put(cross_col, after_positives() + row.numel(), j, cross);
    put(teacher_col, after_cross() + row.numel(), j, teacher);
  }

  // from the same tile, rounded the same way: an error of the logit then cancels in lse - pos
  void take_positives(const Matrices& a, int64_t r, int64_t m, int64_t c, int64_t n) const {
    for (int64_t i = 0; i < m && pos.numel() > 0; ++i) {
      const int64_t j = diagonal + r + i - c;
      if (j >= 0 && j < n) put(pos, row.numel() + col.numel(), r + i, a.scale * data(a.student)[i * n + j]);
    }
  }

  bool is_trusted(float shift, float teacher_shift) const {
    const auto finite = [](const Tensor& t) {
      return std::all_of(data(t), data(t) + t.numel(), [](float v) { return std::isfinite(v); });
    };
    return is_safe(row, shift) && is_safe(col, shift) && is_safe(teacher_row, teacher_shift) &&
           is_safe(teacher_col, teacher_shift) && finite(cross_row) && finite(cross_col);
  }
};

// What is subtracted from S inside the cross terms: the positive logit, where most of a teacher's weight lies.
struct Origins {
  std::vector<float> row, col;

  Origins(const Matrices& a, int64_t diagonal) : row(a.rows, 0.0f), col(a.cols, 0.0f) {
    if (diagonal < 0) return;
    const int64_t dim = a.x.size(1);
    for_each_block(a.rows, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        const float* u = data(a.x) + i * dim;
        const float* v = data(a.y) + (diagonal + i) * dim;
        double total = 0;
        for (int64_t k = 0; k < dim; ++k) total += static_cast<double>(u[k]) * v[k];
        row[i] = col[diagonal + i] = finite_shift(static_cast<float>(total * a.scale));
      }
    });
  }
};

// the sums of one side, rows or columns
struct Sums {
  std::vector<double> student, teacher, cross;
  explicit Sums(int64_t count) : student(count, 0.0), teacher(count, 0.0), cross(count, 0.0) {}
};

// the sums along columns of every row block of a tile
struct Partials {
  std::vector<float> student, teacher, cross;
  explicit Partials(int64_t count) : student(count), teacher(count), cross(count) {}
};

int64_t partial_count(const Matrices& a, bool columns) {
  return columns ? (std::min(a.tile, a.rows) + kBlock - 1) / kBlock * std::min(a.tile, a.cols) : 0;
}

void sum_all(const Matrices& a, float shift, float teacher_shift, const Origins& origins, const Outputs& out) {
  const bool columns = out.columns();
  Sums rows(a.rows);
  Sums cols(columns ? a.cols : 0);
  Partials partial(partial_count(a, columns));
  for_each_tile(a.rows, a.cols, a.tile, [&](int64_t r, int64_t m, int64_t c, int64_t n) {
    a.multiply_tiles(r, m, c, n);
    out.take_positives(a, r, m, c, n);
    for_each_block(m, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t i = r + first;
      const int64_t at = b * n;
      distill_kernels().sum({a.block(first, count, n), shift, teacher_shift, &origins.row[i], &origins.col[c],
                             &rows.student[i], &rows.teacher[i], &rows.cross[i],
                             columns ? &partial.student[at] : nullptr, columns ? &partial.teacher[at] : nullptr,
                             columns ? &partial.cross[at] : nullptr});
    });
    for (int64_t b = 0; columns && b * kBlock < m; ++b) {
      for (int64_t j = 0; j < n; ++j) {
        cols.student[c + j] += partial.student[b * n + j];
        cols.teacher[c + j] += partial.teacher[b * n + j];
        cols.cross[c + j] += partial.cross[b * n + j];
      }
    }
  });
  const double s = shift;
  const double t = teacher_shift;
  for (int64_t i = 0; i < a.rows; ++i) {
    out.put_row(i, std::log(rows.student[i]) + s, rows.cross[i] / rows.teacher[i] + origins.row[i],
                std::log(rows.teacher[i]) + t);
  }
  for (int64_t j = 0; columns && j < a.cols; ++j) {
    out.put_col(j, std::log(cols.student[j]) + s, cols.cross[j] / cols.teacher[j] + origins.col[j],
                std::log(cols.teacher[j]) + t);
  }
}

// raises a running maximum and returns what sums relative to the old and the new one are multiplied by
std::pair<double, double> raise(float& largest, float other) {
  const float top = std::max(largest, other);
  const double shift = finite_shift(top);
  const std::pair<double, double> factors{std::exp(finite_shift(largest) - shift),
                                          std::exp(finite_shift(other) - shift)};
  largest = top;
  return factors;
}

double merged(double sum, double other, const std::pair<double, double>& factors) {
  // an empty sum stays empty whatever its maximum was
  return (sum == 0.0 ? 0.0 : sum * factors.first) + (other == 0.0 ? 0.0 : other * factors.second);
}

void sum_all_online(const Matrices& a, const Origins& origins, const Outputs& out) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const bool columns = out.columns();
  Sums rows(a.rows);
  Sums cols(columns ? a.cols : 0);
  std::vector<float> row_max(a.rows, kLowest);
  std::vector<float> row_teacher_max(a.rows, kLowest);
  std::vector<float> col_max(cols.student.size(), kLowest);
  std::vector<float> col_teacher_max(cols.student.size(), kLowest);
  Partials partial(partial_count(a, columns));
  std::vector<float> partial_max(partial.student.size());
  std::vector<float> partial_teacher_max(partial.student.size());
  for_each_tile(a.rows, a.cols, a.tile, [&](int64_t r, int64_t m, int64_t c, int64_t n) {
    a.multiply_tiles(r, m, c, n);
    out.take_positives(a, r, m, c, n);
    for_each_block(m, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t i = r + first;
      DistillOnline o{};
      o.tile = a.block(first, count, n);
      o.row_origin = &origins.row[i];
      o.col_origin = &origins.col[c];
      o.row_student_max = &row_max[i];
      o.row_teacher_max = &row_teacher_max[i];
      o.row_student = &rows.student[i];
      o.row_teacher = &rows.teacher[i];
      o.row_cross = &rows.cross[i];
      if (columns) {
        o.col_student_max = &partial_max[b * n];
        o.col_teacher_max = &partial_teacher_max[b * n];
        o.col_student = &partial.student[b * n];
        o.col_teacher = &partial.teacher[b * n];
        o.col_cross = &partial.cross[b * n];
      }
      distill_kernels().online(o);
    });
    for (int64_t b = 0; columns && b * kBlock < m; ++b) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t k = b * n + j;
        const auto factors = raise(col_max[c + j], partial_max[k]);
        cols.student[c + j] = merged(cols.student[c + j], partial.student[k], factors);
        const auto teacher_factors = raise(col_teacher_max[c + j], partial_teacher_max[k]);
        cols.teacher[c + j] = merged(cols.teacher[c + j], partial.teacher[k], teacher_factors);
        cols.cross[c + j] = merged(cols.cross[c + j], partial.cross[k], teacher_factors);
      }
    }
  });
  for (int64_t i = 0; i < a.rows; ++i) {
    out.put_row(i, std::log(rows.student[i]) + finite_shift(row_max[i]),
                rows.cross[i] / rows.teacher[i] + origins.row[i],
                std::log(rows.teacher[i]) + finite_shift(row_teacher_max[i]));
  }
  for (size_t j = 0; j < cols.student.size(); ++j) {
    out.put_col(j, std::log(cols.student[j]) + finite_shift(col_max[j]),
                cols.cross[j] / cols.teacher[j] + origins.col[j],
                std::log(cols.teacher[j]) + finite_shift(col_teacher_max[j]));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distill_forward(
    const Tensor& x, const Tensor& y, double scale, const Tensor& p, const Tensor& q, double teacher_scale,
    bool columns, int64_t diagonal, int64_t tile) {
  const Matrices a(x, y, scale, p, q, teacher_scale, tile);
  const Outputs out(a, columns, diagonal);
  const Origins origins(a, diagonal);
  const float shift = static_shift(x, y, scale);
  const float teacher_shift = static_shift(p, q, teacher_scale);
  bool trusted = std::isfinite(shift) && std::isfinite(teacher_shift);
  if (trusted) {
    sum_all(a, shift, teacher_shift, origins, out);
    trusted = out.is_trusted(shift, teacher_shift);
  }
  if (!trusted) sum_all_online(a, origins, out);
  return {out.row, out.col, out.pos, out.cross_row, out.cross_col, out.teacher_row, out.teacher_col, out.low};
}

// Gradients of the log-sum-exps of one matrix, as factors of its exponentials.
struct Factors {
  std::vector<float> row, col;
  const Tensor& row_lse;
  const Tensor& col_lse;
  float shift;
  bool columns;

  Factors(const Tensor& g_row, const Tensor& g_col, const Tensor& row_lse, const Tensor& col_lse, const float* row_low,
          const float* col_low, float shift, bool online)
      : row(factors(g_row, row_lse, row_low, shift, online)),
        col(factors(g_col, col_lse, col_low, shift, online)),
        row_lse(row_lse),
        col_lse(col_lse),
        shift(shift),
        columns(g_col.numel() > 0) {}

  // gradient·exp(shift - lse - low); online, the kernel subtracts lse itself and only what rounding took is left
  static std::vector<float> factors(const Tensor& g, const Tensor& lse, const float* low, double shift, bool online) {
    std::vector<float> out(g.numel());
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<float>(data(g)[i] * std::exp((online ? 0.0 : shift - data(lse)[i]) - low[i]));
    }
    return out;
  }

  // a huge upstream gradient (loss scaling) could overflow the factor although its product would not
  bool fit() const {
    const auto fits = [](const std::vector<float>& values) {
      return std::all_of(values.begin(), values.end(), [](float v) { return std::abs(v) < 1e37f; });
    };
    return fits(row) && fits(col);
  }

  DistillFactors at(int64_t i, int64_t j) const {
    return {shift, row.data() + i, columns ? col.data() + j : nullptr, data(row_lse) + i,
            columns ? data(col_lse) + j : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor> distill_backward(
    const Tensor& g_row, const Tensor& g_col, const Tensor& g_pos, const Tensor& g_cross_row,
    const Tensor& g_cross_col, const Tensor& x, const Tensor& y, double scale, const Tensor& p, const Tensor& q,
    double teacher_scale, const Tensor& row_lse, const Tensor& col_lse, const Tensor& teacher_row,
    const Tensor& teacher_col, const Tensor& low, int64_t diagonal, bool need_x, bool need_y, bool need_scale,
    int64_t tile) {
  const Matrices a(x, y, scale, p, q, teacher_scale, tile);
  const bool taught = g_cross_row.numel() > 0;
  const float shift = static_shift(x, y, scale);
  const float teacher_shift = taught ? static_shift(p, q, teacher_scale) : 0.0f;
  const float* row_low = data(low);
  const float* col_low = row_low + a.rows;
  // teacher_col is last
  const float* teacher_col_low = data(low) + low.numel() - teacher_col.numel();
  const float* teacher_row_low = teacher_col_low - a.rows;
  const auto student_factors = [&](bool online) {
    return Factors(g_row, g_col, row_lse, col_lse, row_low, col_low, shift, online);
  };
  const auto teacher_factors = [&](bool online) {
    return Factors(g_cross_row, g_cross_col, teacher_row, teacher_col, teacher_row_low, teacher_col_low,
                   teacher_shift, online);
  };
  bool online = !(std::isfinite(shift) && is_safe(row_lse, shift) && is_safe(col_lse, shift));
  if (taught) {
    online = online || !(std::isfinite(teacher_shift) && is_safe(teacher_row, teacher_shift) &&
                         is_safe(teacher_col, teacher_shift));
  }
  online = online || !student_factors(false).fit() || !teacher_factors(false).fit();
  const Factors student = student_factors(online);
  const Factors teacher = teacher_factors(online);

  Tensor dx = torch::stable::new_empty(x, {need_x ? a.rows : 0, x.size(1)}, ScalarType::Float);
  Tensor dy = torch::stable::new_empty(y, {need_y ? a.cols : 0, y.size(1)}, ScalarType::Float);
  Tensor dscale = flat_floats(x, need_scale ? 1 : 0);
  std::vector<double> partial((std::min(tile, a.rows) + kBlock - 1) / kBlock, 0.0);
  for_each_tile(a.rows, a.cols, tile, [&](int64_t r, int64_t m, int64_t c, int64_t n) {
    a.multiply_tiles(r, m, c, n, taught);
    for_each_block(m, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t i = r + first;
      distill_kernels().grad({a.block(first, count, n, taught), student.at(i, c),
                              taught ? teacher.at(i, c) : DistillFactors{}, online,
                              g_pos.numel() > 0 ? data(g_pos) + i : nullptr, diagonal + i - c,
                              need_scale ? &partial[b] : nullptr});
    });
    const Tensor g = as_matrix(a.student, m, n);
    if (need_x) multiply(product_view(dx, r, m), g, product_view(y, c, n), c > 0);
    if (need_y) multiply(product_view(dy, c, n), torch::stable::transpose(g, 0, 1), product_view(x, r, m), r > 0);
  });
  if (need_scale) {
    double total = 0;
    for (double v : partial) total += v;
    data(dscale)[0] = static_cast<float>(total);
  }
  if (need_x) multiply_by(dx, scale);
  if (need_y) multiply_by(dy, scale);
  return {dx, dy, dscale};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("similarity_distill_forward", TORCH_BOX(&llm2clip::distill_forward));
  m.impl("similarity_distill_backward", TORCH_BOX(&llm2clip::distill_backward));
}
