// Rows of floats or bfloat16 read and written as vectors of floats, and the choice of instruction set for the
// loop around them.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>

#include "instruction_set.h"
#include "simd_exp.h"

namespace llm2clip {

struct BFloat {
  uint16_t bits;
};

using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

LLM2CLIP_INLINE Floats load(const BFloat* from) {
  Halves half;
  std::memcpy(&half, from, sizeof(half));
  const Words wide = __builtin_convertvector(half, Words) << 16;
  Floats out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// to the nearest, ties to even; NaN stays NaN
LLM2CLIP_INLINE void store(BFloat* to, Floats value) {
  Words wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const Words rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const Words quiet = (wide >> 16) | 0x40u;
  const Halves half = __builtin_convertvector(value == value ? rounded : quiet, Halves);
  std::memcpy(to, &half, sizeof(half));
}

// the first `count` of sixteen elements; the other lanes are zero
template <class T>
LLM2CLIP_INLINE Floats get(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T lanes[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = from[l];
  return load(lanes);
}

template <class T>
LLM2CLIP_INLINE void put(T* to, Floats value, int64_t count) {
  if (count == kLanes) return store(to, value);
  T lanes[kLanes];
  store(lanes, value);
  for (int64_t l = 0; l < count; ++l) to[l] = lanes[l];
}

// calls body(column, count) over the columns of a row, sixteen at a time
template <class Body>
LLM2CLIP_INLINE void for_each_lane_group(int64_t cols, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) body(j, kLanes);
  if (j < cols) body(j, cols - j);
}

#define LLM2CLIP_RUN_VARIANT(suffix, target) \
  target static void run_##suffix(const Body& body) { body(); }

template <class Body>
struct Compiled {
  LLM2CLIP_FOR_EACH_INSTRUCTION_SET(LLM2CLIP_RUN_VARIANT)
};

// Runs body() compiled for the widest instruction set of this processor. Everything it calls must be
// always_inline, the body itself too.
template <class Body>
void run_simd(const Body& body) {
  using Run = void (*)(const Body&);
  static const Run run = LLM2CLIP_FOR_THIS_PROCESSOR(Compiled<Body>::run);
  run(body);
}

// calls body with the tensor's data as float* or BFloat*
template <class Body>
void with_elements(const torch::stable::Tensor& t, const Body& body) {
  using torch::headeronly::ScalarType;
  if (t.scalar_type() == ScalarType::Float) return body(static_cast<float*>(t.data_ptr()));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, "rows must be float32 or bfloat16");
  body(static_cast<BFloat*>(t.data_ptr()));
}

}  // namespace llm2clip
