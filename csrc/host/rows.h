#pragma once

#include <memory>
#include <vector>

#include "host.h"

namespace llm2clip {

enum class Format { kFp32, kFp16, kBf16, kInt8, kFp8 };

// A file mapped for reading at random; its descriptor is closed at once, so that any number can be open.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

// Rows of an embedding store, which lie in several files, gathered into one fp32 array.
class RowReader {
 public:
  // `width`: stored values of a row; `format`: fp32, fp16, bf16, int8 or fp8
  RowReader(std::size_t width, const std::string& format);

  // the next file: `rows` embeddings from byte `embeddings` on, and for int8 and fp8 their fp32 scales from byte
  // `scales` on
  void add(const std::string& path, std::size_t rows, std::size_t embeddings, std::size_t scales);

  // the first `dim` values of every row in `rows` (n,) into out (n, dim)
  void read(const Int64Array& rows, pybind11::array_t<float, pybind11::array::c_style>& out, std::size_t threads) const;

 private:
  struct Source {
    std::unique_ptr<MappedFile> file;
    const unsigned char* data;
    const unsigned char* scales;
  };
  struct Place {
    const unsigned char* data;
    float scale;
  };

  Place place(std::int64_t row) const;
  bool on_disk(const std::int64_t* rows, std::size_t count) const;

  std::size_t width_;
  std::size_t row_bytes_;
  Format format_;
  std::vector<Source> sources_;
  std::vector<std::int64_t> stops_;
};

}  // namespace llm2clip
