// The mask of dropout as an integer hash of seed, row and column.
//
// The same hash stands in dropout.py (torch) and triton_dropout.py (Triton) of llm2clip_kernels; all three must give
// the same bits, because forward and backward may run on different implementations.

#pragma once

#include "../dropout.h"
#include "lanes.h"

namespace llm2clip {
namespace {

constexpr uint32_t kGolden = 0x9e3779b9u;

// a 32-bit finaliser, on a word or on sixteen: two multiplications, every input bit reaches every output bit
template <class T>
LLM2CLIP_INLINE T mix(T h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

LLM2CLIP_INLINE uint32_t row_key(const Dropout& dropout, int64_t row) {
  const uint64_t bits = static_cast<uint64_t>(row);
  uint32_t key = mix(static_cast<uint32_t>(bits >> 32) + kGolden);
  key = mix(static_cast<uint32_t>(bits) ^ key);
  key = mix(static_cast<uint32_t>(dropout.seed >> 32) ^ key);
  return mix(static_cast<uint32_t>(dropout.seed) ^ key);
}

// whether column `col` is kept, or sixteen columns are: -1 in their lanes, 0 in the others
template <class T>
LLM2CLIP_INLINE auto keeps(const Dropout& dropout, uint32_t key, T col) {
  return (mix(col * kGolden ^ key) >> 8) >= dropout.threshold;
}

// value / (1 - p) where kept, else 0; lane l is column `col` + l
LLM2CLIP_INLINE Floats dropped(const Dropout& dropout, Floats value, uint32_t key, int64_t col) {
  const Words cols = bits_as<Words>(lane_numbers()) + static_cast<uint32_t>(col);
  return select(keeps(dropout, key, cols), value * dropout.scale, Floats{});
}

}  // namespace
}  // namespace llm2clip
