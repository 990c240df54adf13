// Host-side helpers that are not tensor ops. Each has a twin in Python with the same results.
#include "host.h"

#include <pybind11/stl.h>

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Native twins of llm2clip.data.shards.index_tar_python and llm2clip.packing.pack_python";
  m.def("index_tar", &llm2clip::index_tar, py::arg("path"),
        "(names, offsets, sizes, refused, damage) of a tar file; names are bytes");
  m.def("pack", &llm2clip::pack, py::arg("lengths"), py::arg("budget"),
        "Bin number of every length, first-fit decreasing under the budget");
}
