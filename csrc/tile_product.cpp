// Which product the tiles of this process use, and that product as an op of its own, for tests and benchmarks.

#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <string>

#include "gemm.h"
#include "tiles.h"

namespace llm2clip {
namespace {

struct Kernel {
  const char* name;
  Gemm gemm;
};

const std::array<Kernel, 3>& kernels() {
  static const std::array<Kernel, 3> all{
      {{"torch", nullptr}, {"avx2", gemm_named("avx2")}, {"avx512", gemm_named("avx512")}}};
  return all;
}

size_t place_of(const std::string& name) {
  for (size_t i = 0; i < kernels().size(); ++i) {
    if (name == kernels()[i].name && (i == 0 || kernels()[i].gemm != nullptr)) return i;
  }
  STD_TORCH_CHECK(false, "no GEMM '", name, "' on this processor; expected auto, torch, avx2 or avx512");
}

std::atomic<size_t>& chosen() {
  static std::atomic<size_t> place{place_of(preferred_gemm())};
  return place;
}

void use_gemm(std::string name) {
  chosen().store(place_of(name == "auto" ? preferred_gemm() : name));
}

std::string gemm_in_use() {
  return kernels()[chosen().load()].name;
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
  return kernels()[chosen().load()].gemm;
}

}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("tile_product", TORCH_BOX(&llm2clip::tile_product));
}

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CompositeExplicitAutograd, m) {
  m.impl("use_gemm", TORCH_BOX(&llm2clip::use_gemm));
  m.impl("gemm_in_use", TORCH_BOX(&llm2clip::gemm_in_use));
}
