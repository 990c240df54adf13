// BLAKE2b from RFC 7693, for one message that lies in memory as a whole.
#include "blake2b.h"

#include <algorithm>
#include <cstring>

namespace llm2clip {
namespace {

constexpr std::size_t kBlock = 128;
constexpr std::size_t kDigest = 16;

constexpr std::uint64_t kStart[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

// rounds 10 and 11 are 0 and 1 again
constexpr unsigned char kOrder[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};

inline std::uint64_t turned(std::uint64_t word, int bits) { return word >> bits | word << (64 - bits); }

inline std::uint64_t little_endian(const unsigned char* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

inline void mix(std::uint64_t* v, int a, int b, int c, int d, std::uint64_t x, std::uint64_t y) {
  v[a] += v[b] + x;
  v[d] = turned(v[d] ^ v[a], 32);
  v[c] += v[d];
  v[b] = turned(v[b] ^ v[c], 24);
  v[a] += v[b] + y;
  v[d] = turned(v[d] ^ v[a], 16);
  v[c] += v[d];
  v[b] = turned(v[b] ^ v[c], 63);
}

void compress(std::uint64_t* state, const unsigned char* block, std::uint64_t counted, bool last) {
  std::uint64_t words[16], v[16];
  for (int i = 0; i < 16; ++i) words[i] = little_endian(block + 8 * i);
  for (int i = 0; i < 8; ++i) {
    v[i] = state[i];
    v[i + 8] = kStart[i];
  }
  v[12] ^= counted;
  if (last) v[14] = ~v[14];
#pragma GCC unroll 12
  for (const auto& order : kOrder) {
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      mix(v, column, column + 4, column + 8, column + 12, words[order[2 * column]], words[order[2 * column + 1]]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      mix(v, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, words[order[8 + 2 * i]], words[order[9 + 2 * i]]);
    }
  }
  for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

}  // namespace

void blake2b_128(const unsigned char* data, std::size_t size, unsigned char* digest) {
  std::uint64_t state[8];
  std::copy(kStart, kStart + 8, state);
  state[0] ^= 0x01010000 ^ kDigest;
  std::size_t done = 0;
  // the last block, full or not, is marked; an empty message has one block
  for (; size - done > kBlock; done += kBlock) compress(state, data + done, done + kBlock, false);
  unsigned char rest[kBlock] = {};
  if (size > done) std::memcpy(rest, data + done, size - done);
  compress(state, rest, size, true);
  for (std::size_t i = 0; i < kDigest; ++i) digest[i] = static_cast<unsigned char>(state[i / 8] >> (8 * (i % 8)));
}

}  // namespace llm2clip
