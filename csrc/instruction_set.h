// Which vector instructions the kernels of this process use.
//
// The sources of simd/ and host/simd/ are compiled once for each instruction set (CMakeLists.txt); each gives its
// kernels as a table of functions, a struct with one static member for each instruction set.

#pragma once

#include <string>

namespace llm2clip {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The best one that this processor and its system allow, or the one that use_instruction_set() named.
InstructionSet instruction_set();

// "auto" is the best one; std::runtime_error where the processor does not run the one named
void use_instruction_set(std::string name);

// "avx512", "avx2" or "portable" (SSE2 or NEON: what every processor of this architecture has)
const char* name_of(InstructionSet set);

// whether this processor and its system allow it
bool is_supported(InstructionSet set);

// the kernels of the instruction set in use
template <class Kernels>
const Kernels& kernels() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return Kernels::avx512;
    case InstructionSet::kAvx2:
      return Kernels::avx2;
    case InstructionSet::kPortable:
      break;
  }
#endif
  return Kernels::portable;
}

}  // namespace llm2clip
