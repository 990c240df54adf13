#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace llm2clip {

using Int64Array = pybind11::array_t<std::int64_t, pybind11::array::c_style | pybind11::array::forcecast>;
using Words = pybind11::array_t<std::uint64_t, pybind11::array::c_style>;
using Counts = pybind11::array_t<std::uint32_t, pybind11::array::c_style>;

pybind11::tuple index_tar(const std::string& path);

Int64Array pack(const Int64Array& lengths, std::int64_t budget);

// 128-bit BLAKE2b of every text's UTF-8 as two little-endian words (n, 2)
Words caption_digests(const pybind11::sequence& texts, std::size_t threads);

// the row of every address (n, 2), -1 where it is not known; high, low, rows: sorted by address;
// buckets: first place of every value that the upper bits of an address can have, and the end
Int64Array find_rows(const Words& digests, const Words& high, const Words& low, const Counts& rows,
                     const Counts& buckets, std::size_t threads);

}  // namespace llm2clip
