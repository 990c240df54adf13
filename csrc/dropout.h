// Which elements dropout keeps, from a seed and their position alone: the backward pass needs no stored mask, and
// every backend draws the same one.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "simd_io.h"

namespace llm2clip {

// the 32-bit finaliser of MurmurHash3, on a word or on sixteen
template <class T>
LLM2CLIP_INLINE T mix(T h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  h ^= h >> 16;
  return h;
}

class Dropout {
 public:
  // seed: one int64; p in [0, 1]
  Dropout(const torch::stable::Tensor& seed, double p)
      : threshold_(static_cast<uint32_t>(p * 16777216.0 + 0.5)),
        scale_(p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f) {
    if (!active()) return;
    const uint64_t bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
    low_ = static_cast<uint32_t>(bits);
    high_ = static_cast<uint32_t>(bits >> 32);
  }

  LLM2CLIP_INLINE bool active() const { return threshold_ > 0; }

  LLM2CLIP_INLINE uint32_t row_key(int64_t row) const {
    return mix<uint32_t>(mix<uint32_t>(static_cast<uint32_t>(row) ^ low_) + high_);
  }

  // value / (1 - p) where kept, else 0; lane l is column `col` + l
  LLM2CLIP_INLINE Floats apply(Floats value, uint32_t key, int64_t col) const {
    constexpr Words kLane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Words h = mix<Words>((kLane + static_cast<uint32_t>(col)) * 0x9e3779b9u ^ key);
    return (h >> 8) >= threshold_ ? value * scale_ : Floats{};
  }

 private:
  uint32_t threshold_;  // of 2^24
  float scale_;
  uint32_t low_ = 0;
  uint32_t high_ = 0;
};

}  // namespace llm2clip
