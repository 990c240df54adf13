// Dropout whose mask is a function of (seed, row, column): nothing is stored, any row can be made again alone.
//
// The same integer hash stands in lora_linear/dropout.py (torch) and lora_linear/kernel.py (Triton); all three
// must give the same bits, because forward and backward may run on different implementations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace llm2clip {
namespace {

using torch::stable::Tensor;

constexpr uint32_t kGolden = 0x9e3779b9u;
constexpr int64_t kRows = 16;

#define LLM2CLIP_INLINE inline __attribute__((always_inline))

// a 32-bit finaliser: two multiplications, every input bit reaches every output bit
LLM2CLIP_INLINE uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

uint32_t row_key(uint64_t seed, uint64_t row) {
  uint32_t key = mix(static_cast<uint32_t>(row >> 32) + kGolden);
  key = mix(static_cast<uint32_t>(row) ^ key);
  key = mix(static_cast<uint32_t>(seed >> 32) ^ key);
  return mix(static_cast<uint32_t>(seed) ^ key);
}

// elements as bit patterns: zero has the same one in every float type
template <class Bits>
LLM2CLIP_INLINE void drop_body(Bits* row, const uint32_t* columns, int64_t cols, uint32_t key, uint32_t threshold) {
  for (int64_t j = 0; j < cols; ++j) {
    row[j] = (mix(key ^ columns[j]) >> 8) >= threshold ? row[j] : Bits{0};
  }
}

#define LLM2CLIP_DROP(suffix, target)                                                                   \
  template <class Bits>                                                                                 \
  target void drop_##suffix(Bits* row, const uint32_t* columns, int64_t cols, uint32_t key, uint32_t threshold) { \
    drop_body(row, columns, cols, key, threshold);                                                      \
  }

LLM2CLIP_DROP(default, )
#if defined(__x86_64__)
LLM2CLIP_DROP(avx2, __attribute__((target("avx2"))))
LLM2CLIP_DROP(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512"))))
#endif

template <class Bits>
auto choose() -> void (*)(Bits*, const uint32_t*, int64_t, uint32_t, uint32_t) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return drop_avx512<Bits>;
  }
  if (__builtin_cpu_supports("avx2")) return drop_avx2<Bits>;
#endif
  return drop_default<Bits>;
}

template <class Bits>
void drop_all(const Tensor& t, uint64_t seed, int64_t first_row, uint32_t threshold) {
  static const auto drop = choose<Bits>();
  const int64_t rows = t.size(0);
  const int64_t cols = t.size(1);
  std::vector<uint32_t> columns(cols);
  for (int64_t j = 0; j < cols; ++j) columns[j] = mix(static_cast<uint32_t>(j) + kGolden);
  Bits* values = static_cast<Bits*>(t.data_ptr());
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < end * kRows && i < rows; ++i) {
      drop(values + i * cols, columns.data(), cols, row_key(seed, static_cast<uint64_t>(first_row + i)), threshold);
    }
  });
}

// zeroes the share p of a contiguous (rows, cols) matrix in place; its first row counts as `first_row`
void dropout_rows(Tensor t, int64_t seed, int64_t first_row, double p) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), "dropout_rows_: a contiguous matrix is needed");
  const auto threshold = static_cast<uint32_t>(std::nearbyint(p * (1 << 24)));
  switch (t.element_size()) {
    case 2:
      return drop_all<uint16_t>(t, static_cast<uint64_t>(seed), first_row, threshold);
    case 4:
      return drop_all<uint32_t>(t, static_cast<uint64_t>(seed), first_row, threshold);
    case 8:
      return drop_all<uint64_t>(t, static_cast<uint64_t>(seed), first_row, threshold);
    default:
      STD_TORCH_CHECK(false, "dropout_rows_: elements of 2, 4 or 8 bytes are needed");
  }
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("dropout_rows_", TORCH_BOX(&llm2clip::dropout_rows));
}
