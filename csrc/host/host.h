#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace llm2clip {

pybind11::tuple index_tar(const std::string& path);

using Int64Array = pybind11::array_t<std::int64_t, pybind11::array::c_style | pybind11::array::forcecast>;
Int64Array pack(const Int64Array& lengths, std::int64_t budget);

}  // namespace llm2clip
