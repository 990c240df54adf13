// Sixteen floats at a time in GCC/Clang vector extensions, and exp on them.
//
// The compiler lowers the vectors to whatever the enclosing function's target offers (one AVX-512
// register, two AVX2, four NEON or SSE), so one source serves every machine without -march=native.

#pragma once

#include <cstdint>
#include <cstring>

#define LLM2CLIP_INLINE inline __attribute__((always_inline))

namespace llm2clip {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

LLM2CLIP_INLINE Floats broadcast(float value) {
  return Floats{} + value;
}

LLM2CLIP_INLINE Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

LLM2CLIP_INLINE void store(float* to, Floats value) {
  std::memcpy(to, &value, sizeof(value));
}

// the first `count` floats; the other lanes hold `fill`
LLM2CLIP_INLINE Floats load_some(const float* from, int64_t count, float fill) {
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = l < count ? from[l] : fill;
  return load(lanes);
}

LLM2CLIP_INLINE void store_some(float* to, Floats value, int64_t count) {
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t l = 0; l < count; ++l) to[l] = lanes[l];
}

// a fixed tree, so the sum does not depend on the instruction set
LLM2CLIP_INLINE double sum(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  double total[4] = {0, 0, 0, 0};
  for (int64_t l = 0; l < kLanes; ++l) total[l % 4] += lanes[l];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

LLM2CLIP_INLINE Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

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
  Ints bits;
  Ints exponent;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  Floats out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// exp within 2 ulp on [-87.3, 88.7]; 0 below, inf above, NaN for NaN
LLM2CLIP_INLINE Floats exp(Floats v) {
  const Floats lowest = broadcast(kExpLowest);
  const Floats highest = broadcast(kExpHighest);
  const Floats z = v < lowest ? lowest : v;
  Floats out = exp_in_range(z > highest ? highest : z);
  out = v < lowest ? Floats{} : out;
  out = v > highest ? broadcast(__builtin_inff()) : out;
  return v != v ? v : out;
}

}  // namespace llm2clip
