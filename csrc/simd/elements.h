// Rows of floats or bfloat16, read and written as vectors of floats.

#pragma once

#include "../elements.h"
#include "lanes.h"

namespace llm2clip {
namespace {

struct BFloat {
  uint16_t bits;
};

LLM2CLIP_INLINE Floats load(const BFloat* from) {
  return bits_as<Floats>(convert<Words>(load_lanes<Halves>(from)) << 16);
}

// to the nearest, ties to even; NaN stays NaN
LLM2CLIP_INLINE void store(BFloat* to, Floats value) {
  const Words wide = bits_as<Words>(value);
  const Words rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const Words quiet = (wide >> 16) | 0x40u;
  store_lanes(to, convert<Halves>(select(value == value, rounded, quiet)));
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

template <class T>
LLM2CLIP_INLINE void add_to(T* to, Floats value, int64_t count) {
  put(to, get(to, count) + value, count);
}

// `value` with `fill` in the lanes past the first `count`
LLM2CLIP_INLINE Floats fill_past(Floats value, int64_t count, float fill) {
  if (count == kLanes) return value;
  return select(lane_numbers() < static_cast<int32_t>(count), value, broadcast(fill));
}

// calls body(column, count) over the columns of a row, sixteen at a time
template <class Body>
LLM2CLIP_INLINE void for_each_lane_group(int64_t cols, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) body(j, kLanes);
  if (j < cols) body(j, cols - j);
}

// calls body with the elements as float* or BFloat*
template <class Body>
LLM2CLIP_INLINE void with_elements(Elements elements, const Body& body) {
  if (elements.are_bfloat16) {
    body(static_cast<BFloat*>(elements.data));
  } else {
    body(static_cast<float*>(elements.data));
  }
}

}  // namespace
}  // namespace llm2clip
