// The choice of instruction set as ops.

#include <torch/csrc/stable/library.h>

#include <string>

#include "instruction_set.h"

namespace llm2clip {
namespace {

std::string cpu_capability() {
  return name_of(instruction_set());
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CompositeExplicitAutograd, m) {
  m.impl("use_instruction_set", TORCH_BOX(&llm2clip::use_instruction_set));
  m.impl("cpu_capability", TORCH_BOX(&llm2clip::cpu_capability));
}
