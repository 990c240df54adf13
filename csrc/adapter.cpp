// The row operations of the adapter on the CPU, between torch's GEMMs: LayerNorm, bias + GELU + dropout, and their
// gradients. Each is one sweep; sums over rows are added by blocks of a fixed size, in order.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "dropout.h"
#include "simd_gelu.h"
#include "simd_io.h"
#include "tiles.h"

namespace llm2clip {
namespace {

struct Stats {
  float mean;
  float rstd;
};

template <class T>
LLM2CLIP_INLINE Stats stats(const T* row, int64_t cols, double eps) {
  Floats total{};
  for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) { total += get(row + j, n); });
  const float mean = static_cast<float>(sum(total) / cols);
  Floats squares{};
  for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Floats v = get(row + j, n) - mean;
    if (n < kLanes) {
      // lanes past the end hold -mean
      for (int64_t l = n; l < kLanes; ++l) v[l] = 0.0f;
    }
    squares += v * v;
  });
  return {mean, static_cast<float>(1.0 / std::sqrt(sum(squares) / cols + eps))};
}

const float* values_or_null(const Tensor& t) {
  return t.numel() > 0 ? data(t) : nullptr;
}

// sums over rows: partial (blocks, cols), one row a block, added in order
struct ColumnSums {
  int64_t cols;
  std::vector<float> partial;

  ColumnSums(bool wanted, int64_t rows, int64_t cols)
      : cols(cols), partial(wanted ? (rows + kBlock - 1) / kBlock * cols : 0, 0.0f) {}

  float* block(int64_t b) { return partial.empty() ? nullptr : partial.data() + b * cols; }

  Tensor total(const Tensor& like) const {
    const int64_t count = partial.empty() ? 0 : cols;
    Tensor out = flat_floats(like, count);
    std::vector<double> sums(count, 0.0);
    for (size_t i = 0; i < partial.size(); ++i) sums[i % cols] += partial[i];
    for (int64_t j = 0; j < count; ++j) data(out)[j] = static_cast<float>(sums[j]);
    return out;
  }
};

LLM2CLIP_INLINE void add(float* to, Floats value, int64_t n) {
  if (to != nullptr) put(to, get(to, n) + value, n);
}

LLM2CLIP_INLINE float* at(float* row, int64_t j) {
  return row == nullptr ? nullptr : row + j;
}

// (rows, cols) -> the same, float32 or bfloat16; weight and bias (cols,) or empty
Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool to_bfloat16) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  const float* w = values_or_null(weight);
  const float* b = values_or_null(bias);
  Tensor out = torch::stable::new_empty(x, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  with_elements(x, [&](const auto* from) {
    with_elements(out, [&](auto* to) {
      for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
        run_simd([&]() __attribute__((always_inline)) {
          for (int64_t i = first; i < first + count; ++i) {
            const auto* row = from + i * cols;
            const Stats s = stats(row, cols, eps);
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              Floats v = (get(row + j, n) - s.mean) * s.rstd;
              if (w != nullptr) v *= get(w + j, n);
              if (b != nullptr) v += get(b + j, n);
              put(to + i * cols + j, v, n);
            });
          }
        });
      });
    });
  });
  return out;
}

// dx = LayerNorm's gradient + dy, with the column sums of the three gradients in the same sweep. `dh` is replaced by
// LayerNorm's output where keep_output, which the gradient of the next weight needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& x, const Tensor& weight,
                                                               const Tensor& bias, double eps, Tensor dh,
                                                               const Tensor& dy, bool keep_output, bool need_x,
                                                               bool need_weight, bool need_bias, bool need_dy_sum) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  const float* w = values_or_null(weight);
  const float* b = values_or_null(bias);
  const bool residual = dy.numel() > 0;
  Tensor dx = torch::stable::new_empty(x, {need_x ? rows : 0, cols}, x.scalar_type());
  ColumnSums d_weight(need_weight, rows, cols);
  ColumnSums d_bias(need_bias, rows, cols);
  ColumnSums dy_sum(need_dy_sum && residual, rows, cols);
  with_elements(x, [&](const auto* from) {
    using X = std::decay_t<decltype(*from)>;
    const X* residuals = residual ? static_cast<const X*>(dy.data_ptr()) : nullptr;
    X* to = need_x ? static_cast<X*>(dx.data_ptr()) : nullptr;
    with_elements(dh, [&](auto* gradient) {
      for_each_block(rows, [&](int64_t block, int64_t first, int64_t count) {
        float* p_weight = d_weight.block(block);
        float* p_bias = d_bias.block(block);
        float* p_sum = dy_sum.block(block);
        run_simd([&]() __attribute__((always_inline)) {
          for (int64_t i = first; i < first + count; ++i) {
            const X* row = from + i * cols;
            auto* g_row = gradient + i * cols;
            const Stats s = stats(row, cols, eps);
            Floats sum_g{};
            Floats sum_gx{};
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              const Floats unit = (get(row + j, n) - s.mean) * s.rstd;
              const Floats g = get(g_row + j, n);
              const Floats scaled = w == nullptr ? g : g * get(w + j, n);
              sum_g += scaled;
              sum_gx += scaled * unit;
              add(at(p_weight, j), g * unit, n);
              add(at(p_bias, j), g, n);
            });
            const float mean_g = static_cast<float>(sum(sum_g) / cols);
            const float mean_gx = static_cast<float>(sum(sum_gx) / cols);
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              const Floats unit = (get(row + j, n) - s.mean) * s.rstd;
              if (need_x) {
                Floats g = get(g_row + j, n);
                if (w != nullptr) g *= get(w + j, n);
                Floats v = (g - mean_g - unit * mean_gx) * s.rstd;
                if (residual) v += get(residuals + i * cols + j, n);
                put(to + i * cols + j, v, n);
              }
              if (p_sum != nullptr) add(p_sum + j, get(residuals + i * cols + j, n), n);
              if (keep_output) {
                Floats h = unit;
                if (w != nullptr) h *= get(w + j, n);
                if (b != nullptr) h += get(b + j, n);
                put(g_row + j, h, n);
              }
            });
          }
        });
      });
    });
  });
  return {dx, d_weight.total(x), d_bias.total(x), dy_sum.total(x)};
}

// seed: one int64, or none where p is zero
Dropout dropout_of(const Tensor& seed, double p) {
  return Dropout(seed.numel() > 0 ? *static_cast<const int64_t*>(seed.data_ptr()) : 0, p);
}

// out = dropout(gelu(pre + bias)); out may be pre
void bias_gelu(const Tensor& pre, const Tensor& bias, const Tensor& seed, double p, Tensor out) {
  const int64_t rows = pre.size(0);
  const int64_t cols = pre.size(1);
  const float* b = values_or_null(bias);
  const Dropout dropout = dropout_of(seed, p);
  with_elements(pre, [&](const auto* from) {
    using T = std::decay_t<decltype(*from)>;
    T* to = static_cast<T*>(out.data_ptr());
    for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
      run_simd([&]() __attribute__((always_inline)) {
        for (int64_t i = first; i < first + count; ++i) {
          const uint32_t key = dropout.row_key(i);
          for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            Floats v = get(from + i * cols + j, n);
            if (b != nullptr) v += get(b + j, n);
            Floats g = v * normal(v).below;
            if (dropout.active()) g = dropout.apply(g, key, j);
            put(to + i * cols + j, g, n);
          });
        }
      });
    });
  });
}

// `gradient` (of the dropped-out GELU) becomes that of pre + bias; returns the GELU's output again where keep_output,
// and the column sums of the gradient
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& pre, const Tensor& bias, const Tensor& seed, double p,
                                              Tensor gradient, bool keep_output, bool need_bias) {
  const int64_t rows = pre.size(0);
  const int64_t cols = pre.size(1);
  const float* b = values_or_null(bias);
  const Dropout dropout = dropout_of(seed, p);
  Tensor out = torch::stable::new_empty(pre, {keep_output ? rows : 0, cols}, pre.scalar_type());
  ColumnSums d_bias(need_bias, rows, cols);
  with_elements(pre, [&](const auto* from) {
    using T = std::decay_t<decltype(*from)>;
    T* g_all = static_cast<T*>(gradient.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    for_each_block(rows, [&](int64_t block, int64_t first, int64_t count) {
      float* p_bias = d_bias.block(block);
      run_simd([&]() __attribute__((always_inline)) {
        for (int64_t i = first; i < first + count; ++i) {
          const uint32_t key = dropout.row_key(i);
          T* g_row = g_all + i * cols;
          for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            Floats v = get(from + i * cols + j, n);
            if (b != nullptr) v += get(b + j, n);
            const Normal at_v = normal(v);
            const Floats slope = at_v.below + v * at_v.density;
            Floats g = get(g_row + j, n);
            Floats value = v * at_v.below;
            if (dropout.active()) {
              g = dropout.apply(g, key, j);
              value = dropout.apply(value, key, j);
            }
            g *= slope;
            put(g_row + j, g, n);
            add(at(p_bias, j), g, n);
            if (keep_output) put(to + i * cols + j, value, n);
          });
        }
      });
    });
  });
  return {out, d_bias.total(pre)};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&llm2clip::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&llm2clip::layer_norm_backward));
  m.impl("bias_gelu", TORCH_BOX(&llm2clip::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&llm2clip::bias_gelu_backward));
}
