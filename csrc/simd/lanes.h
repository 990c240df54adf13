// Sixteen numbers at a time on any instruction set, in GCC/Clang vector extensions.
//
// The sources of this directory are compiled once for each instruction set (CMakeLists.txt). Sixteen floats are one
// register of AVX-512, a pair of AVX2's, or a pair of pairs of SSE's or NEON's: a vector of the compiler's that is wider
// than its registers would go through memory. So every instruction set has the same lanes, and sums in the same order.
//
// Nothing here may reach the linker, which keeps one copy of a function whatever it was compiled for: all names are in
// unnamed namespaces, and these sources use no function template or inline function of the standard library.

#pragma once

#include <cstdint>
#include <cstring>

#include "../always_inline.h"

namespace llm2clip {
namespace {

constexpr int64_t kLanes = 16;
#if defined(__AVX512F__)
constexpr int64_t kRegisterLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kRegisterLanes = 8;
#else
constexpr int64_t kRegisterLanes = 4;
#endif

using FloatRegister = float __attribute__((vector_size(4 * kRegisterLanes)));
using IntRegister = int32_t __attribute__((vector_size(4 * kRegisterLanes)));
using WordRegister = uint32_t __attribute__((vector_size(4 * kRegisterLanes)));
using HalfRegister = uint16_t __attribute__((vector_size(2 * kRegisterLanes)));

template <class Part>
struct Pair {
  Part low, high;
};

template <class Register, int64_t kCount>
struct Registers {
  using Type = Pair<typename Registers<Register, kCount / 2>::Type>;
};
template <class Register>
struct Registers<Register, 1> {
  using Type = Register;
};

template <class Register>
using Sixteen = typename Registers<Register, kLanes / kRegisterLanes>::Type;

using Floats = Sixteen<FloatRegister>;
using Ints = Sixteen<IntRegister>;
using Words = Sixteen<WordRegister>;
using Halves = Sixteen<HalfRegister>;

template <class T>
constexpr bool kIsPair = false;
template <class Part>
constexpr bool kIsPair<Pair<Part>> = true;

template <class Part>
LLM2CLIP_INLINE Pair<Part> pair(Part low, Part high) {
  return {low, high};
}

// an operator of registers, for pairs of them and for a pair and a number; comparisons give -1 or 0 in each lane
#define LLM2CLIP_FOR_PAIRS(op)                                      \
  template <class Part>                                             \
  LLM2CLIP_INLINE auto operator op(Pair<Part> a, Pair<Part> b) {    \
    return pair(a.low op b.low, a.high op b.high);                  \
  }                                                                 \
  template <class Part, class Number>                               \
  LLM2CLIP_INLINE auto operator op(Pair<Part> a, Number b) {        \
    return pair(a.low op b, a.high op b);                           \
  }                                                                 \
  template <class Part, class Number>                               \
  LLM2CLIP_INLINE auto operator op(Number a, Pair<Part> b) {        \
    return pair(a op b.low, a op b.high);                           \
  }

LLM2CLIP_FOR_PAIRS(+)
LLM2CLIP_FOR_PAIRS(-)
LLM2CLIP_FOR_PAIRS(*)
LLM2CLIP_FOR_PAIRS(/)
LLM2CLIP_FOR_PAIRS(&)
LLM2CLIP_FOR_PAIRS(|)
LLM2CLIP_FOR_PAIRS(^)
LLM2CLIP_FOR_PAIRS(<<)
LLM2CLIP_FOR_PAIRS(>>)
LLM2CLIP_FOR_PAIRS(<)
LLM2CLIP_FOR_PAIRS(>)
LLM2CLIP_FOR_PAIRS(>=)
LLM2CLIP_FOR_PAIRS(==)
LLM2CLIP_FOR_PAIRS(!=)
#undef LLM2CLIP_FOR_PAIRS

#define LLM2CLIP_ASSIGNS(op)                                            \
  template <class Part, class Other>                                    \
  LLM2CLIP_INLINE Pair<Part>& operator op##=(Pair<Part>& a, Other b) {  \
    return a = a op b;                                                  \
  }

LLM2CLIP_ASSIGNS(+)
LLM2CLIP_ASSIGNS(*)
LLM2CLIP_ASSIGNS(^)
#undef LLM2CLIP_ASSIGNS

template <class Part>
LLM2CLIP_INLINE Pair<Part> operator-(Pair<Part> a) {
  return {-a.low, -a.high};
}

// a where the mask, of a comparison, is set, b elsewhere
template <class Mask, class T>
LLM2CLIP_INLINE T select(Mask mask, T a, T b) {
  if constexpr (kIsPair<T>) {
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  } else {
    return mask ? a : b;
  }
}

// the same bits as another type of lanes
template <class To, class From>
LLM2CLIP_INLINE To bits_as(From from) {
  if constexpr (kIsPair<To>) {
    return {bits_as<decltype(To::low)>(from.low), bits_as<decltype(To::high)>(from.high)};
  } else {
    static_assert(sizeof(To) == sizeof(From));
    return (To)from;
  }
}

// the same numbers as another type of lanes
template <class To, class From>
LLM2CLIP_INLINE To convert(From from) {
  if constexpr (kIsPair<To>) {
    return {convert<decltype(To::low)>(from.low), convert<decltype(To::high)>(from.high)};
  } else {
    return __builtin_convertvector(from, To);
  }
}

// Keeps the compiler from fusing what gave these numbers with what becomes of them.
template <class T>
LLM2CLIP_INLINE T rounded(T value) {
  if constexpr (kIsPair<T>) {
    return {rounded(value.low), rounded(value.high)};
  } else {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#else
    asm("" : "+m"(value));
#endif
    return value;
  }
}

template <class T, class Element>
LLM2CLIP_INLINE T load_lanes(const Element* from) {
  if constexpr (kIsPair<T>) {
    return {load_lanes<decltype(T::low)>(from), load_lanes<decltype(T::high)>(from + sizeof(T) / 2 / sizeof(Element))};
  } else {
    T out;
    std::memcpy(&out, from, sizeof(out));
    return out;
  }
}

template <class T, class Element>
LLM2CLIP_INLINE void store_lanes(Element* to, T value) {
  if constexpr (kIsPair<T>) {
    store_lanes(to, value.low);
    store_lanes(to + sizeof(T) / 2 / sizeof(Element), value.high);
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

LLM2CLIP_INLINE Floats broadcast(float value) {
  return Floats{} + value;
}

LLM2CLIP_INLINE Floats load(const float* from) {
  return load_lanes<Floats>(from);
}

LLM2CLIP_INLINE void store(float* to, Floats value) {
  store_lanes(to, value);
}

LLM2CLIP_INLINE Ints lane_numbers() {
  constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_lanes<Ints>(kNumbers);
}

LLM2CLIP_INLINE Floats larger(Floats a, Floats b) {
  return select(a > b, a, b);
}

LLM2CLIP_INLINE float largest_lane(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  float top = lanes[0];
  for (int64_t l = 1; l < kLanes; ++l) top = lanes[l] > top ? lanes[l] : top;
  return top;
}

// the sum of the lanes by a fixed tree
LLM2CLIP_INLINE double sum(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  double total[4] = {0, 0, 0, 0};
  for (int64_t l = 0; l < kLanes; ++l) total[l % 4] += lanes[l];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

LLM2CLIP_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

LLM2CLIP_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace
}  // namespace llm2clip
