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
#include <utility>
#include <vector>

#include "distill_rows.h"
#include "finite_shift.h"
#include "gradients.h"
#include "instruction_set.h"
#include "shift.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// The four matrices, and the two tiles of products of every worker.
struct Matrices {
  const Tensor& x;
  const Tensor& y;
  const Tensor& p;
  const Tensor& q;
  float scale, teacher_scale;
  Tiles tiles;
  int64_t rows, cols;
  std::vector<Tensor> student, teacher;

  Matrices(const Tensor& x, const Tensor& y, double scale, const Tensor& p, const Tensor& q, double teacher_scale,
           int64_t tile, bool with_teacher = true)
      : x(x), y(y), p(p), q(q), scale(static_cast<float>(scale)), teacher_scale(static_cast<float>(teacher_scale)),
        tiles(x, y, tile), rows(tiles.rows), cols(tiles.cols),
        student(worker_buffers(x, tiles.workers, tiles.height * tiles.width)),
        teacher(worker_buffers(x, with_teacher ? tiles.workers : 0, tiles.height * tiles.width)) {
    for (const Tensor* t : {&x, &y, &p, &q}) {
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->is_contiguous(),
                      "similarity_distill: the CPU kernel takes contiguous float32 matrices");
    }
    STD_TORCH_CHECK(x.size(1) == y.size(1) && p.size(1) == q.size(1) && p.size(0) == rows && q.size(0) == cols,
                    "similarity_distill: x (M, D), y (N, D), p (M, E), q (N, E)");
  }

  // rows [first, first + count) of a tile
  DistillTile block(const Tile& t, int64_t first, int64_t count) const {
    return {data(student[t.worker]) + first * t.n,
            teacher.empty() ? nullptr : data(teacher[t.worker]) + first * t.n, count, t.n, scale, teacher_scale};
  }

  void multiply_tiles(const Tile& t) const {
    multiply_tile(as_matrix(student[t.worker], t.m, t.n), x, y, t);
    if (!teacher.empty()) multiply_tile(as_matrix(teacher[t.worker], t.m, t.n), p, q, t);
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
  void take_positives(const Matrices& a, const Tile& t) const {
    for (int64_t i = 0; i < t.m && pos.numel() > 0; ++i) {
      const int64_t j = diagonal + t.r + i - t.c;
      if (j < 0 || j >= t.n) continue;
      put(pos, row.numel() + col.numel(), t.r + i, a.scale * data(a.student[t.worker])[i * t.n + j]);
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

// What is subtracted from S inside the cross terms: the positive logit, where most of a teacher's weight lies; for rows
// and columns without one their mean logit, which takes away what all of them have in common.
struct Origins {
  std::vector<float> row, col;

  Origins(const Matrices& a, int64_t diagonal) : row(a.rows), col(a.cols) {
    const bool paired = diagonal >= 0;
    const std::vector<float> mean_x = mean(a.x);
    const std::vector<float> mean_y = mean(a.y);
    const int64_t dim = a.x.size(1);
    const float* x = data(a.x);
    const float* y = data(a.y);
    for_each_block(a.rows, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; ++i) {
        row[i] = logit(a, x + i * dim, paired ? y + (diagonal + i) * dim : mean_y.data());
      }
    });
    for_each_block(a.cols, [&](int64_t, int64_t first, int64_t count) {
      for (int64_t j = first; j < first + count; ++j) {
        const int64_t i = j - diagonal;
        col[j] = paired && i >= 0 && i < a.rows ? row[i] : logit(a, mean_x.data(), y + j * dim);
      }
    });
  }

  static float logit(const Matrices& a, const float* u, const float* v) {
    double total = 0;
    for (int64_t k = 0; k < a.x.size(1); ++k) total += static_cast<double>(u[k]) * v[k];
    return finite_shift(static_cast<float>(total * a.scale));
  }

  static std::vector<float> mean(const Tensor& t) {
    const int64_t dim = t.size(1);
    std::vector<double> sum(dim, 0.0);
    for (int64_t i = 0; i < t.size(0); ++i) {
      for (int64_t k = 0; k < dim; ++k) sum[k] += data(t)[i * dim + k];
    }
    std::vector<float> out(dim);
    for (int64_t k = 0; k < dim; ++k) out[k] = static_cast<float>(sum[k] / static_cast<double>(t.size(0)));
    return out;
  }
};

// Sums of exp(S), exp(T) and exp(T)·(S - origin): along rows in doubles, along columns of a row block in floats.
template <class Number>
struct Sums {
  std::vector<Number> student, teacher, cross;
  explicit Sums(int64_t count) : student(count), teacher(count), cross(count) {}
};

// the maxima that such sums are relative to
struct Maxima {
  std::vector<float> student, teacher;
  explicit Maxima(int64_t count) : student(count, kLowest), teacher(count, kLowest) {}
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();
};

int64_t partial_count(const Matrices& a, bool columns) {
  return columns ? a.tiles.workers * a.tiles.blocks() * a.tiles.width : 0;
}

void sum_all(const Matrices& a, float shift, float teacher_shift, const Origins& origins, const Outputs& out) {
  const bool columns = out.columns();
  const int64_t height = a.tiles.height;
  Sums<double> rows(a.tiles.workers * height);
  Sums<double> cols(columns ? a.cols : 0);
  Sums<float> partial(partial_count(a, columns));
  const double s = shift;
  const double t = teacher_shift;
  a.tiles.each(
      [&](const Tile& tile) {
        a.multiply_tiles(tile);
        out.take_positives(a, tile);
        const int64_t begin = tile.worker * a.tiles.blocks() * a.tiles.width;
        for_each_block(tile.m, [&](int64_t b, int64_t first, int64_t count) {
          const int64_t i = tile.worker * height + first;
          const int64_t at = begin + b * tile.n;
          kernels<DistillKernels>().sum({a.block(tile, first, count), shift, teacher_shift, &origins.row[tile.r + first],
                                 &origins.col[tile.c], &rows.student[i], &rows.teacher[i], &rows.cross[i],
                                 columns ? &partial.student[at] : nullptr, columns ? &partial.teacher[at] : nullptr,
                                 columns ? &partial.cross[at] : nullptr});
        });
        for (int64_t b = 0; columns && b * kBlock < tile.m; ++b) {
          for (int64_t j = 0; j < tile.n; ++j) {
            const int64_t at = begin + b * tile.n + j;
            cols.student[tile.c + j] += partial.student[at];
            cols.teacher[tile.c + j] += partial.teacher[at];
            cols.cross[tile.c + j] += partial.cross[at];
          }
        }
      },
      [&](int64_t r, int64_t m) {
        const auto take = [&](std::vector<double>& sums, int64_t i) {
          double total = 0;
          for (int64_t w = i; w < a.tiles.workers * height; w += height) {
            total += sums[w];
            sums[w] = 0;
          }
          return total;
        };
        for (int64_t i = 0; i < m; ++i) {
          const double teacher = take(rows.teacher, i);
          out.put_row(r + i, std::log(take(rows.student, i)) + s,
                      take(rows.cross, i) / teacher + origins.row[r + i], std::log(teacher) + t);
        }
      });
  for (size_t j = 0; j < cols.student.size(); ++j) {
    out.put_col(j, std::log(cols.student[j]) + s, cols.cross[j] / cols.teacher[j] + origins.col[j],
                std::log(cols.teacher[j]) + t);
  }
}

// One row or column relative to its maxima, and the merging of others into it.
struct Running {
  float student_max = Maxima::kLowest;
  float teacher_max = Maxima::kLowest;
  double student = 0, teacher = 0, cross = 0;

  template <class Number>
  void add(const Maxima& maxima, const Sums<Number>& sums, int64_t at) {
    const auto factors = raise(student_max, maxima.student[at]);
    student = merged(student, sums.student[at], factors);
    const auto teacher_factors = raise(teacher_max, maxima.teacher[at]);
    teacher = merged(teacher, sums.teacher[at], teacher_factors);
    cross = merged(cross, sums.cross[at], teacher_factors);
  }
  double lse() const { return std::log(student) + finite_shift(student_max); }
  double teacher_lse() const { return std::log(teacher) + finite_shift(teacher_max); }

 private:
  using Factors = std::pair<double, double>;

  // raises a maximum and returns what sums relative to the old and the other one are multiplied by
  static Factors raise(float& largest, float other) {
    const float top = std::max(largest, other);
    const double shift = finite_shift(top);
    const Factors factors{std::exp(finite_shift(largest) - shift), std::exp(finite_shift(other) - shift)};
    largest = top;
    return factors;
  }
  static double merged(double sum, double other, const Factors& factors) {
    // an empty sum stays empty whatever its maximum was
    return (sum == 0.0 ? 0.0 : sum * factors.first) + (other == 0.0 ? 0.0 : other * factors.second);
  }
};

void sum_all_online(const Matrices& a, const Origins& origins, const Outputs& out) {
  const bool columns = out.columns();
  const int64_t height = a.tiles.height;
  Sums<double> rows(a.tiles.workers * height);
  Maxima row_max(a.tiles.workers * height);
  std::vector<Running> cols(columns ? a.cols : 0);
  Sums<float> partial(partial_count(a, columns));
  Maxima partial_max(partial_count(a, columns));
  a.tiles.each(
      [&](const Tile& tile) {
        a.multiply_tiles(tile);
        out.take_positives(a, tile);
        const int64_t begin = tile.worker * a.tiles.blocks() * a.tiles.width;
        for_each_block(tile.m, [&](int64_t b, int64_t first, int64_t count) {
          const int64_t i = tile.worker * height + first;
          const int64_t at = begin + b * tile.n;
          DistillOnline o{};
          o.tile = a.block(tile, first, count);
          o.row_origin = &origins.row[tile.r + first];
          o.col_origin = &origins.col[tile.c];
          o.row_student_max = &row_max.student[i];
          o.row_teacher_max = &row_max.teacher[i];
          o.row_student = &rows.student[i];
          o.row_teacher = &rows.teacher[i];
          o.row_cross = &rows.cross[i];
          if (columns) {
            o.col_student_max = &partial_max.student[at];
            o.col_teacher_max = &partial_max.teacher[at];
            o.col_student = &partial.student[at];
            o.col_teacher = &partial.teacher[at];
            o.col_cross = &partial.cross[at];
          }
          kernels<DistillKernels>().online(o);
        });
        for (int64_t b = 0; columns && b * kBlock < tile.m; ++b) {
          for (int64_t j = 0; j < tile.n; ++j) cols[tile.c + j].add(partial_max, partial, begin + b * tile.n + j);
        }
      },
      [&](int64_t r, int64_t m) {
        for (int64_t i = 0; i < m; ++i) {
          Running total;
          for (int64_t w = i; w < a.tiles.workers * height; w += height) {
            total.add(row_max, rows, w);
            rows.student[w] = rows.teacher[w] = rows.cross[w] = 0;
            row_max.student[w] = row_max.teacher[w] = Maxima::kLowest;
          }
          out.put_row(r + i, total.lse(), total.cross / total.teacher + origins.row[r + i], total.teacher_lse());
        }
      });
  for (size_t j = 0; j < cols.size(); ++j) {
    out.put_col(j, cols[j].lse(), cols[j].cross / cols[j].teacher + origins.col[j], cols[j].teacher_lse());
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
  const bool taught = g_cross_row.numel() > 0;
  const Matrices a(x, y, scale, p, q, teacher_scale, tile, taught);
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

  const Gradients gradients(x, y, a.tiles, need_x, need_y);
  Tensor dscale = flat_floats(x, need_scale ? 1 : 0);
  std::vector<double> partial(a.tiles.workers * a.tiles.blocks(), 0.0);
  a.tiles.each(
      [&](const Tile& t) {
        a.multiply_tiles(t);
        for_each_block(t.m, [&](int64_t b, int64_t first, int64_t count) {
          const int64_t i = t.r + first;
          kernels<DistillKernels>().grad({a.block(t, first, count), student.at(i, t.c),
                                  taught ? teacher.at(i, t.c) : DistillFactors{}, online,
                                  g_pos.numel() > 0 ? data(g_pos) + i : nullptr, diagonal + i - t.c,
                                  need_scale ? &partial[t.worker * a.tiles.blocks() + b] : nullptr});
        });
        gradients.add(t, as_matrix(a.student[t.worker], t.m, t.n));
      },
      [&](int64_t r, int64_t m) { gradients.end_stripe(r, m); });
  if (need_scale) {
    double total = 0;
    for (double v : partial) total += v;
    data(dscale)[0] = static_cast<float>(total);
  }
  gradients.scale_by(scale);
  return {gradients.dx, gradients.dy, dscale};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("similarity_distill_forward", TORCH_BOX(&llm2clip::distill_forward));
  m.impl("similarity_distill_backward", TORCH_BOX(&llm2clip::distill_backward));
}
