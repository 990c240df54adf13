// exp of sixteen floats at a time.

#pragma once

#include "../finite_shift.h"
#include "lanes.h"

namespace llm2clip {
namespace {

// where exp's result is a normal number
constexpr float kExpLowest = -87.33654f;
constexpr float kExpHighest = 88.72283f;

// exp within 2 ulp on [kExpLowest, kExpHighest], anything elsewhere.
//
// exp(v) = 2^n exp(r), |r| <= ln2/2; the Taylor series to r^7 leaves 6e-9, a tenth of an ulp.
LLM2CLIP_INLINE Floats exp_in_range(Floats v) {
  constexpr float kLog2e = 1.44269504088896340736f;
  // n·ln2 in two parts: the high one has few enough bits for n times it to be exact
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440054690583e-4f;
  // adding 1.5·2^23 rounds to an integer and leaves that integer in the low mantissa bits
  constexpr float kRound = 12582912.0f;
  const Floats shifted = v * kLog2e + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (v - n * kLn2High) - n * kLn2Low;
  Floats p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_as<Floats>(bits_as<Ints>(p) + (bits_as<Ints>(shifted) << 23));
}

// exp within 2 ulp on [-87.3, 88.7]; 0 below, inf above, NaN for NaN
LLM2CLIP_INLINE Floats exp(Floats v) {
  const Floats lowest = broadcast(kExpLowest);
  const Floats highest = broadcast(kExpHighest);
  const Floats z = select(v < lowest, lowest, v);
  Floats out = exp_in_range(select(z > highest, highest, z));
  out = select(v < lowest, Floats{}, out);
  out = select(v > highest, broadcast(__builtin_inff()), out);
  return select(v != v, v, out);
}

using llm2clip::finite_shift;

LLM2CLIP_INLINE Floats finite_shift(Floats largest) {
  return select(largest - largest == 0.0f, largest, Floats{});
}

}  // namespace
}  // namespace llm2clip
