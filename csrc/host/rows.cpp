// Rows of an embedding store from mapped files, decoded on the way.
#include "rows.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "../instruction_set.h"
#include "decoders.h"
#include "threads.h"

namespace py = pybind11;

namespace llm2clip {
namespace {

// bytes of output that are worth a thread
constexpr std::size_t kLeastBytes = 1 << 18;
// rows and cache lines of each that are fetched ahead: a random row begins with a miss of the TLB
constexpr std::size_t kAheadRows = 4;
constexpr std::size_t kAheadBytes = 256;
// rows looked at to find out whether a batch must come from the disk
constexpr std::size_t kLooks = 8;

void decode_fp32(const unsigned char* from, float, std::size_t count, float* to) { std::memcpy(to, from, 4 * count); }

Decode decoder(Format format) {
  switch (format) {
    case Format::kFp16: return kernels<DecodeKernels>().fp16;
    case Format::kBf16: return kernels<DecodeKernels>().bf16;
    case Format::kInt8: return kernels<DecodeKernels>().int8;
    case Format::kFp8: return kernels<DecodeKernels>().fp8;
    default: return decode_fp32;
  }
}

Format format_of(const std::string& name) {
  static const std::map<std::string, Format> known = {{"fp32", Format::kFp32}, {"fp16", Format::kFp16},
                                                      {"bf16", Format::kBf16}, {"int8", Format::kInt8},
                                                      {"fp8", Format::kFp8}};
  const auto found = known.find(name);
  if (found == known.end()) throw std::invalid_argument("unknown format " + name);
  return found->second;
}

struct Span {
  void* start;
  std::size_t bytes;
};

Span pages_of(const unsigned char* data, std::size_t bytes) {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(data) / page * page;
  return {reinterpret_cast<void*>(first), reinterpret_cast<std::uintptr_t>(data) + bytes - first};
}

std::size_t value_bytes(Format format) {
  if (format == Format::kFp32) return 4;
  return format == Format::kFp16 || format == Format::kBf16 ? 2 : 1;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  void* mapped = MAP_FAILED;
  if (descriptor >= 0 && ::fstat(descriptor, &info) == 0) {
    size_ = static_cast<std::size_t>(info.st_size);
    mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
  }
  const int error = errno;
  if (descriptor >= 0) ::close(descriptor);
  if (mapped == MAP_FAILED) {
    errno = error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw py::error_already_set();
  }
  data_ = static_cast<unsigned char*>(mapped);
  // a fault for one row must not read its neighbourhood from the disk
  ::madvise(mapped, size_, MADV_RANDOM);
}

MappedFile::~MappedFile() { ::munmap(data_, size_); }

RowReader::RowReader(std::size_t width, const std::string& format)
    : width_(width), row_bytes_(width * value_bytes(format_of(format))), format_(format_of(format)) {}

void RowReader::add(const std::string& path, std::size_t rows, std::size_t embeddings, std::size_t scales) {
  auto file = std::make_unique<MappedFile>(path);
  const bool scaled = format_ == Format::kInt8 || format_ == Format::kFp8;
  if (embeddings + rows * row_bytes_ > file->size() || (scaled && scales + rows * sizeof(float) > file->size())) {
    throw std::invalid_argument(path + " is shorter than its rows");
  }
  const unsigned char* data = file->data();
  sources_.push_back({std::move(file), data + embeddings, scaled ? data + scales : nullptr});
  stops_.push_back((stops_.empty() ? 0 : stops_.back()) + static_cast<std::int64_t>(rows));
}

RowReader::Place RowReader::place(std::int64_t row) const {
  const auto number = static_cast<std::size_t>(std::upper_bound(stops_.begin(), stops_.end(), row) - stops_.begin());
  const auto local = static_cast<std::size_t>(row - (number == 0 ? 0 : stops_[number - 1]));
  const Source& source = sources_[number];
  float scale = 1.0f;
  if (source.scales != nullptr) std::memcpy(&scale, source.scales + local * sizeof(float), sizeof(float));
  return {source.data + local * row_bytes_, scale};
}

// whether some of a few rows must come from the disk; where the system does not tell, no
bool RowReader::on_disk(const std::int64_t* rows, std::size_t count) const {
  const std::size_t step = std::max<std::size_t>(1, count / kLooks);
  for (std::size_t i = 0; i < count; i += step) {
    const Span pages = pages_of(place(rows[i]).data, row_bytes_);
    unsigned char resident = 1;
    if (::mincore(pages.start, 1, &resident) == 0 && (resident & 1) == 0) return true;
  }
  return false;
}

void RowReader::read(const Int64Array& rows, py::array_t<float, py::array::c_style>& out, std::size_t threads) const {
  const std::int64_t total = stops_.empty() ? 0 : stops_.back();
  if (rows.ndim() != 1 || out.ndim() != 2 || out.shape(0) != rows.shape(0) ||
      static_cast<std::size_t>(out.shape(1)) > width_) {
    throw std::invalid_argument("expected rows (n,) and out (n, at most " + std::to_string(width_) + ")");
  }
  const std::size_t count = static_cast<std::size_t>(rows.shape(0));
  const std::size_t dim = static_cast<std::size_t>(out.shape(1));
  const std::int64_t* wanted = rows.data();
  for (std::size_t i = 0; i < count; ++i) {
    if (wanted[i] < 0 || wanted[i] >= total) throw py::index_error("row " + std::to_string(wanted[i]));
  }
  float* to = out.mutable_data();
  const Decode decode = decoder(format_);
  const std::size_t used_bytes = row_bytes_ / width_ * dim;
  const std::size_t ahead_bytes = std::min(kAheadBytes, used_bytes);
  py::gil_scoped_release release;
  const bool from_disk = on_disk(wanted, count);
  in_parts(count, threads, kLeastBytes / (4 * dim + 1) + 1, [&](std::size_t begin, std::size_t end) {
    if (from_disk) {
      // every row is asked for before the first is waited for: one after the other they would take 20 times as long
      for (std::size_t i = begin; i < end; ++i) {
        const Span pages = pages_of(place(wanted[i]).data, used_bytes);
        ::madvise(pages.start, pages.bytes, MADV_WILLNEED);
      }
    }
    Place ahead[kAheadRows];
    const auto fetch = [&](std::size_t i) {
      const Place found = ahead[i % kAheadRows] = place(wanted[i]);
      for (std::size_t byte = 0; byte < ahead_bytes; byte += 64) __builtin_prefetch(found.data + byte);
    };
    for (std::size_t i = begin; i < std::min(end, begin + kAheadRows); ++i) fetch(i);
    for (std::size_t i = begin; i < end; ++i) {
      const Place found = ahead[i % kAheadRows];
      decode(found.data, found.scale, dim, to + i * dim);
      if (i + kAheadRows < end) fetch(i + kAheadRows);
    }
  });
}

}  // namespace llm2clip
