// Stored values of an embedding store to floats.

#pragma once

#include <cstddef>

namespace llm2clip {

// to (count,) = the values at `from` times `scale`; formats without a scale ignore it
using Decode = void (*)(const unsigned char* from, float scale, std::size_t count, float* to);

struct DecodeKernels {
  Decode fp16, bf16, int8, fp8;

  static const DecodeKernels portable, avx2, avx512;
};

}  // namespace llm2clip
