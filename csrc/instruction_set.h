// Which vector instructions this processor and its system allow, and how a function is compiled for them.

#pragma once

#if defined(__x86_64__)
#define LLM2CLIP_AVX2 __attribute__((target("avx2,fma")))
#define LLM2CLIP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

namespace llm2clip {

enum class InstructionSet { kDefault, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kDefault;
}

}  // namespace llm2clip
