#include "../adapter_rows.h"

#include <cmath>
#include <type_traits>

#include "dropout.h"
#include "elements.h"
#include "gelu.h"

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
    const Floats v = fill_past(get(row + j, n) - mean, n, 0.0f);
    squares += v * v;
  });
  return {mean, static_cast<float>(1.0 / std::sqrt(sum(squares) / cols + eps))};
}

// column j of a row of weights that may be missing
LLM2CLIP_INLINE Floats weighted(Floats value, const float* weight, int64_t j, int64_t n) {
  return weight == nullptr ? value : value * get(weight + j, n);
}

LLM2CLIP_INLINE Floats shifted(Floats value, const float* bias, int64_t j, int64_t n) {
  return bias == nullptr ? value : value + get(bias + j, n);
}

LLM2CLIP_INLINE void add_where_wanted(float* sums, int64_t j, Floats value, int64_t n) {
  if (sums != nullptr) add_to(sums + j, value, n);
}

void layer_norm_rows(const LayerNormRows& a, int64_t first, int64_t count) {
  with_elements(a.x, [&](const auto* from) __attribute__((always_inline)) {
    with_elements(a.out, [&](auto* to) __attribute__((always_inline)) {
      for (int64_t i = first; i < first + count; ++i) {
        const auto* row = from + i * a.cols;
        const Stats s = stats(row, a.cols, a.eps);
        for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          const Floats unit = (get(row + j, n) - s.mean) * s.rstd;
          put(to + i * a.cols + j, shifted(weighted(unit, a.weight, j, n), a.bias, j, n), n);
        });
      }
    });
  });
}

template <class X, class H>
LLM2CLIP_INLINE void layer_norm_grad_row(const LayerNormGradRows& a, const X* row, const X* dy, H* dh, X* dx) {
  const Stats s = stats(row, a.cols, a.eps);
  Floats sum_g{};
  Floats sum_gx{};
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const Floats unit = (get(row + j, n) - s.mean) * s.rstd;
    const Floats g = get(dh + j, n);
    const Floats scaled = weighted(g, a.weight, j, n);
    sum_g += scaled;
    sum_gx += scaled * unit;
    add_where_wanted(a.weight_sum, j, g * unit, n);
    add_where_wanted(a.bias_sum, j, g, n);
  });
  const float mean_g = static_cast<float>(sum(sum_g) / a.cols);
  const float mean_gx = static_cast<float>(sum(sum_gx) / a.cols);
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const Floats unit = (get(row + j, n) - s.mean) * s.rstd;
    if (dx != nullptr) {
      Floats v = (weighted(get(dh + j, n), a.weight, j, n) - mean_g - unit * mean_gx) * s.rstd;
      if (dy != nullptr) v += get(dy + j, n);
      put(dx + j, v, n);
    }
    if (a.dy_sum != nullptr) add_to(a.dy_sum + j, get(dy + j, n), n);
    if (a.keep_output) put(dh + j, shifted(weighted(unit, a.weight, j, n), a.bias, j, n), n);
  });
}

void layer_norm_grad_rows(const LayerNormGradRows& a, int64_t first, int64_t count) {
  with_elements(a.x, [&](const auto* x) __attribute__((always_inline)) {
    with_elements(a.dh, [&](auto* dh) __attribute__((always_inline)) {
      using X = std::decay_t<decltype(*x)>;
      const X* const dy = static_cast<const X*>(a.dy);
      X* const dx = static_cast<X*>(a.dx);
      for (int64_t at = first * a.cols; at < (first + count) * a.cols; at += a.cols) {
        layer_norm_grad_row(a, x + at, dy == nullptr ? dy : dy + at, dh + at, dx == nullptr ? dx : dx + at);
      }
    });
  });
}

void gelu_rows(const GeluRows& a, int64_t first, int64_t count) {
  with_elements(a.pre, [&](auto* from) __attribute__((always_inline)) {
    auto* const to = static_cast<decltype(from)>(a.out);
    for (int64_t i = first; i < first + count; ++i) {
      const uint32_t key = row_key(a.dropout, i);
      for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Floats v = shifted(get(from + i * a.cols + j, n), a.bias, j, n);
        Floats value = v * normal(v).below;
        if (a.dropout.threshold > 0) value = dropped(a.dropout, value, key, j);
        put(to + i * a.cols + j, value, n);
      });
    }
  });
}

void gelu_grad_rows(const GeluGradRows& a, int64_t first, int64_t count) {
  const GeluRows& gelu = a.gelu;
  with_elements(gelu.pre, [&](auto* from) __attribute__((always_inline)) {
    auto* const gradient = static_cast<decltype(from)>(a.gradient);
    auto* const to = static_cast<decltype(from)>(gelu.out);
    for (int64_t i = first; i < first + count; ++i) {
      const uint32_t key = row_key(gelu.dropout, i);
      auto* const g_row = gradient + i * gelu.cols;
      for_each_lane_group(gelu.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Floats v = shifted(get(from + i * gelu.cols + j, n), gelu.bias, j, n);
        const Normal at_v = normal(v);
        const Floats slope = at_v.below + v * at_v.density;
        Floats g = get(g_row + j, n);
        Floats value = v * at_v.below;
        if (gelu.dropout.threshold > 0) {
          g = dropped(gelu.dropout, g, key, j);
          value = dropped(gelu.dropout, value, key, j);
        }
        g *= slope;
        put(g_row + j, g, n);
        add_where_wanted(a.bias_sum, j, g, n);
        if (to != nullptr) put(to + i * gelu.cols + j, value, n);
      });
    }
  });
}

}  // namespace

const AdapterKernels AdapterKernels::LLM2CLIP_INSTRUCTION_SET{layer_norm_rows, layer_norm_grad_rows, gelu_rows,
                                                              gelu_grad_rows};

}  // namespace llm2clip
