// Host-side helpers that are not tensor ops. Each has a twin in Python with the same results.
#include "host.h"
#include "rows.h"

#include <pybind11/stl.h>

#include "../instruction_set.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Native twins of plain Python: tar index, caption packing, and the reading side of an embedding store";
  m.def("index_tar", &llm2clip::index_tar, py::arg("path"),
        "(names, offsets, sizes, refused, damage) of a tar file; names are bytes");
  m.def("pack", &llm2clip::pack, py::arg("lengths"), py::arg("budget"),
        "Bin number of every length, first-fit decreasing under the budget");
  m.def("caption_digests", &llm2clip::caption_digests, py::arg("texts"), py::arg("threads"),
        "Address of every caption, uint64 (n, 2)");
  m.def("use_instruction_set", &llm2clip::use_instruction_set, py::arg("name"),
        "Vector instructions of the reader: portable, avx2, avx512, or auto for the best of this processor");
  m.def("find_rows", &llm2clip::find_rows, py::arg("digests"), py::arg("high").noconvert(),
        py::arg("low").noconvert(), py::arg("rows").noconvert(), py::arg("buckets").noconvert(), py::arg("threads"),
        "Row of every address, int64 (n,); -1 where it is not known");
  py::class_<llm2clip::RowReader>(m, "RowReader", "Rows of mapped files, gathered into fp32")
      .def(py::init<std::size_t, const std::string&>(), py::arg("width"), py::arg("format"))
      .def("add", &llm2clip::RowReader::add, py::arg("path"), py::arg("rows"), py::arg("embeddings"),
           py::arg("scales"))
      .def("read", &llm2clip::RowReader::read, py::arg("rows"), py::arg("out").noconvert(), py::arg("threads"));
}
