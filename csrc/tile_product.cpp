// Which product the tiles of this process use, and that product as an op of its own, for tests and benchmarks.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "gemm.h"
#include "instruction_set.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// "auto": our kernel for the instruction set in use where the processor is AMD's, torch's product elsewhere
enum class Choice { kAuto, kTorch, kAvx2, kAvx512 };

std::atomic<Choice>& chosen() {
  static std::atomic<Choice> choice{Choice::kAuto};
  return choice;
}

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Choice resolved() {
  static const bool ours = is_amd();
  const Choice choice = chosen().load(std::memory_order_relaxed);
  if (choice != Choice::kAuto) return choice;
  if (!ours) return Choice::kTorch;
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return Choice::kAvx512;
    case InstructionSet::kAvx2:
      return Choice::kAvx2;
    case InstructionSet::kPortable:
      break;
  }
  return Choice::kTorch;
}

void use_gemm(std::string name) {
  if (name == "auto") return chosen().store(Choice::kAuto);
  if (name == "torch") return chosen().store(Choice::kTorch);
  if (name == "avx2" && is_supported(InstructionSet::kAvx2)) return chosen().store(Choice::kAvx2);
  if (name == "avx512" && is_supported(InstructionSet::kAvx512)) return chosen().store(Choice::kAvx512);
  STD_TORCH_CHECK(false, "no GEMM '", name, "' on this processor; expected auto, torch, avx2 or avx512");
}

std::string gemm_in_use() {
  switch (resolved()) {
    case Choice::kAvx512:
      return "avx512";
    case Choice::kAvx2:
      return "avx2";
    default:
      return "torch";
  }
}

// out = a·b, or out += a·b
void tile_product(Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
  for (const Tensor& t : {out, a, b}) {
    STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Float, "tile_product: float32 matrices");
    STD_TORCH_CHECK(t.stride(0) == 1 || t.stride(1) == 1, "tile_product: rows or columns must be contiguous");
  }
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0),
                  "tile_product: out (m, n), a (m, k), b (k, n)");
  STD_TORCH_CHECK(out.stride(1) == 1, "tile_product: the rows of out must be contiguous");
  multiply(out, a, b, accumulate);
}

}  // namespace

Gemm tile_gemm() {
#if defined(__x86_64__)
  if (resolved() == Choice::kAvx512) return GemmKernels::avx512.gemm;
  if (resolved() == Choice::kAvx2) return GemmKernels::avx2.gemm;
#endif
  return nullptr;
}

}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("tile_product", TORCH_BOX(&llm2clip::tile_product));
}

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CompositeExplicitAutograd, m) {
  m.impl("use_gemm", TORCH_BOX(&llm2clip::use_gemm));
  m.impl("gemm_in_use", TORCH_BOX(&llm2clip::gemm_in_use));
}
