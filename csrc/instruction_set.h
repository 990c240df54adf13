// Which vector instructions this processor and its system allow, and how a function is compiled for them.

#pragma once

#if defined(__x86_64__)
#define LLM2CLIP_AVX2 __attribute__((target("avx2,fma")))
// whole vectors of 512 bits: each compiler has its own word for it, and ignores all of an attribute it does not know
#if defined(__clang__)
#define LLM2CLIP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define LLM2CLIP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
// writes variant(suffix, attribute) for every instruction set of this architecture
#define LLM2CLIP_FOR_EACH_INSTRUCTION_SET(variant) \
  variant(default, ) variant(avx2, LLM2CLIP_AVX2) variant(avx512, LLM2CLIP_AVX512)
// name_avx512, name_avx2 or name_default: the best one that runs here
#define LLM2CLIP_FOR_THIS_PROCESSOR(name) ::llm2clip::for_this_processor(name##_default, name##_avx2, name##_avx512)
#else
#define LLM2CLIP_FOR_EACH_INSTRUCTION_SET(variant) variant(default, )
#define LLM2CLIP_FOR_THIS_PROCESSOR(name) name##_default
#endif

namespace llm2clip {

#if defined(__x86_64__)
template <class T>
T for_this_processor(T plain, T avx2, T avx512) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2 : plain;
}
#endif

}  // namespace llm2clip
