#include "../distill_rows.h"

#include <cmath>

#include "elements.h"
#include "exp.h"

namespace llm2clip {
namespace {

// a logit that exp takes to zero, for the lanes past the end of a row
constexpr float kNothing = -1e30f;

// sixteen logits; rounded before anything is subtracted, the same way in every pass
LLM2CLIP_INLINE Floats logits_of(const float* dots, float scale, int64_t count) {
  return fill_past(rounded(get(dots, count) * scale), count, kNothing);
}

// calls body(column, S, T, count) over row i, sixteen columns at a time
template <class Body>
LLM2CLIP_INLINE void for_each_pair(const DistillTile& tile, int64_t i, const Body& body) {
  const float* s = tile.student + i * tile.cols;
  const float* t = tile.teacher + i * tile.cols;
  for_each_lane_group(tile.cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    body(j, logits_of(s + j, tile.scale, count), logits_of(t + j, tile.teacher_scale, count), count);
  });
}

LLM2CLIP_INLINE void zero(float* values, int64_t count) {
  std::memset(values, 0, count * sizeof(float));
}

void sum_rows(const DistillSum& a) {
  const bool columns = a.col_student != nullptr;
  if (columns) {
    zero(a.col_student, a.tile.cols);
    zero(a.col_teacher, a.tile.cols);
    zero(a.col_cross, a.tile.cols);
  }
  for (int64_t i = 0; i < a.tile.rows; ++i) {
    Floats student{};
    Floats teacher{};
    Floats cross{};
    const float origin = a.row_origin[i];
    for_each_pair(a.tile, i, [&](int64_t j, Floats s, Floats t, int64_t count) __attribute__((always_inline)) {
      const Floats e = exp(s - a.shift);
      const Floats w = exp(t - a.teacher_shift);
      student += e;
      teacher += w;
      cross += w * (s - origin);
      if (columns) {
        add_to(a.col_student + j, e, count);
        add_to(a.col_teacher + j, w, count);
        add_to(a.col_cross + j, w * (s - get(a.col_origin + j, count)), count);
      }
    });
    a.row_student[i] += sum(student);
    a.row_teacher[i] += sum(teacher);
    a.row_cross[i] += sum(cross);
  }
}

// by how much sums relative to `before` shrink when `after` becomes their maximum
LLM2CLIP_INLINE double rescale(float before, float after) {
  return std::exp(static_cast<double>(finite_shift(before)) - finite_shift(after));
}

LLM2CLIP_INLINE double kept(double sum, double factor) {
  // an empty sum stays empty whatever its maximum was
  return sum == 0.0 ? 0.0 : sum * factor;
}

void online_rows(const DistillOnline& a) {
  constexpr float kLowest = -__builtin_inff();
  const DistillTile& tile = a.tile;
  const bool columns = a.col_student != nullptr;
  for (int64_t j = 0; columns && j < tile.cols; ++j) a.col_student_max[j] = a.col_teacher_max[j] = kLowest;
  for (int64_t i = 0; i < tile.rows; ++i) {
    float student_max = a.row_student_max[i];
    float teacher_max = a.row_teacher_max[i];
    for (int64_t j = 0; j < tile.cols; ++j) {
      const float s = tile.student[i * tile.cols + j] * tile.scale;
      const float t = tile.teacher[i * tile.cols + j] * tile.teacher_scale;
      if (s > student_max) student_max = s;
      if (t > teacher_max) teacher_max = t;
      if (columns && s > a.col_student_max[j]) a.col_student_max[j] = s;
      if (columns && t > a.col_teacher_max[j]) a.col_teacher_max[j] = t;
    }
    const float shift = finite_shift(student_max);
    const float teacher_shift = finite_shift(teacher_max);
    const float origin = a.row_origin[i];
    Floats student{};
    Floats teacher{};
    Floats cross{};
    for_each_pair(tile, i, [&](int64_t, Floats s, Floats t, int64_t) __attribute__((always_inline)) {
      const Floats w = exp(t - teacher_shift);
      student += exp(s - shift);
      teacher += w;
      cross += w * (s - origin);
    });
    const double shrink = rescale(a.row_teacher_max[i], teacher_max);
    a.row_student[i] = kept(a.row_student[i], rescale(a.row_student_max[i], student_max)) + sum(student);
    a.row_teacher[i] = kept(a.row_teacher[i], shrink) + sum(teacher);
    a.row_cross[i] = kept(a.row_cross[i], shrink) + sum(cross);
    a.row_student_max[i] = student_max;
    a.row_teacher_max[i] = teacher_max;
  }
  if (!columns) return;
  zero(a.col_student, tile.cols);
  zero(a.col_teacher, tile.cols);
  zero(a.col_cross, tile.cols);
  for (int64_t i = 0; i < tile.rows; ++i) {
    for_each_pair(tile, i, [&](int64_t j, Floats s, Floats t, int64_t count) __attribute__((always_inline)) {
      const Floats top = finite_shift(get(a.col_student_max + j, count));
      const Floats teacher_top = finite_shift(get(a.col_teacher_max + j, count));
      const Floats w = exp(t - teacher_top);
      add_to(a.col_student + j, exp(s - top), count);
      add_to(a.col_teacher + j, w, count);
      add_to(a.col_cross + j, w * (s - get(a.col_origin + j, count)), count);
    });
  }
}

template <bool online>
LLM2CLIP_INLINE Floats weighted(const DistillFactors& f, Floats logits, int64_t i, int64_t j, int64_t count) {
  if constexpr (online) {
    Floats g = exp(logits - f.row_lse[i]) * f.row[i];
    if (f.col != nullptr) g += exp(logits - get(f.col_lse + j, count)) * get(f.col + j, count);
    return g;
  } else {
    Floats factor = broadcast(f.row[i]);
    if (f.col != nullptr) factor += get(f.col + j, count);
    return exp(logits - f.shift) * factor;
  }
}

template <bool online, bool teacher>
LLM2CLIP_INLINE void grad_body(const DistillGrad& a) {
  const DistillTile& tile = a.tile;
  for (int64_t i = 0; i < tile.rows; ++i) {
    float* row = tile.student + i * tile.cols;
    const float* teacher_row = teacher ? tile.teacher + i * tile.cols : nullptr;
    const int64_t positive = a.positive + i;
    const bool has_positive = a.g_pos != nullptr && positive >= 0 && positive < tile.cols;
    // read before G overwrites it
    const float positive_dot = has_positive ? row[positive] : 0.0f;
    Floats scaled{};
    for_each_lane_group(tile.cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Floats g = weighted<online>(a.student, logits_of(row + j, tile.scale, count), i, j, count);
      if constexpr (teacher) {
        g += weighted<online>(a.teacher, logits_of(teacher_row + j, tile.teacher_scale, count), i, j, count);
      }
      // the dot again rather than logit/scale, which is undefined at scale 0
      if (a.scale_gradient != nullptr) scaled += get(row + j, count) * g;
      put(row + j, g, count);
    });
    double gradient = sum(scaled);
    if (has_positive) {
      row[positive] += a.g_pos[i];
      gradient += static_cast<double>(a.g_pos[i]) * positive_dot;
    }
    if (a.scale_gradient != nullptr) *a.scale_gradient += gradient;
  }
}

void grad_rows(const DistillGrad& a) {
  if (a.tile.teacher == nullptr) {
    a.online ? grad_body<true, false>(a) : grad_body<false, false>(a);
  } else {
    a.online ? grad_body<true, true>(a) : grad_body<false, true>(a);
  }
}

}  // namespace

const DistillKernels DistillKernels::LLM2CLIP_INSTRUCTION_SET{sum_rows, online_rows, grad_rows};

}  // namespace llm2clip
