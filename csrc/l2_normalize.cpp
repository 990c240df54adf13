// l2_normalize on the CPU: rows to unit length and the gradient, one pass each, with the cast to another dtype.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "simd_io.h"
#include "tiles.h"

namespace llm2clip {
namespace {

template <class T>
LLM2CLIP_INLINE double square_sum(const T* row, int64_t cols) {
  Floats total{};
  for_each_lane_group(cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const Floats v = get(row + j, count);
    total += v * v;
  });
  return sum(total);
}

// y (rows, cols) and the norms (rows,)
std::tuple<Tensor, Tensor> forward(const Tensor& x, double eps, bool to_bfloat16) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor norm = flat_floats(x, rows);
  with_elements(x, [&](const auto* from) {
    with_elements(y, [&](auto* to) {
      for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
        run_simd([&]() __attribute__((always_inline)) {
          for (int64_t i = first; i < first + count; ++i) {
            const auto* row = from + i * cols;
            const float length = static_cast<float>(std::sqrt(square_sum(row, cols)));
            data(norm)[i] = length;
            // written so that NaN stays NaN
            const float factor = static_cast<float>(1.0 / (length < eps ? eps : length));
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              put(to + i * cols + j, get(row + j, n) * factor, n);
            });
          }
        });
      });
    });
  });
  return {y, norm};
}

// dx = (g - ŷ<g, ŷ>) / norm; g / eps where the norm is below eps. `saved` is y itself or x.
Tensor backward(const Tensor& g, const Tensor& saved, const Tensor& norm, double eps, bool saved_is_unit,
                bool to_bfloat16) {
  const int64_t rows = g.size(0);
  const int64_t cols = g.size(1);
  Tensor dx = torch::stable::new_empty(g, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  with_elements(g, [&](const auto* gradient) {
    with_elements(saved, [&](const auto* kept) {
      with_elements(dx, [&](auto* to) {
        for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
          run_simd([&]() __attribute__((always_inline)) {
            for (int64_t i = first; i < first + count; ++i) {
              const float length = data(norm)[i];
              const bool small = length < eps;
              const float inverse = static_cast<float>(1.0 / (small ? eps : length));
              const float unit = saved_is_unit ? 1.0f : inverse;
              const auto* p = gradient + i * cols;
              const auto* q = kept + i * cols;
              float along = 0;
              if (!small) {
                Floats total{};
                for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                  total += get(p + j, n) * (get(q + j, n) * unit);
                });
                along = static_cast<float>(sum(total));
              }
              for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                const Floats v = get(p + j, n);
                put(to + i * cols + j, (small ? v : v - get(q + j, n) * unit * along) * inverse, n);
              });
            }
          });
        });
      });
    });
  });
  return dx;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("l2_normalize_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("l2_normalize_backward", TORCH_BOX(&llm2clip::backward));
}
