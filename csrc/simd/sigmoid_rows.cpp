#include "../sigmoid_rows.h"

#include "elements.h"
#include "exp.h"
#include "log1p.h"

namespace llm2clip {
namespace {

// a logit without loss and gradient, for the lanes past the end of a row
constexpr float kNothing = -1e30f;

LLM2CLIP_INLINE Ints get_ids(const int32_t* from, int64_t count) {
  if (count == kLanes) return load_lanes<Ints>(from);
  int32_t lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = l < count ? from[l] : kNoCol;
  return load_lanes<Ints>(lanes);
}

template <bool kGradient>
LLM2CLIP_INLINE void rows_body(const SigmoidRows& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* in = a.in + i * a.cols;
    float* out = a.out == nullptr ? nullptr : a.out + i * a.cols;
    Floats loss{};
    Floats sum_dot{};
    Floats sum_g{};
    for_each_lane_group(a.cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const Floats dot = get(in + j, count);
      const Floats t = fill_past(dot * a.scale + a.bias, count, kNothing);
      const Ints positive = get_ids(a.col_id + j, count) == a.row_id[i];
      // every pair is a negative of logit z: softplus(z), derivative sigmoid(z); z = -t for a positive one, so that
      // neither is the difference of two larger numbers
      const Floats z = select(positive, -t, t);
      const Ints below = z < 0.0f;
      const Floats e = exp(select(below, z, -z));
      loss += select(below, Floats{}, z) + log1p_of_unit(e);
      if constexpr (kGradient) {
        const Floats reciprocal = 1.0f / (1.0f + e);
        Floats g = select(below, e * reciprocal, reciprocal);
        g = select(positive, -g, g);
        if (a.weight != nullptr) g *= a.weight[i];
        sum_g += g;
        sum_dot += g * dot;
        if (out != nullptr) put(out + j, g, count);
      }
    });
    a.loss[i] += sum(loss);
    if (a.scale_gradient != nullptr) *a.scale_gradient += sum(sum_dot);
    if (a.bias_gradient != nullptr) *a.bias_gradient += sum(sum_g);
  }
}

void any_rows(const SigmoidRows& a) {
  if (a.out == nullptr && a.scale_gradient == nullptr && a.bias_gradient == nullptr) {
    rows_body<false>(a);
  } else {
    rows_body<true>(a);
  }
}

}  // namespace

const SigmoidKernels SigmoidKernels::LLM2CLIP_INSTRUCTION_SET{any_rows};

}  // namespace llm2clip
