// What a running maximum is replaced by before it is subtracted.

#pragma once

#include "always_inline.h"

namespace llm2clip {

// zero for an infinite one: exp's argument must be finite to be subtracted
LLM2CLIP_INLINE float finite_shift(float largest) {
  return largest - largest == 0.0f ? largest : 0.0f;
}

}  // namespace llm2clip
