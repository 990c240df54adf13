// What happens to a tile of student and one of teacher dot products, row by row, on one thread.

#pragma once

#include <cstdint>

namespace llm2clip {

// Both tiles: plain dot products, (rows, cols), rows contiguous; the logits are scale·dot. The student's is S, the
// teacher's T. Cross terms are sums of exp(T)·(S - origin): with an origin near the S that has the teacher's weight,
// the sum is small and its rounding with it.
struct DistillTile {
  float* student;
  const float* teacher;  // null where only the student is wanted
  int64_t rows;
  int64_t cols;
  float scale;
  float teacher_scale;
};

struct DistillSum {
  DistillTile tile;
  float shift;
  float teacher_shift;
  const float* row_origin;  // (rows,)
  const float* col_origin;  // (cols,)
  // += over the columns of exp(S - shift), exp(T - teacher_shift), exp(T - teacher_shift)·(S - row_origin)
  double* row_student;
  double* row_teacher;
  double* row_cross;
  // = the same over these rows; null when no columns are wanted
  float* col_student;
  float* col_teacher;
  float* col_cross;
};

struct DistillOnline {
  DistillTile tile;
  const float* row_origin;
  const float* col_origin;
  // running maxima, and sums relative to them
  float* row_student_max;
  float* row_teacher_max;
  double* row_student;
  double* row_teacher;
  double* row_cross;
  // of these rows; null when no columns are wanted
  float* col_student_max;
  float* col_teacher_max;
  float* col_student;
  float* col_teacher;
  float* col_cross;
};

// How much one matrix's exponentials weigh in G = dL/dS.
struct DistillFactors {
  // static shift: exp(logit - shift)·(row + col); otherwise row·exp(logit - row_lse) + col·exp(logit - col_lse)
  float shift;
  const float* row;  // (rows,)
  const float* col;  // (cols,), null when no columns are wanted
  const float* row_lse;
  const float* col_lse;
};

struct DistillGrad {
  DistillTile tile;  // G overwrites tile.student
  DistillFactors student;
  DistillFactors teacher;
  bool online;             // logits less their log-sum-exp, instead of less a constant
  const float* g_pos;      // (rows,) added at column positive + row, or null
  int64_t positive;        // may be outside [0, cols)
  double* scale_gradient;  // += sum of G·dot; null when not wanted
};

struct DistillKernels {
  void (*sum)(const DistillSum&);
  void (*online)(const DistillOnline&);
  void (*grad)(const DistillGrad&);

  static const DistillKernels portable, avx2, avx512;
};

}  // namespace llm2clip
