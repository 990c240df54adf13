#include "../l2_normalize_rows.h"

#include <cmath>

#include "elements.h"

namespace llm2clip {
namespace {

template <class X, class Y>
LLM2CLIP_INLINE float normalize_row(const NormalizeRows& a, const X* x, Y* y) {
  Floats squares{};
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const Floats v = get(x + j, n);
    squares += v * v;
  });
  const float length = static_cast<float>(std::sqrt(sum(squares)));
  // written so that NaN stays NaN
  const float factor = static_cast<float>(1.0 / (length < a.eps ? a.eps : length));
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    put(y + j, get(x + j, n) * factor, n);
  });
  return length;
}

void normalize_rows(const NormalizeRows& a, int64_t first, int64_t count) {
  with_elements(a.x, [&](const auto* x) __attribute__((always_inline)) {
    with_elements(a.y, [&](auto* y) __attribute__((always_inline)) {
      for (int64_t i = first; i < first + count; ++i) {
        a.norm[i] = normalize_row(a, x + i * a.cols, y + i * a.cols);
      }
    });
  });
}

template <class G, class Y, class X>
LLM2CLIP_INLINE void normalize_grad_row(const NormalizeGradRows& a, const G* g, const Y* saved, float length, X* dx) {
  const bool small = length < a.eps;
  const float inverse = static_cast<float>(1.0 / (small ? a.eps : length));
  const float unit = a.saved_is_unit ? 1.0f : inverse;
  float along = 0;
  if (!small) {
    Floats total{};
    for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      total += get(g + j, n) * (get(saved + j, n) * unit);
    });
    along = static_cast<float>(sum(total));
  }
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const Floats v = get(g + j, n);
    put(dx + j, (small ? v : v - get(saved + j, n) * unit * along) * inverse, n);
  });
}

void normalize_grad_rows(const NormalizeGradRows& a, int64_t first, int64_t count) {
  with_elements(a.g, [&](const auto* g) __attribute__((always_inline)) {
    with_elements(a.saved, [&](const auto* saved) __attribute__((always_inline)) {
      with_elements(a.dx, [&](auto* dx) __attribute__((always_inline)) {
        for (int64_t i = first; i < first + count; ++i) {
          const int64_t at = i * a.cols;
          normalize_grad_row(a, g + at, saved + at, a.norm[i], dx + at);
        }
      });
    });
  });
}

}  // namespace

const NormalizeKernels NormalizeKernels::LLM2CLIP_INSTRUCTION_SET{normalize_rows, normalize_grad_rows};

}  // namespace llm2clip
