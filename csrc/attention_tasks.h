// Softmax attention of one key head of one sequence of a pack, forward and backward, on one thread.

#pragma once

#include <cstdint>

#include "always_inline.h"

namespace llm2clip {

struct AttentionProblem {
  const float *grad, *q, *k, *v;  // (T, heads, width); grad for the backward alone
  float *out, *dq, *dk, *dv;      // null: not wanted
  const int64_t* edges;           // (sequences + 1,) sequence s is tokens [edges[s], edges[s + 1])
  int64_t sequences, query_heads, key_heads, width;
  bool causal;
  int64_t window;  // -1: none
  float scale;
};

// query rows whose logits are held at a time
constexpr int64_t kQueryRows = 64;

// rows of working memory are whole vectors, of sixteen floats under every instruction set
LLM2CLIP_INLINE constexpr int64_t whole_vectors(int64_t n) {
  return (n + 15) / 16 * 16;
}

// floats that a forward or backward task of a sequence needs to work in, on a 64-byte boundary
LLM2CLIP_INLINE int64_t attention_workspace(const AttentionProblem& p, int64_t length) {
  const int64_t padded = whole_vectors(length), wide = whole_vectors(p.width);
  // three copies and two sums of the keys' size, transposed or not; two blocks of logits, three of query rows
  return 2 * p.width * padded + 3 * length * wide + kQueryRows * (2 * padded + 3 * wide);
}

struct AttentionKernels {
  void (*forward)(const AttentionProblem&, int64_t sequence, int64_t head, float* workspace);
  void (*backward)(const AttentionProblem&, int64_t sequence, int64_t head, float* workspace);

  static const AttentionKernels portable, avx2, avx512;
};

}  // namespace llm2clip
