// Which elements dropout keeps, from a seed and their position alone: no mask is stored, any row can be made again
// alone, and every backend draws the same one. simd/dropout.h has the hash.

#pragma once

#include <cmath>
#include <cstdint>

namespace llm2clip {

struct Dropout {
  uint32_t threshold;  // of 2^24; nothing is dropped at 0
  float scale;         // of what is kept
  uint64_t seed;
};

// p in [0, 1], rounded to 2^-24
inline Dropout dropout_of(int64_t seed, double p) {
  return {static_cast<uint32_t>(std::nearbyint(p * (1 << 24))), p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f,
          static_cast<uint64_t>(seed)};
}

}  // namespace llm2clip
