// Which elements dropout keeps, from a seed and their position alone: no mask is stored, any row can be made again
// alone, and every backend draws the same one.
//
// The same integer hash stands in dropout.py (torch) and triton_dropout.py (Triton) of llm2clip_kernels; all three
// must give the same bits, because forward and backward may run on different implementations.

#pragma once

#include <cmath>
#include <cstdint>

#include "simd_io.h"

namespace llm2clip {

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

class Dropout {
 public:
  // p in [0, 1], rounded to 2^-24
  Dropout(int64_t seed, double p)
      : threshold_(static_cast<uint32_t>(std::nearbyint(p * (1 << 24)))),
        scale_(p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f),
        seed_(static_cast<uint64_t>(seed)) {}

  LLM2CLIP_INLINE bool active() const { return threshold_ > 0; }

  LLM2CLIP_INLINE uint32_t row_key(int64_t row) const {
    const uint64_t bits = static_cast<uint64_t>(row);
    uint32_t key = mix(static_cast<uint32_t>(bits >> 32) + kGolden);
    key = mix(static_cast<uint32_t>(bits) ^ key);
    key = mix(static_cast<uint32_t>(seed_ >> 32) ^ key);
    return mix(static_cast<uint32_t>(seed_) ^ key);
  }

  LLM2CLIP_INLINE bool keeps(uint32_t key, uint32_t column) const {
    return (mix(column * kGolden ^ key) >> 8) >= threshold_;
  }

  // value / (1 - p) where kept, else 0; lane l is column `col` + l
  LLM2CLIP_INLINE Floats apply(Floats value, uint32_t key, int64_t col) const {
    constexpr Words kLane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Words hash = mix<Words>((kLane + static_cast<uint32_t>(col)) * kGolden ^ key);
    return (hash >> 8) >= threshold_ ? value * scale_ : Floats{};
  }

 private:
  static constexpr uint32_t kGolden = 0x9e3779b9u;

  uint32_t threshold_;  // of 2^24
  float scale_;
  uint64_t seed_;
};

}  // namespace llm2clip
