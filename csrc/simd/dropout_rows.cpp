#include "../dropout_rows.h"

#include "dropout.h"

namespace llm2clip {
namespace {

// elements as bit patterns: zero has the same one in every float type
template <class Bits>
LLM2CLIP_INLINE void drop(const DropoutRows& a) {
  Bits* row = static_cast<Bits*>(a.values);
  for (int64_t i = 0; i < a.rows; ++i) {
    const uint32_t key = row_key(a.dropout, a.first_row + i);
    for (int64_t j = 0; j < a.cols; ++j) {
      row[j] = keeps(a.dropout, key, static_cast<uint32_t>(j)) ? row[j] : Bits{0};
    }
    row += a.cols;
  }
}

void drop_rows(const DropoutRows& a) {
  switch (a.element_bytes) {
    case 2:
      return drop<uint16_t>(a);
    case 4:
      return drop<uint32_t>(a);
    default:
      return drop<uint64_t>(a);
  }
}

}  // namespace

const DropoutKernels DropoutKernels::LLM2CLIP_INSTRUCTION_SET{drop_rows};

}  // namespace llm2clip
