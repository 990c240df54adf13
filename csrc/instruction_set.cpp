#include "instruction_set.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace llm2clip {
namespace {

#if defined(__x86_64__)
// older Clang does not let __builtin_cpu_supports ask for it
bool has_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

constexpr InstructionSet kBestFirst[] = {InstructionSet::kAvx512, InstructionSet::kAvx2, InstructionSet::kPortable};

InstructionSet best() {
  for (InstructionSet set : kBestFirst) {
    if (is_supported(set)) return set;
  }
  return InstructionSet::kPortable;
}

std::atomic<InstructionSet>& chosen() {
  static std::atomic<InstructionSet> set{best()};
  return set;
}

}  // namespace

InstructionSet instruction_set() {
  return chosen().load(std::memory_order_relaxed);
}

void use_instruction_set(std::string name) {
  if (name == "auto") return chosen().store(best());
  for (InstructionSet set : kBestFirst) {
    if (name == name_of(set) && is_supported(set)) return chosen().store(set);
  }
  throw std::runtime_error("no instruction set '" + name +
                           "' on this processor; expected auto, portable, avx2 or avx512");
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kPortable:
      break;
  }
  return "portable";
}

bool is_supported(InstructionSet set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  switch (set) {
    case InstructionSet::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case InstructionSet::kAvx2:
      return avx2;
    case InstructionSet::kPortable:
      break;
  }
#endif
  return set == InstructionSet::kPortable;
}

}  // namespace llm2clip
