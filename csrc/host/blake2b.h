#pragma once

#include <cstddef>
#include <cstdint>

namespace llm2clip {

// 128-bit BLAKE2b without a key (RFC 7693); `digest` takes 16 bytes.
void blake2b_128(const unsigned char* data, std::size_t size, unsigned char* digest);

}  // namespace llm2clip
