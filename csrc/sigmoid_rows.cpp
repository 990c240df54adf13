#include "sigmoid_rows.h"

#include "instruction_set.h"
#include "simd_log1p.h"

namespace llm2clip {
namespace {

// a logit without loss and gradient, for the lanes past the end of a row
constexpr float kNothing = -1e30f;

LLM2CLIP_INLINE Ints load_ids(const int32_t* from, int64_t count) {
  Ints out;
  if (count == kLanes) {
    std::memcpy(&out, from, sizeof(out));
  } else {
    int32_t lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = l < count ? from[l] : kNoCol;
    std::memcpy(&out, lanes, sizeof(out));
  }
  return out;
}

template <bool kGradient>
LLM2CLIP_INLINE void vector_body(const SigmoidRows& a, const float* in, float* out, int64_t i, int64_t j,
                                 int64_t count, Floats& loss, Floats& sum_dot, Floats& sum) {
  const bool whole = count == kLanes;
  const Floats dot = whole ? load(in + j) : load_some(in + j, count, 0.0f);
  Floats t = dot * a.scale + a.bias;
  if (!whole) {
    float lanes[kLanes];
    store(lanes, t);
    for (int64_t l = count; l < kLanes; ++l) lanes[l] = kNothing;
    t = load(lanes);
  }
  const Ints positive = load_ids(a.col_id + j, count) == a.row_id[i];
  // every pair is a negative of logit z: softplus(z), derivative sigmoid(z); z = -t for a positive one, so that
  // neither is the difference of two larger numbers
  const Floats z = positive ? -t : t;
  const Floats e = exp(z < 0.0f ? z : -z);
  loss += (z < 0.0f ? Floats{} : z) + log1p_of_unit(e);
  if constexpr (kGradient) {
    const Floats reciprocal = 1.0f / (1.0f + e);
    Floats g = z < 0.0f ? e * reciprocal : reciprocal;
    g = positive ? -g : g;
    if (a.weight != nullptr) g *= a.weight[i];
    sum += g;
    sum_dot += g * dot;
    if (out == nullptr) return;
    if (whole) {
      store(out + j, g);
    } else {
      store_some(out + j, g, count);
    }
  }
}

template <bool kGradient>
LLM2CLIP_INLINE void rows_body(const SigmoidRows& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.cols;
    float* out = a.out == nullptr ? nullptr : a.out + i * a.cols;
    Floats loss{};
    Floats sum_dot{};
    Floats sum_g{};
    int64_t j = 0;
    for (; j + kLanes <= a.cols; j += kLanes) {
      vector_body<kGradient>(a, in, out, i, j, kLanes, loss, sum_dot, sum_g);
    }
    if (j < a.cols) vector_body<kGradient>(a, in, out, i, j, a.cols - j, loss, sum_dot, sum_g);
    a.loss[i] += sum(loss);
    if (a.scale_gradient != nullptr) *a.scale_gradient += sum(sum_dot);
    if (a.bias_gradient != nullptr) *a.bias_gradient += sum(sum_g);
  }
}

LLM2CLIP_INLINE void any_rows(const SigmoidRows& a) {
  if (a.out == nullptr && a.scale_gradient == nullptr && a.bias_gradient == nullptr) {
    rows_body<false>(a);
  } else {
    rows_body<true>(a);
  }
}

#define LLM2CLIP_SIGMOID_VARIANT(suffix, target) \
  target void rows_##suffix(const SigmoidRows& a) { any_rows(a); }

LLM2CLIP_FOR_EACH_INSTRUCTION_SET(LLM2CLIP_SIGMOID_VARIANT)

}  // namespace

SigmoidKernel sigmoid_kernel() {
  static const SigmoidKernel chosen = LLM2CLIP_FOR_THIS_PROCESSOR(rows);
  return chosen;
}

}  // namespace llm2clip
