#include "../decoders.h"

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../../always_inline.h"

namespace llm2clip {
namespace {

LLM2CLIP_INLINE float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// in integers but for one subtraction of normal numbers, so that subnormals are right whatever the processor's modes
LLM2CLIP_INLINE float half_to_float(std::uint16_t half) {
  constexpr std::uint32_t kExponent = 0x7c00u << 13;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & kExponent;
  std::uint32_t bits = magnitude + ((127u - 15u) << 23);
  bits += exponent == kExponent ? (128u - 16u) << 23 : exponent == 0 ? 1u << 23 : 0u;
  const float size = from_bits(bits) - (exponent == 0 ? from_bits(113u << 23) : 0.0f);
  std::uint32_t unsigned_bits;
  std::memcpy(&unsigned_bits, &size, sizeof(unsigned_bits));
  return from_bits(unsigned_bits | static_cast<std::uint32_t>(half & 0x8000u) << 16);
}

// e4m3 (bias 7, no infinity) moved into the bits of an fp16, which is then 256 times too small
LLM2CLIP_INLINE std::uint16_t fp8_as_half(unsigned char byte) {
  return static_cast<std::uint16_t>((byte & 0x80u) << 8 | (byte & 0x7fu) << 7);
}

void decode_bf16(const unsigned char* from, float, std::size_t count, float* to) {
  const auto* values = reinterpret_cast<const std::uint16_t*>(from);
  for (std::size_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<std::uint32_t>(values[i]) << 16);
}

void decode_int8(const unsigned char* from, float scale, std::size_t count, float* to) {
  const auto* values = reinterpret_cast<const signed char*>(from);
  for (std::size_t i = 0; i < count; ++i) to[i] = scale * static_cast<float>(values[i]);
}

void decode_fp16(const unsigned char* from, float, std::size_t count, float* to) {
  const auto* values = reinterpret_cast<const std::uint16_t*>(from);
  std::size_t i = 0;
#if defined(__F16C__)
  // the processor's own conversion; compilers do not find it in the loop below
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) to[i] = half_to_float(values[i]);
}

void decode_fp8(const unsigned char* from, float scale, std::size_t count, float* to) {
  std::size_t i = 0;
#if defined(__F16C__)
  const __m256 factor = _mm256_set1_ps(256.0f * scale);
  for (; i + 8 <= count; i += 8) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i size = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7);
    _mm256_storeu_ps(to + i, _mm256_mul_ps(factor, _mm256_cvtph_ps(_mm_or_si128(sign, size))));
  }
#endif
  for (; i < count; ++i) to[i] = 256.0f * scale * half_to_float(fp8_as_half(from[i]));
}

}  // namespace

const DecodeKernels DecodeKernels::LLM2CLIP_INSTRUCTION_SET{decode_fp16, decode_bf16, decode_int8, decode_fp8};

}  // namespace llm2clip
