// The normal distribution function and its density from one exponential: what GELU and its derivative need.

#pragma once

#include "exp.h"

namespace llm2clip {
namespace {

// exp(v) for v <= 0 within 2 ulp; not below 1e-38. Anything for NaN, which callers multiply by NaN again.
LLM2CLIP_INLINE Floats exp_negative(Floats v) {
  return exp_in_range(larger(v, broadcast(kExpLowest)));
}

LLM2CLIP_INLINE Floats magnitude(Floats v) {
  return bits_as<Floats>(bits_as<Ints>(v) & 0x7fffffff);
}

struct Normal {
  Floats below;    // Φ(v), relative error 3e-7 also in the lower tail, where 1 + erf would cancel
  Floats density;  // φ(v)
};

LLM2CLIP_INLINE Normal normal(Floats v) {
  constexpr float kInverseRoot2Pi = 0.39894228040143267794f;
  const Floats size = magnitude(v);
  const Floats e = exp_negative(v * v * -0.5f);
  // 1 - Φ(s) = exp(-s²/2)·t·p(t), t = 1/(1 + 0.4 s): a weighted fit on [0, 13.5], beyond which the exponential
  // is as good as zero. Fitted to ½ erfcx(s/√2) in double precision; its own error is 1.5e-8.
  const Floats t = 1.0f / (size * 0.4f + 1.0f);
  Floats p = broadcast(0.03196587199511463f);
  p = p * t - 0.1754640707278019f;
  p = p * t + 0.37913026420391216f;
  p = p * t - 0.3697961829739433f;
  p = p * t + 0.11596925229218419f;
  p = p * t - 0.02496048541863568f;
  p = p * t + 0.09069248293973063f;
  p = p * t + 0.13327434405836222f;
  p = p * t + 0.15961187726826076f;
  p = p * t + 0.15957665374171015f;
  const Floats above = e * t * p;
  return {select(v < 0.0f, above, 1.0f - above), e * kInverseRoot2Pi};
}

}  // namespace
}  // namespace llm2clip
