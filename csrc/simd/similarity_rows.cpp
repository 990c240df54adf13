#include "../similarity_rows.h"

#include <cmath>

#include "elements.h"
#include "exp.h"

namespace llm2clip {
namespace {

// a logit that exp takes to zero, for the lanes past the end of a row
constexpr float kNothing = -1e30f;

// calls body(column, logits, count) over a row, sixteen columns at a time
//
// Every pass must round a logit the same way, or the exponentials of large ones disagree by a rounding error of the
// logit itself.
template <class Body>
LLM2CLIP_INLINE void for_each_vector(const float* row, int64_t cols, float scale, const Body& body) {
  for_each_lane_group(cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    body(j, fill_past(rounded(get(row + j, count) * scale), count, kNothing), count);
  });
}

// which of the sixteen pairs (row i, columns j...) are left out
LLM2CLIP_INLINE Ints left_out(const RowGroups& groups, int64_t i, int64_t j) {
  // far from the positive the difference only has to stay different from every lane
  const int64_t own = groups.positive + i - j;
  const int32_t lane = own >= 0 && own < kLanes ? static_cast<int32_t>(own) : -1;
  return (load_lanes<Ints>(groups.col + j) == groups.row[i]) & (lane_numbers() != lane);
}

template <bool grouped>
LLM2CLIP_INLINE Floats keep(const RowGroups& groups, int64_t i, int64_t j, Floats value, Floats otherwise) {
  if constexpr (grouped) return select(left_out(groups, i, j), otherwise, value);
  return value;
}

template <bool grouped>
LLM2CLIP_INLINE void sum_body(const SumRows& a) {
  if (a.col_sum != nullptr) std::memset(a.col_sum, 0, a.cols * sizeof(float));
  for (int64_t i = 0; i < a.rows; ++i) {
    Floats total{};
    float* cache = a.cache == nullptr ? nullptr : a.cache + i * a.cache_stride;
    for_each_vector(
        a.tile + i * a.cols, a.cols, a.scale,
        [&](int64_t j, Floats logits, int64_t count) __attribute__((always_inline)) {
          const Floats e = keep<grouped>(a.groups, i, j, exp(logits - a.shift), Floats{});
          total += e;
          if (a.col_sum != nullptr) add_to(a.col_sum + j, e, count);
          if (cache != nullptr) {
            __builtin_prefetch(cache + 2 * a.cache_stride + j, 1);
            put(cache + j, e, count);
          }
        });
    a.row_sum[i] += sum(total);
  }
}

LLM2CLIP_INLINE bool is_left_out(const RowGroups& groups, int64_t i, int64_t j) {
  return groups.col[j] == groups.row[i] && j != groups.positive + i;
}

template <bool grouped>
LLM2CLIP_INLINE void online_body(const OnlineRows& a) {
  constexpr float kLowest = -__builtin_inff();
  if (a.col_max != nullptr) {
    for (int64_t j = 0; j < a.cols; ++j) a.col_max[j] = kLowest;
    std::memset(a.col_sum, 0, a.cols * sizeof(float));
  }
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* row = a.tile + i * a.cols;
    float largest = a.row_max[i];
    for (int64_t j = 0; j < a.cols; ++j) {
      if constexpr (grouped) {
        if (is_left_out(a.groups, i, j)) continue;
      }
      const float logit = row[j] * a.scale;
      if (logit > largest) largest = logit;
      if (a.col_max != nullptr && logit > a.col_max[j]) a.col_max[j] = logit;
    }
    const float shift = finite_shift(largest);
    Floats total{};
    for_each_vector(
        row, a.cols, a.scale,
        [&](int64_t j, Floats logits, int64_t) __attribute__((always_inline)) {
          total += keep<grouped>(a.groups, i, j, exp(logits - shift), Floats{});
        });
    const double kept = a.row_sum[i] == 0.0
        ? 0.0
        : a.row_sum[i] * std::exp(static_cast<double>(finite_shift(a.row_max[i])) - shift);
    a.row_sum[i] = kept + sum(total);
    a.row_max[i] = largest;
  }
  if (a.col_max == nullptr) return;
  for (int64_t i = 0; i < a.rows; ++i) {
    for_each_vector(
        a.tile + i * a.cols, a.cols, a.scale,
        [&](int64_t j, Floats logits, int64_t count) __attribute__((always_inline)) {
          const Floats top = finite_shift(get(a.col_max + j, count));
          const Floats e = keep<grouped>(a.groups, i, j, exp(logits - top), Floats{});
          add_to(a.col_sum + j, e, count);
        });
  }
}

template <GradMode mode, bool grouped>
LLM2CLIP_INLINE void grad_body(const GradRows& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.in_stride;
    float* out = a.out + i * a.cols;
    const int64_t positive = a.positive + i;
    const bool has_positive = a.g_pos != nullptr && positive >= 0 && positive < a.cols;
    // read before `out`, which may be the same memory, is written
    const float positive_dot = has_positive ? in[positive] : 0.0f;
    const float row_factor = a.row_factor[i];
    float row_lse = a.row_lse[i];
    if constexpr (grouped) {
      // nothing is left of such a row: exp must be zero, in the lanes past its end too
      if (row_lse == -__builtin_inff()) row_lse = __builtin_inff();
    }
    Floats weighted{};
    // cached rows hold exponentials already: no scale
    const float scale = mode == GradMode::kCached ? 1.0f : a.scale;
    for_each_vector(in, a.cols, scale, [&](int64_t j, Floats v, int64_t count) __attribute__((always_inline)) {
      Floats g;
      if constexpr (mode == GradMode::kOnline) {
        g = exp(v - row_lse) * row_factor;
        if (a.col_factor != nullptr) {
          g += exp(v - get(a.col_lse + j, count)) * get(a.col_factor + j, count);
        }
      } else {
        // rows of the cache lie far apart, and come from memory
        if constexpr (mode == GradMode::kCached) __builtin_prefetch(in + 2 * a.in_stride + j);
        const Floats e = mode == GradMode::kCached ? v : exp(v - a.shift);
        Floats factor = broadcast(row_factor);
        if (a.col_factor != nullptr) factor += get(a.col_factor + j, count);
        g = e * factor;
      }
      g = keep<grouped>(a.groups, i, j, g, Floats{});
      if (mode != GradMode::kCached && a.scale_gradient != nullptr) {
        // the dot again rather than logit/scale, which is undefined at scale 0
        weighted += get(in + j, count) * g;
      }
      put(out + j, g, count);
    });
    double gradient = sum(weighted);
    if (has_positive) {
      out[positive] += a.g_pos[i];
      gradient += static_cast<double>(a.g_pos[i]) * positive_dot;
    }
    if (mode != GradMode::kCached && a.scale_gradient != nullptr) *a.scale_gradient += gradient;
  }
}

template <bool grouped>
LLM2CLIP_INLINE void grad_any(const GradRows& a, GradMode mode) {
  switch (mode) {
    case GradMode::kStatic:
      return grad_body<GradMode::kStatic, grouped>(a);
    case GradMode::kCached:
      // what was left out is zero in the cache already
      return grad_body<GradMode::kCached, false>(a);
    case GradMode::kOnline:
      return grad_body<GradMode::kOnline, grouped>(a);
  }
}

void sum_rows(const SumRows& a) {
  a.groups.row == nullptr ? sum_body<false>(a) : sum_body<true>(a);
}

void online_rows(const OnlineRows& a) {
  a.groups.row == nullptr ? online_body<false>(a) : online_body<true>(a);
}

void grad_rows(const GradRows& a, GradMode mode) {
  a.groups.row == nullptr ? grad_any<false>(a, mode) : grad_any<true>(a, mode);
}

}  // namespace

const RowKernels RowKernels::LLM2CLIP_INSTRUCTION_SET{sum_rows, online_rows, grad_rows};

}  // namespace llm2clip
