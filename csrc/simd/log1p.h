// log(1 + e) for e in [0, 1], sixteen floats at a time.

#pragma once

#include "lanes.h"

namespace llm2clip {
namespace {

// within 2 ulp on [0, 1], also where 1 + e would round e away; NaN for NaN
//
// e times the polynomial of degree 8 with the least largest relative error (3.0e-8) against log1p(e)/e, found by
// Remez exchange.
LLM2CLIP_INLINE Floats log1p_of_unit(Floats e) {
  Floats p = broadcast(0.005232689902186394f);
  p = p * e - 0.02950521931052208f;
  p = p * e + 0.07822591811418533f;
  p = p * e - 0.13663242757320404f;
  p = p * e + 0.19106005132198334f;
  p = p * e - 0.2484298199415207f;
  p = p * e + 0.3331909775733948f;
  p = p * e - 0.4999949336051941f;
  p = p * e + 0.9999999403953552f;
  return p * e;
}

}  // namespace
}  // namespace llm2clip
